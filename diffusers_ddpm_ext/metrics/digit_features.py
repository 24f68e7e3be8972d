"""Features of handwritten digits: the last hidden layer of a small classifier.

It was trained on the first 1,617 digits of scikit-learn (the 180 last ones are those that a run holds out by default)
by ``benchmarks/train_digit_features.py``; its weights are a file of the package, so that everyone has the same
features.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from diffusers_ddpm_ext.utils.array_files import read_tensors

DIGITS_TRAINED = 1617
DIGIT_SIZE = (8, 8)
WEIGHTS = Path(__file__).with_name("digit_features.safetensors")


def digit_classifier() -> nn.Sequential:
    """The untrained classifier: digits (B, 1, 8, 8) in [-1, 1] to logits (B, 10)."""
    return nn.Sequential(
        nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
        ),
        nn.Linear(64, 10),
    )


def load_digit_classifier() -> nn.Sequential:
    """The trained classifier, in evaluation mode, frozen. Its first part maps digits to features, (B, 64)."""
    classifier = digit_classifier()
    classifier.load_state_dict(read_tensors(WEIGHTS))
    return classifier.eval().requires_grad_(False)
