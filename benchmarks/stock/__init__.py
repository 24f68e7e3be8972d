"""Diffusers' `train_unconditional.py`, unmodified, beside the trainer of this project, for the benchmarks."""
