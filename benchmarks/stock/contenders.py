"""The commands of both training scripts for the same pictures, network, batch, EMA and precision."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPT = "examples/unconditional_image_generation/train_unconditional.py"
NEVER = 10**9


@dataclass(frozen=True)
class Network:
    """A network and its batches.

    Attributes:
        name: in the tables.
        side: of the square color images, in pixels.
        widths: of the levels.
        attention: the level with self-attention.
        batch: images per step.
        layers: residual blocks per level.
        groups: of the group normalization.
    """

    name: str
    side: int
    widths: tuple[int, ...]
    attention: int
    batch: int
    layers: int = 2
    groups: int = 32

    @property
    def config(self) -> dict[str, object]:
        """Arguments of UNet2DModel."""
        levels, heads = len(self.widths), [level == self.attention for level in range(len(self.widths))]
        down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in heads]
        up = [name.replace("Down", "Up") for name in reversed(down)]
        return {
            "_class_name": "UNet2DModel", "sample_size": self.side, "in_channels": 3, "out_channels": 3,
            "layers_per_block": self.layers, "block_out_channels": self.widths[:levels], "down_block_types": down,
            "up_block_types": up, "norm_num_groups": self.groups,
        }  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What both scripts are to do.

    Attributes:
        network: and its batches.
        steps: optimizer steps.
        images: folder of pictures, one epoch of ``steps`` or more.
        precision: ``no`` or ``bf16``.
        launcher: start of the command, before the script.
    """

    network: Network
    steps: int
    images: Path
    precision: str = "no"
    launcher: tuple[str, ...] = (sys.executable,)


def save_images(folder: Path, side: int, count: int) -> None:
    """Save color PNG files of smooth shapes."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:06}.png")


def find_script(path: Path) -> Path:
    """The script in a checkout of Diffusers, or the file itself.

    Raises:
        SystemExit: neither is there.
    """
    script = path / SCRIPT if path.is_dir() else path
    if not script.is_file():
        sys.exit(f"error: {script} is not a file: name a checkout of huggingface/diffusers, or its {SCRIPT}")
    return script.resolve()


def has_torchvision() -> bool:
    """Whether torchvision is installed; where it is not, the reference gets a stand-in."""
    return importlib.util.find_spec("torchvision") is not None


def _shared(job: Job, output: Path) -> list[str]:
    config = job.images.with_suffix(".json")
    config.write_text(json.dumps(job.network.config))
    return [
        f"--train_data_dir={job.images}", f"--resolution={job.network.side}",
        f"--train_batch_size={job.network.batch}", f"--model_config_name_or_path={config}",
        f"--mixed_precision={job.precision}", f"--output_dir={output}", "--ddpm_num_inference_steps=2",
        "--eval_batch_size=4", "--lr_warmup_steps=5", "--random_flip", f"--checkpointing_steps={job.steps}",
        f"--cache_dir={output}-cache",
    ]  # fmt: skip


def stock_command(job: Job, script: Path, output: Path) -> list[str]:
    """Start of `train_unconditional.py` for one epoch, with EMA, one checkpoint, 4 pictures and the pipeline."""
    return [*job.launcher, str(script), *_shared(job, output), "--use_ema", "--num_epochs=1"]


def our_command(job: Job, output: Path, *options: str) -> list[str]:
    """Start of `training/train.py` for the same steps, checkpoint, pictures and pipeline."""
    steps = [f"--max_train_steps={job.steps}", "--num_preview_images=4", "--validation_fraction=0"]
    return [*job.launcher, str(ROOT / "training" / "train.py"), *_shared(job, output), *steps, *options]


def environment(threads: int | None, stock: bool) -> dict[str, str]:
    """Environment of a script: ``threads`` of OpenMP, None for its own choice; no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    kept |= {"PYTHONPATH": str(HERE / "hooks"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    kept |= {"STAND_IN": str(HERE / "stand_in")} if stock and not has_torchvision() else {}
    return kept | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
