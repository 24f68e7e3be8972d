"""The gallery: its entries, data, features and pictures."""
