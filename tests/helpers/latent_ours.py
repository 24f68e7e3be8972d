"""Run by test_latent_folders in a separate process: push every latent folder, and draw from the repositories."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.models.first_stage import FirstStage, load_first_stage
from helpers.latent_folder_cases import CASES, pictures_of, repo_of


def main(folders: Path, stem: Path) -> None:
    """Push, then load by Hub id."""
    arrays: dict[str, Any] = {}
    for case in (*CASES, "ours"):
        pipeline = DDPMExtPipeline.from_pretrained(folders / case)
        pipeline.push_to_hub(repo_of(case))
        by_id = DDPMExtPipeline.from_pretrained(repo_of(case))
        arrays[f"{case}/id"] = pictures_of(by_id)
        arrays[f"{case}/generic"] = pictures_of(DiffusionPipeline.from_pretrained(repo_of(case)))
        stage = FirstStage(load_first_stage(repo_of(case)))
        assert stage.content_hash() == by_id.first_stage.content_hash()
    DDPMExtPipeline.from_pretrained(folders / "kl").push_to_hub("alice/replaced")
    DDPMExtPipeline.from_pretrained(folders / "pixels").push_to_hub("alice/replaced")
    np.savez(stem.with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
