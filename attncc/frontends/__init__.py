"""Where models come from, besides `torch.compile`."""
