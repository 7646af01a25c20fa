"""Reading graphs without compiling them."""
