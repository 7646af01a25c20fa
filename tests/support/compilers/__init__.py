"""Compilers that fail: scripts that stand in the place of g++."""
