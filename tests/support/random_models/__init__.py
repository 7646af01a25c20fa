"""Random attention programs in torch's words, spelled as models spell them, and how they are checked."""
