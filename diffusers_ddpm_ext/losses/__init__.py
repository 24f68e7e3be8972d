"""The training objective and its terms."""
