"""Masks for tests, as predicates and as models write them, and the brute force that loop bounds are held against."""
