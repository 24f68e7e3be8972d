"""Pictures and histograms for the trackers; numbers go to all by Accelerate (`records`).

Accelerate's trackers agree on numbers only: each takes pictures in its own way, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pictures = Mapping[str, NDArray[np.uint8]]
Values = NDArray[np.float64]
LOSSES = "train/loss_simple of steps"


def log_images_and_losses(
    trackers: Sequence[Any], pictures: Mapping[str, Path], losses: Sequence[float], step: int
) -> None:
    """Hand pictures, and a histogram of single steps' losses, to the trackers.

    Args:
        trackers: of Accelerate.
        pictures: by name, before which the tracker gets ``pictures/``, for a number may have the same name; files
            that are missing are left out.
        losses: of the steps since the last call; none: no histogram.
        step: optimizer steps done.
    """
    images = {f"pictures/{name}": _pixels(path) for name, path in pictures.items() if path.is_file()}
    for tracker in trackers:
        hand_over = WAYS.get(tracker.name)
        if hand_over is not None:
            hand_over(tracker, images, np.asarray(losses, dtype=np.float64), step)


def _pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)


def _tensorboard(tracker: Any, images: Pictures, losses: Values, step: int) -> None:
    for name, pixels in images.items():
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
    if len(losses):
        tracker.writer.add_histogram(LOSSES, losses, global_step=step)


def _media(tracker: Any, images: Pictures, losses: Values, step: int) -> None:
    """wandb, and trackio, which speaks as wandb does."""
    kinds = import_module(tracker.name)
    media = {name: kinds.Image(pixels) for name, pixels in images.items()}
    tracker.log(media | ({LOSSES: kinds.Histogram(losses)} if len(losses) else {}), step=step)


def _comet(tracker: Any, images: Pictures, losses: Values, step: int) -> None:
    for name, pixels in images.items():
        tracker.writer.log_image(pixels, name=name, step=step)
    if len(losses):
        tracker.writer.log_histogram_3d(losses, name=LOSSES, step=step)


def _mlflow(tracker: Any, images: Pictures, losses: Values, step: int) -> None:
    """It has no histograms: counts and edges become a file of the run."""
    mlflow, run_id = import_module("mlflow"), tracker.active_run.info.run_id
    client = mlflow.MlflowClient()
    for name, pixels in images.items():
        client.log_image(run_id, pixels, key=name, step=step)
    if len(losses):
        counts, edges = np.histogram(losses, bins=min(64, len(losses)))
        table = {"step": step, "counts": counts.tolist(), "edges": edges.tolist()}
        client.log_dict(run_id, table, f"histograms/{LOSSES.replace(' ', '_')}-{step}.json")


def _swanlab(tracker: Any, images: Pictures, losses: Values, step: int) -> None:
    """It has no histograms."""
    tracker.log_images({name: [pixels] for name, pixels in images.items()}, step=step)


def _aim(tracker: Any, images: Pictures, losses: Values, step: int) -> None:
    tracker.log_images(dict(images), step=step)
    if len(losses):
        tracker.writer.track(import_module("aim").Distribution(losses), name=LOSSES, step=step)


def _clearml(tracker: Any, images: Pictures, losses: Values, step: int) -> None:
    tracker.log_images(dict(images), step=step)
    if len(losses):
        counts, edges = np.histogram(losses, bins=min(64, len(losses)))
        labels = [f"{edge:.3g}" for edge in edges[:-1]]
        tracker.task.get_logger().report_histogram("train", LOSSES, values=counts, iteration=step, xlabels=labels)


def _dvclive(tracker: Any, images: Pictures, losses: Values, step: int) -> None:
    """It keeps pictures as files, under their step; it has no histograms."""
    for name, pixels in images.items():
        tracker.live.log_image(f"{name}-{step}.png", pixels)


WAYS: dict[str, Callable[[Any, Pictures, Values, int], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _media,
    "trackio": _media,
    "comet_ml": _comet,
    "mlflow": _mlflow,
    "swanlab": _swanlab,
    "aim": _aim,
    "clearml": _clearml,
    "dvclive": _dvclive,
}
