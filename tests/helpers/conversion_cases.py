"""Checkpoints for the tests of conversion: recorded ones, and generated ones of every architecture."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from helpers.paths import GOLDEN

FOLDER = GOLDEN / "h_ckpt"
CASES = {case["id"]: case for case in json.loads((FOLDER / "index.json").read_text())["cases"]}
CASES_WITH_CHECKPOINT = sorted(path.stem for path in FOLDER.glob("*.ckpt"))
BASE: dict[str, Any] = {
    "image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1,
    "attention_resolutions": [2], "channel_mult": [1, 2], "num_heads": 1,
}  # fmt: skip
CROSS = {"use_spatial_transformer": True, "context_dim": 24}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads over widths": {"num_heads": 8, "attention_resolutions": [1, 2]},
    "other heads in the up blocks": {"num_heads": 2, "num_heads_upsample": 4, "attention_resolutions": [1, 2]},
    "channels per head": {"num_heads": -1, "num_head_channels": 16, "attention_resolutions": [1, 2]},
    "new order": {"num_heads": 4, "use_new_attention_order": True},
    "resnets resample": {"use_scale_shift_norm": True, "resblock_updown": True, "attention_resolutions": [1]},
    "classes": {"num_classes": 7},
    "continuous": {"num_classes": "continuous"},
    "sequential": {"num_classes": "sequential", "adm_in_channels": 5},
    "cross": CROSS | {"num_heads": 4},
    "cross, linear": CROSS | {"num_heads": -1, "num_head_channels": 16, "use_linear_in_transformer": True},
    "cross, classes": CROSS | {"num_classes": 7, "num_heads": 2, "disable_self_attentions": [True, False]},
    "concat": {"in_channels": 5},
}


def unet_params(case: str) -> dict[str, Any]:
    """Arguments of UNetModel in a recorded case."""
    params: dict[str, Any] = content(case)["model"]["params"]["unet_config"]["params"]
    return params


def content(case: str) -> dict[str, Any]:
    """The YAML file of a recorded case."""
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / f"{case}.yaml").read_text())
    return loaded


def recorded(case: str) -> dict[str, Tensor]:
    """Inputs and outputs of a recorded case."""
    with np.load(FOLDER / f"{case}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@torch.no_grad()
def run(network: nn.Module, arrays: dict[str, Tensor]) -> Tensor:
    """Outputs of a converted network for recorded inputs."""
    x = torch.cat([arrays[name] for name in ("x", "concat") if name in arrays], dim=1)
    names = {"encoder_hidden_states": "context", "class_labels": "y"}
    out: Tensor = network(x, arrays["t"], **{ours: arrays[key] for ours, key in names.items() if key in arrays}).sample
    return out


def random_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that no zero-initialized layer hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval()
