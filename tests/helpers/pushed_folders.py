"""Folders as a push brings them to the Hub, without a Hub."""

from __future__ import annotations

from pathlib import Path

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.hub.push import _add_card_and_proof
from helpers.tiny import tiny_unet


def save_pushed_folder(folder: Path, num_train_timesteps: int) -> Path:
    """Save a small pipeline of one channel with its card, the card's images and the proof, and return the folder."""
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(num_train_timesteps)).save_pretrained(folder)
    (folder / "metrics.jsonl").write_text('{"step": 7}\n')
    _add_card_and_proof(folder, "alice/digits", None, True)
    return folder
