"""Facts of a graph in normal form: shapes, dtypes, aliasing, operators, memory order."""
