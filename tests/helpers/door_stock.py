"""Run by test_doors in a process that cannot import this package: open every folder and id with stock Diffusers."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Blocker(MetaPathFinder):
    """As if the package were not installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Refuse ours, pass on everything else."""
        if fullname.split(".")[0] == "diffusers_ddpm_ext":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main(folders: Path, stem: Path) -> None:
    """Every stock door, for every case, by directory and by Hub id."""
    sys.meta_path.insert(0, Blocker())
    from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
    from door_cases import CASES, Findings, keys_of, repo_of

    findings = Findings()
    findings.error("import", lambda: __import__("diffusers_ddpm_ext"))
    for case in CASES:
        for source, place in (("folder", str(folders / case)), ("id", repo_of(case))):
            for name, door in (("DDPMPipeline", DDPMPipeline), ("DiffusionPipeline", DiffusionPipeline)):
                pipeline = door.from_pretrained(place)
                findings.pipeline(f"{case}/{source}/{name}", pipeline)
                if name == "DDPMPipeline":
                    pipeline.save_pretrained(folders.parent / "saved_by_stock" / source / case)
            scheduler = DDPMScheduler.from_pretrained(place, subfolder="scheduler")
            findings.facts[f"{case}/{source}/DDPMScheduler"] = keys_of(scheduler)
            findings.arrays[f"{case}/{source}/DDPMScheduler/betas"] = scheduler.betas.numpy()
            ddim = DDIMScheduler.from_pretrained(place, subfolder="scheduler")
            findings.arrays[f"{case}/{source}/DDIMScheduler/betas"] = ddim.betas.numpy()
            unet = UNet2DModel.from_pretrained(place, subfolder="unet")
            findings.facts[f"{case}/{source}/unet"] = unet.num_parameters()
    for source, place in (("folder", str(folders / "learned")), ("id", repo_of("learned"))):
        for door in (DDPMPipeline, DiffusionPipeline):
            findings.error(f"learned/{source}/{door.__name__}", lambda d=door, p=place: d.from_pretrained(p))
        findings.error(f"learned/{source}/unet", lambda p=place: UNet2DModel.from_pretrained(p, subfolder="unet"))
    findings.write(stem)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
