"""Plans: which approximate form each head of a model takes, chosen by profiling, with a certified error."""
