"""The rows of the systems, read and compiled."""
