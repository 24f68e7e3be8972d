"""Frechet and kernel distance between two sets of pictures, by features that need no download.

    python benchmarks/latents/distances.py EMOJI_FOLDER SAMPLES.npz [SAMPLES.npz ...] [--json FILE]

``EMOJI_FOLDER`` is that of emoji.py; the files hold uint8 pictures (N, 64, 64, 3) as ``arr_0``. The features of a
picture are 64 numbers, the last hidden layer of a small convolutional network, in two ways:

- ``classes``: trained for half a minute to name the group of the set's training pictures, seen shifted and mirrored;
- ``random``: the same network with its initial weights.

FD is the squared Frechet distance of the Gaussians with the means and covariances of the features, KID the unbiased
squared maximum mean discrepancy with the kernel (x.y / 64 + 1)^3, both to the training pictures. The numbers are
comparable to each other only, and for equal N. Intervals are 95 % of Student's t over a jackknife of 16 blocks of the
samples. Features are centered and scaled by the training pictures. The rows "held out" and "half of the training
pictures" say what real pictures would get.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

WIDTHS = (24, 48, 96, 64)
BLOCKS, T_95 = 16, 2.131
BATCH = 32


def main() -> int:
    """Measure the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("samples", type=Path, nargs="*")
    parser.add_argument("--epochs", type=int, default=25, help="of the classifier")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    train, held_out = (read_folder(options.folder / part) for part in ("train", "held_out"))
    started = time.process_time()
    trained = fit_classifier(*train, options.epochs)
    accuracy = float((trained.classify(held_out[0]) == held_out[1]).float().mean())
    report: dict[str, object] = {
        "classifier": {"held_out_accuracy": accuracy, "cpu_seconds": time.process_time() - started},
        "rows": [],
    }
    print(f"classifier names {100 * accuracy:.1f} % of the held-out pictures' groups", flush=True)
    half = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[: len(train[0]) // 2]
    sets = {"held out": held_out[0], "half of the training pictures": train[0][half]}
    for path in options.samples:
        sets[path.stem] = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2).contiguous()
    torch.manual_seed(1)
    for kind, network in (("classes", trained), ("random", Features(len(train[2])).eval())):
        reference = network.features(train[0])
        for name, pictures in sets.items():
            row = {"features": kind, "set": name, "n": len(pictures)}
            row |= measure(network.features(pictures), reference)
            report["rows"].append(row)  # type: ignore[attr-defined]
            print(
                f"{kind:<8} {name:<30} N {row['n']:<5} FD {row['fd']:8.3f} +- {row['fd_interval']:<7.3f}"
                f" KID {row['kid']:8.4f} +- {row['kid_interval']:.4f}",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def read_folder(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Pictures (N, 3, H, W), uint8, their classes (N,), and the classes' names: the subfolders."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    pictures, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*.png")):
            pictures.append(np.asarray(Image.open(path).convert("RGB")))
            labels.append(label)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), names


class Features(nn.Module):
    """Four convolutions of stride 2, the mean over the picture, and a linear layer to the classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (N, 64) of pictures (N, 3, H, W) in [-1, 1]."""
        return self.layers(pictures).mean((2, 3))

    @torch.no_grad()
    def features(self, pictures: Tensor) -> np.ndarray:
        """Features (N, 64), float64, of 8-bit pictures."""
        parts = [self(to_float(part)) for part in pictures.split(256)]
        return torch.cat(parts).double().numpy()

    @torch.no_grad()
    def classify(self, pictures: Tensor) -> Tensor:
        """Classes (N,) of 8-bit pictures."""
        return torch.cat([self.head(self(to_float(part))) for part in pictures.split(256)]).argmax(1)


def to_float(pictures: Tensor) -> Tensor:
    """8-bit pictures in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def fit_classifier(pictures: Tensor, labels: Tensor, names: list[str], epochs: int) -> Features:
    """A network that names the class of a picture; seeded, so that the features are the same every time."""
    torch.manual_seed(0)
    network = Features(len(names))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    steps = epochs * (len(pictures) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(pictures) // BATCH) == 0:
            order = torch.randperm(len(pictures))
        start = step % (len(pictures) // BATCH) * BATCH
        rows = order[start : start + BATCH]
        batch = shift(to_float(pictures[rows]))
        loss = nn.functional.cross_entropy(network.head(network(batch)), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def shift(batch: Tensor) -> Tensor:
    """Shift the pictures by up to six pixels, and mirror half of the batches."""
    padded = nn.functional.pad(batch, (6, 6, 6, 6), value=1.0)
    top, left = torch.randint(0, 13, (2,)).tolist()
    moved = padded[..., top : top + batch.shape[-2], left : left + batch.shape[-1]]
    return moved.flip(-1) if bool(torch.rand(()) < 0.5) else moved


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of features."""

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> Moments:
        """Moments of rows."""
        return Moments(features.mean(0), np.cov(features, rowvar=False))


def frechet(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0, None)).sum()
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    return float(((a.mean - b.mean) ** 2).sum() + trace - 2 * cross)


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of rows."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(matrix: np.ndarray) -> float:
        return float((matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1)))

    return mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y)) - 2 * float(kernel(x, y).mean())


def jackknife(statistic: Callable[[np.ndarray], float], rows: np.ndarray) -> float:
    """Half the width of the 95 % interval of a statistic of rows, from leaving out one of 16 blocks at a time."""
    block = np.arange(len(rows)) % BLOCKS
    values = np.array([statistic(rows[block != left_out]) for left_out in range(BLOCKS)])
    return T_95 * float(np.sqrt((BLOCKS - 1) / BLOCKS * ((values - values.mean()) ** 2).sum()))


def measure(features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Both distances, with half the widths of their intervals; in units of the reference's mean and deviation."""
    center, scale = reference.mean(0), reference.std(0)
    features, reference = (features - center) / scale, (reference - center) / scale
    moments = Moments.of(reference)
    statistics: Iterable[tuple[str, Callable[[np.ndarray], float]]] = (
        ("fd", lambda rows: frechet(Moments.of(rows), moments)),
        ("kid", lambda rows: kernel_distance(rows, reference)),
    )
    result = {}
    for name, statistic in statistics:
        result |= {name: statistic(features), f"{name}_interval": jackknife(statistic, features)}
    return result


if __name__ == "__main__":
    sys.exit(main())
