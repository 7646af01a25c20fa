"""Numbers at the edges of what floats hold, for the tests of docs/numbers.md."""
