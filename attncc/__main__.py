"""`python -m attncc`, for where the command `attncc` is not on the path."""

from attncc.cli.app import main

if __name__ == "__main__":
    main()
