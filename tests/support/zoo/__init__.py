"""The zoo: models and forms, tiny and random, each with what a compiler of attention must see in it."""
