"""Bounds that a small table gives at run time."""
