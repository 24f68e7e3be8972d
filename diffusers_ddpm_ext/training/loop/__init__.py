"""The training loop and everything it does between two steps."""
