"""Choosing the parameters of tests."""
