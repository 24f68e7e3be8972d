"""Tiny training runs with captions: pictures of three colors, and a text encoder of random weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from diffusers_ddpm_ext.training import trainer
from helpers.accelerate_state import reset_accelerate
from helpers.runs import tiny_run
from helpers.text_models import save_text_model

COLORS = ("red", "green", "blue")


def write_pictures(folder: Path, count: int = 30, captions: int = 2) -> Path:
    """Pictures of one color each, with that many captions in column ``text`` of metadata.jsonl; return the folder."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[..., number % 3] = generator.integers(150, 255, (8, 8))
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        color = COLORS[number % 3]
        texts = [color, f"a {color} cat"][:captions]
        lines.append(json.dumps({"file_name": f"{number:03}.png", "text": texts if captions > 1 else texts[0]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def caption_inputs(folder: Path) -> dict[str, Any]:
    """The options of a run with captions, whose images and text encoder are written into a folder."""
    return {
        "train_data_dir": str(write_pictures(folder / "pictures")),
        "text_encoder": str(save_text_model(folder / "encoder")),
        "caption_column": "text",
        "validation_fraction": 0.2,
        "conditioning_dropout": {"captions": 0.3},
        "checkpointing_steps": 2,
        "max_train_steps": 4,
        "validation_steps": 2,
        "max_grad_norm": 0.1,
        "ema_decay": 0.5,
        "seed": 3,
        "num_preview_images": 2,
        "ddpm_num_inference_steps": 2,
    }


def train(folder: Path, options: dict[str, Any], **more: Any) -> Path:
    """Train into a folder; return it."""
    reset_accelerate()
    trainer.train(tiny_run(folder, **options | more))
    return folder


def contents(folder: Path, step: int = 4) -> dict[str, str]:
    """Checksums of everything that a run has computed: checkpoint, metrics, pictures and the pipeline's weights."""
    names = [f"checkpoint-{step}/{name}.safetensors" for name in ("model", "ema", "optimizer")]
    paths = [folder / name for name in (*names, "metrics.jsonl")]
    paths += [*folder.glob("samples/*.png"), *folder.glob("samples.png")]
    paths += [path for path in folder.glob("*/*.safetensors") if path.parent.name in ("unet", "text_encoder")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def weights(folder: Path, name: str, step: int = 4) -> dict[str, Any]:
    """Tensors of a file of a checkpoint."""
    return load_file(folder / f"checkpoint-{step}" / f"{name}.safetensors")
