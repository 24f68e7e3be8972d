"""Run by test_latent_folders where this package cannot be imported: stock Diffusers draws from every latent folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from loading_stock import Blocker


def main(folders: Path, stem: Path) -> None:
    """Load by directory and by Hub id, with the pipeline's own class and the generic one."""
    sys.meta_path.insert(0, Blocker())
    from diffusers import DDPMPipeline, DiffusionPipeline, LDMPipeline
    from latent_folder_cases import CASES, pictures_of, repo_of

    arrays: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for case in CASES:
        for source, place in (("folder", str(folders / case)), ("id", repo_of(case))):
            for loader in (LDMPipeline, DiffusionPipeline):
                pipeline = loader.from_pretrained(place)
                facts[f"{case}/{source}/{loader.__name__}"] = [
                    type(part).__name__ for part in (pipeline, pipeline.vqvae)
                ]
                arrays[f"{case}/{source}/{loader.__name__}"] = pictures_of(pipeline)
        facts[f"{case}/DDPMPipeline"] = sorted(DDPMPipeline.from_pretrained(str(folders / case)).components)
    for name, loader in (("ours", DiffusionPipeline), ("ours", LDMPipeline)):
        try:
            loader.from_pretrained(str(folders / name))
            facts[f"{name}/{loader.__name__}"] = "opened"
        except Exception as error:
            facts[f"{name}/{loader.__name__}"] = f"{type(error).__name__}: {error}"
    stem.with_suffix(".json").write_text(json.dumps(facts))
    np.savez(stem.with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
