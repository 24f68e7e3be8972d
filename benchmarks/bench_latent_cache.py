"""Time of training steps in latents with and without `--cache_latents`.

The same run twice, from the same seed: once every image is encoded in every step, once the latents
are read from the cache, as in every epoch after the build. Both take the same steps alternately, one thread, and their
losses must be equal to the bit. The table has the whole step, network included, and the part from images to latents.

    python benchmarks/bench_latent_cache.py [--rounds 8]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.batches import Batch
from diffusers_ddpm_ext.training.loop.latents import open_latent_cache
from diffusers_ddpm_ext.training.loop.setup import Setup, build_setup
from diffusers_ddpm_ext.training.loop.step import train_step
from diffusers_ddpm_ext.training.trainer import open_batches

NUM_IMAGES = 24


@dataclass(frozen=True)
class Case:
    """A first stage and a network of latents."""

    name: str
    widths: tuple[int, ...]
    layers: int
    size: int
    unet_widths: tuple[int, ...]
    batch: int


CASES = (
    Case("f4, 32 x 32 to 8 x 8", (64, 128, 128), 2, 32, (32, 64), 8),
    Case("f8 of Stable Diffusion, 64 x 64 to 8 x 8", (128, 256, 512, 512), 2, 64, (64, 128), 4),
)


def save_inputs(case: Case, folder: Path) -> None:
    """Save an autoencoder with random weights, and images of noise."""
    (folder / "images").mkdir()
    for index in range(NUM_IMAGES):
        levels = np.random.default_rng(index).integers(0, 256, (case.size, case.size, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / "images" / f"{index}.png")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(case.widths),
        up_block_types=("UpDecoderBlock2D",) * len(case.widths),
        block_out_channels=case.widths,
        layers_per_block=case.layers,
        latent_channels=4,
        scaling_factor=1.0,
    ).save_pretrained(folder / "vae")


def make_setup(case: Case, folder: Path, **options: Any) -> Setup:
    """A run, before its first step."""
    config = {
        "vae": str(folder / "vae"), "train_data_dir": str(folder / "images"), "resolution": case.size,
        "train_batch_size": case.batch, "random_flip": True, "block_out_channels": list(case.unet_widths),
        "attention_levels": [], "layers_per_block": 1, "norm_num_groups": 32, "max_train_steps": 10**6,
        "report_to": "none",
    }  # fmt: skip
    return build_setup(TrainConfig.from_flat(config | options))


class LatentsAlone:
    """Encodes the batches of a run without training."""

    def __init__(self, setup: Setup) -> None:
        assert setup.latents is not None
        self.encoder, self.batches = setup.latents, open_batches(setup, 0)

    def step(self) -> float:
        """Latents of the next batch, as their sum."""
        return float(self.encoder.encode_batch(next(self.batches)).pixels.sum())


class WholeSteps:
    """Trains."""

    def __init__(self, setup: Setup) -> None:
        setup.task.train()
        self.setup, self.steps = setup, itertools.count()
        self.batches: Iterator[Batch] = open_batches(setup, 0)

    def step(self) -> float:
        """The loss of the next step."""
        return float(train_step(self.setup, next(self.steps), self.batches).outputs[0].loss.detach())


def compare(encoding: WholeSteps | LatentsAlone, cached: WholeSteps | LatentsAlone, rounds: int) -> list[float]:
    """Median milliseconds of a step of both, and the median ratio of the rounds."""
    encoding.step()
    cached.step()
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        results = []
        for is_cached in (False, True) if number % 2 else (True, False):
            start = time.perf_counter()
            results.append((cached if is_cached else encoding).step())
            times[is_cached].append(1000 * (time.perf_counter() - start))
        if results[0] != results[1]:
            raise SystemExit(f"the two differ: {results}")
    ratios = [a / b for a, b in zip(times[False], times[True], strict=True)]
    return [statistics.median(values) for values in (times[False], times[True], ratios)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_inputs(case, folder)
            setups = make_setup(case, folder), make_setup(case, folder, cache_latents=str(folder / "cache"))
            start = time.perf_counter()
            setups = setups[0], open_latent_cache(setups[1])
            build = time.perf_counter() - start
            for what, kind in (("images to latents", LatentsAlone), ("whole step", WholeSteps)):
                encoding, cached, ratio = compare(kind(setups[0]), kind(setups[1]), rounds)
                per_image = 1000 * build / (2 * len(setups[1].data.train) + 2 * len(setups[1].data.validation or []))
                rows.append(
                    f"| {case.name} | {what} | {encoding:.1f} | {cached:.2f} | {ratio:.1f}x | {per_image:.1f} |"
                )
    print("\n| first stage | | encoding, ms | cached, ms | encoding / cached | building the cache, ms per image |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
