"""Plots: arrays in, an image file out."""
