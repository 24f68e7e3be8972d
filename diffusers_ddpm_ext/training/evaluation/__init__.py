"""Validation losses and the variational bound."""
