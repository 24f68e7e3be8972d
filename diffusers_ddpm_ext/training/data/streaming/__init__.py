"""Training on images that are read in order: larger than memory, and larger than the disk."""
