"""Run by test_saved_folders where this package cannot be imported: load every folder and id with stock Diffusers."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Blocker(MetaPathFinder):
    """Makes imports fail as if the package were not installed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Fail for this package, leave everything else to other finders."""
        if fullname.split(".")[0] == "diffusers_ddpm_ext":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main(folders: Path, stem: Path) -> None:
    """Load with every stock class, for every case, by directory and by Hub id."""
    sys.meta_path.insert(0, Blocker())
    from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
    from loading_cases import CASES, Findings, keys_of, repo_of

    findings = Findings()
    findings.error("import", lambda: __import__("diffusers_ddpm_ext"))
    for case in CASES:
        for source, place in (("folder", str(folders / case)), ("id", repo_of(case))):
            for name, loader in (("DDPMPipeline", DDPMPipeline), ("DiffusionPipeline", DiffusionPipeline)):
                pipeline = loader.from_pretrained(place)
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
        for loader in (DDPMPipeline, DiffusionPipeline):
            findings.error(f"learned/{source}/{loader.__name__}", lambda d=loader, p=place: d.from_pretrained(p))
        findings.error(f"learned/{source}/unet", lambda p=place: UNet2DModel.from_pretrained(p, subfolder="unet"))
    findings.write(stem)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
