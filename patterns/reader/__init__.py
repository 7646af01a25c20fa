"""Reading: what a tensor is at an index, as an expression."""
