"""`attncc bench`: suites that measure attncc beside its peers."""
