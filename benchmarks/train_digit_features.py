"""Train the classifier whose features `--feature_extractor digits` compares, and write its weights into the package.

    python benchmarks/train_digit_features.py

The 1,617 digits of the training part, each moved by up to one pixel; the 180 others are only for the printed accuracy.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from diffusers_ddpm_ext.metrics.digit_features import DIGITS_TRAINED, WEIGHTS, digit_classifier

EPOCHS, BATCH = 40, 64


def train() -> tuple[torch.nn.Module, float]:
    """The trained classifier, and its accuracy on the other digits."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    torch.manual_seed(0)
    classifier = digit_classifier()
    steps = EPOCHS * (DIGITS_TRAINED // BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(DIGITS_TRAINED)[: DIGITS_TRAINED // BATCH * BATCH].split(BATCH):
            moved = torch.nn.functional.pad(images[batch], (1, 1, 1, 1), value=-1)
            down, right = torch.randint(3, (2,)).tolist()
            loss = torch.nn.functional.cross_entropy(
                classifier(moved[..., down : down + 8, right : right + 8]), labels[batch], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right_ones = classifier(images[DIGITS_TRAINED:]).argmax(1) == labels[DIGITS_TRAINED:]
    return classifier.eval(), float(right_ones.float().mean())


def main() -> None:
    """Train and write."""
    classifier, accuracy = train()
    save_file({name: weight.contiguous() for name, weight in classifier.state_dict().items()}, WEIGHTS)
    print(f"accuracy on the digits that are held out: {accuracy:.3f}; written to {WEIGHTS}")


if __name__ == "__main__":
    main()
