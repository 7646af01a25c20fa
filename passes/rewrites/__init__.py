"""Passes: an attention becomes another one that computes the same."""
