"""Images and histograms for Accelerate's trackers, which have a common interface for scalar values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NamedImages = Mapping[str, NDArray[np.uint8]]
Losses = NDArray[np.float64]
LOSSES_TAG = "train/loss_simple of steps"


def log_images_and_losses(
    trackers: Sequence[Any], images: Mapping[str, Path], losses: Sequence[float], step: int
) -> None:
    """Log images, and a histogram of the losses of single steps, to the trackers.

    Args:
        trackers: of Accelerate; those that support neither are skipped.
        images: files by name; missing files are skipped. Their tags begin with ``pictures/``, since a scalar may have
            the same name.
        losses: of the steps since the last call; without any there is no histogram.
        step: optimizer steps done.
    """
    pixels = {f"pictures/{name}": _read_pixels(path) for name, path in images.items() if path.is_file()}
    for tracker in trackers:
        log = TRACKER_LOGGERS.get(tracker.name)
        if log is not None:
            log(tracker, pixels, np.asarray(losses, dtype=np.float64), step)


def _read_pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _tensorboard(tracker: Any, images: NamedImages, losses: Losses, step: int) -> None:
    for name, pixels in images.items():
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
    if len(losses):
        tracker.writer.add_histogram(LOSSES_TAG, losses, global_step=step)


def _wandb(tracker: Any, images: NamedImages, losses: Losses, step: int) -> None:
    """For wandb, and trackio, which has the same interface."""
    module = import_module(tracker.name)
    media = {name: module.Image(pixels) for name, pixels in images.items()}
    tracker.log(media | ({LOSSES_TAG: module.Histogram(losses)} if len(losses) else {}), step=step)


def _comet(tracker: Any, images: NamedImages, losses: Losses, step: int) -> None:
    for name, pixels in images.items():
        tracker.writer.log_image(pixels, name=name, step=step)
    if len(losses):
        tracker.writer.log_histogram_3d(losses, name=LOSSES_TAG, step=step)


def _mlflow(tracker: Any, images: NamedImages, losses: Losses, step: int) -> None:
    """MLflow has no histograms: counts and edges are logged as a JSON artifact."""
    mlflow, run_id = import_module("mlflow"), tracker.active_run.info.run_id
    client = mlflow.MlflowClient()
    for name, pixels in images.items():
        client.log_image(run_id, pixels, key=name, step=step)
    if len(losses):
        counts, edges = np.histogram(losses, bins=min(64, len(losses)))
        table = {"step": step, "counts": counts.tolist(), "edges": edges.tolist()}
        client.log_dict(run_id, table, f"histograms/{LOSSES_TAG.replace(' ', '_')}-{step}.json")


def _swanlab(tracker: Any, images: NamedImages, losses: Losses, step: int) -> None:
    """SwanLab has no histograms."""
    tracker.log_images({name: [pixels] for name, pixels in images.items()}, step=step)


def _aim(tracker: Any, images: NamedImages, losses: Losses, step: int) -> None:
    tracker.log_images(dict(images), step=step)
    if len(losses):
        tracker.writer.track(import_module("aim").Distribution(losses), name=LOSSES_TAG, step=step)


def _clearml(tracker: Any, images: NamedImages, losses: Losses, step: int) -> None:
    tracker.log_images(dict(images), step=step)
    if len(losses):
        counts, edges = np.histogram(losses, bins=min(64, len(losses)))
        labels = [f"{edge:.3g}" for edge in edges[:-1]]
        tracker.task.get_logger().report_histogram("train", LOSSES_TAG, values=counts, iteration=step, xlabels=labels)


def _dvclive(tracker: Any, images: NamedImages, losses: Losses, step: int) -> None:
    """DVCLive saves images as files, here with the step in their names; it has no histograms."""
    for name, pixels in images.items():
        tracker.live.log_image(f"{name}-{step}.png", pixels)


TRACKER_LOGGERS: dict[str, Callable[[Any, NamedImages, Losses, int], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _wandb,
    "comet_ml": _comet,
    "mlflow": _mlflow,
    "swanlab": _swanlab,
    "aim": _aim,
    "clearml": _clearml,
    "dvclive": _dvclive,
}
