"""Pictures and histograms for those trackers that take them; numbers go to all (`records`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def show(trackers: Sequence[Any], pictures: Mapping[str, Path], losses: Sequence[float], step: int) -> None:
    """Hand pictures, and a histogram of single steps' losses, to the trackers.

    Args:
        trackers: of Accelerate.
        pictures: by the name that the tracker gives them; files that are missing are left out.
        losses: of the steps since the last call; none: no histogram.
        step: optimizer steps done.
    """
    images = {name: _pixels(path) for name, path in pictures.items() if path.is_file()}
    for tracker in trackers:
        if tracker.name == "tensorboard":
            for name, pixels in images.items():
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            if len(losses):
                tracker.writer.add_histogram("train/loss_simple of steps", np.asarray(losses), global_step=step)
        elif tracker.name == "wandb":
            wandb = import_module("wandb")
            tracker.log_images({name: [pixels] for name, pixels in images.items()}, step=step)
            if len(losses):
                tracker.log({"train/loss_simple of steps": wandb.Histogram(np.asarray(losses))}, step=step)
        elif getattr(tracker, "log_images", None) is not None:
            tracker.log_images({name: [pixels] for name, pixels in images.items()}, step=step)


def _pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)
