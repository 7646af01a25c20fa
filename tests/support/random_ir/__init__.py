"""Random attentions in the IR, with tensors to run them on."""
