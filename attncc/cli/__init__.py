"""The `attncc` command, one file a command."""
