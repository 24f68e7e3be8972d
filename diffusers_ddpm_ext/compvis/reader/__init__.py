"""Reading of checkpoint files; executes nothing that a file names."""
