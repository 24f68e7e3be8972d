"""A feature extractor for a set with classes: a small network that names them, as a TorchScript file.

Trained for less than a minute on the set's training images, with a fixed seed. Its numbers can be compared with each
other only; none of them is "the FID".
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

DISTANCES = Path(__file__).resolve().parents[1] / "latents" / "distances.py"
EPOCHS = 25


class Extractor(nn.Module):
    """Features (N, 64) of images (N, C, H, W) in [-1, 1], in units of their deviation over the training images."""

    def __init__(self, network: nn.Module, center: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("center", center)
        self.register_buffer("scale", scale)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        scaled: Tensor = (self.network(images) - self.center) / self.scale
        return scaled


def read_images(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, C, H, W) in [-1, 1], their classes (N,), and the classes' names: the subfolders."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    images, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((folder / name).iterdir()):
            array = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path).convert("RGB"))
            images.append(torch.from_numpy(array / np.iinfo(array.dtype).max * 2 - 1).float().permute(2, 0, 1))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels), names


def save_extractor(data: Path, path: Path) -> float:
    """Train the network on ``data/train`` and write it to ``path``; return its accuracy on ``data/held_out``."""
    spec = importlib.util.spec_from_file_location("gallery_distances", DISTANCES)
    assert spec is not None
    assert spec.loader is not None
    distances = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(distances)
    images, labels, names = read_images(data / "train")
    levels = ((images + 1) * 127.5).round().to(torch.uint8)
    network = distances.fit_classifier(levels, labels, names, EPOCHS)
    held_out, classes, _ = read_images(data / "held_out")
    with torch.no_grad():
        features = torch.cat([network(part) for part in images.split(256)])
        extractor = Extractor(network, features.mean(0), features.std(0)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which --feature_extractor takes
            warnings.simplefilter(
                "ignore", torch.jit.TracerWarning
            )  # of group normalization's check of the batch size
            torch.jit.trace(extractor, images[:2]).save(str(path))
        answers = torch.cat([network.head(network(part)) for part in held_out.split(256)]).argmax(1)
    return float((answers == classes).float().mean())
