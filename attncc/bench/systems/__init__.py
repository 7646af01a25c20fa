"""The systems that attncc is meant to serve, one file each, as their authors would write them."""
