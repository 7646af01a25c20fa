"""Masks become loop bounds."""
