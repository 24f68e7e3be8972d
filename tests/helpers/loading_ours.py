"""Run by test_saved_folders in a separate process: push every saved folder, and load each with this package."""

from __future__ import annotations

import sys
from pathlib import Path

from diffusers import DiffusionPipeline

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from helpers.loading_cases import CASES, Findings, repo_of


def main(folders: Path, stem: Path) -> None:
    """Push, then load by Hub id and by directory."""
    findings = Findings()
    for case in (*CASES, "learned"):
        folder, repo = folders / case, repo_of(case)
        by_folder = DDPMExtPipeline.from_pretrained(folder)
        by_folder.push_to_hub(repo)
        by_id = DDPMExtPipeline.from_pretrained(repo)
        for source, pipeline in (("folder", by_folder), ("id", by_id)):
            findings.pipeline(f"{case}/{source}", pipeline)
            findings.arrays[f"{case}/{source}/logvar"] = pipeline.logvar.numpy()
        for source, place in (("folder", folder), ("id", repo)):
            scheduler = DDPMExtScheduler.from_pretrained(place, subfolder="scheduler")
            findings.facts[f"{case}/{source}/scheduler"] = scheduler.to_json_string()
            generic = DiffusionPipeline.from_pretrained(place)
            findings.facts[f"{case}/{source}/generic"] = [type(generic).__name__, type(generic.scheduler).__name__]
    findings.write(stem)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
