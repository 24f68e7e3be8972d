"""What a set of images holds, for `ddpm-ext data`: read once, in memory that does not grow with their sizes."""
