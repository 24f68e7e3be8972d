"""The losses of a run as a picture, from the rows that it has written so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from diffusers_ddpm_ext.plotting.curves import Curve, plot_losses

CURVES: tuple[tuple[str, str, Literal["train", "raw", "ema"]], ...] = (
    ("train/loss_simple", "training", "train"),
    ("val/loss_simple", "validation, raw weights", "raw"),
    ("val/loss_simple_ema", "validation, EMA weights", "ema"),
)


def draw_curves(rows: list[dict[str, Any]], picture: Path, loss_type: str) -> Path | None:
    """Draw training and validation losses over optimizer steps.

    Args:
        rows: of ``metrics.jsonl``.
        picture: PNG to write.
        loss_type: what was minimised, for the axis.

    Returns:
        The path; None where no row has a loss.
    """
    curves = []
    for name, label, kind in CURVES:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            steps, values = zip(*points, strict=True)
            curves.append(Curve(label, steps, values, kind))
    return plot_losses(picture, curves, quantity=f"loss_simple ({loss_type})") if curves else None
