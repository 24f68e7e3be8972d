"""Latent pipelines whose folders stock Diffusers must open, and what is drawn from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

MEAN, STD = [0.25, -1.5, 0.0, 0.75], [0.5, 2.0, 1.25, 0.3]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("kl", {"scaling_factor": 0.18215}),
    "kl_stats": ("kl", {"scaling_factor": 1.0, "latents_mean": MEAN, "latents_std": STD}),
    "kl_shift": (
        "kl",
        {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "vq": ("vq", {"scaling_factor": 0.6}),
    "vq_shift": ("vq", {"scaling_factor": 0.6}),
    "tiny": ("tiny", {}),
    "tiny_std": ("tiny", {"scaling_factor": 1.0}),
    "dc": ("dc", {"scaling_factor": 0.4}),
}
"""Kind of the first stage, and its configuration."""
LATER = {"vq_shift": {"latents_mean": MEAN, "latents_std": [0.5] * 4}, "tiny_std": {"latents_std": [2.0] * 4}}
"""Written into the configuration afterwards, since the class has no such argument."""
STEPS = 5


def repo_of(case: str) -> str:
    """Hub id of a case."""
    return f"alice/latent-{case.replace('_', '-')}"


def pictures_of(pipeline: Any) -> np.ndarray:
    """Two pictures of a few steps, always from the same noise of the global generator."""
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(11)
    return pipeline(2, num_inference_steps=STEPS, output_type="np").images
