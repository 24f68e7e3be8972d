"""A first stage and images for tests of the cache of latents; as a script, one process of a build.

python cache_cases.py CACHE FAIL_AT
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import torch
from diffusers import AutoencoderKL

from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.training.data.augmentation import NO_AUGMENTATION, Augmentation
from diffusers_ddpm_ext.training.data.dataset import ImageData
from diffusers_ddpm_ext.training.data.image_set import ImageSet
from diffusers_ddpm_ext.training.data.image_store import PackedImages

COUNT, HELD_OUT, SIZE = 6, 2, 8
RECORD = 16 + 2 * 4 * (SIZE // 2) ** 2 * 4  # bytes


def make_stage(seed: int = 0, **config: object) -> FirstStage:
    """A small autoencoder with random weights."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        3,
        3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        **config,
    )
    return FirstStage(vae.eval())


def make_data(
    seed: int = 0, flips: bool = True, size: tuple[int, int] = (SIZE, SIZE), **augmentation: bool
) -> ImageData:
    """Images of noise, some of them held out."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for _ in range(COUNT)]
    store = PackedImages(images, f"images of seed {seed}")
    rows = torch.randperm(COUNT, generator=generator)
    train = ImageSet(
        store,
        rows[HELD_OUT:],
        (SIZE, SIZE),
        augmentation=Augmentation(flips, **augmentation),
        names=[f"{i}.png" for i in range(COUNT)],
    )
    return ImageData(
        train, replace(train, rows=rows[:HELD_OUT], augmentation=NO_AUGMENTATION), "images", "fingerprint"
    )


def main() -> None:
    """Build the cache; a process kills itself after ``FAIL_AT`` images."""
    from accelerate import Accelerator

    from diffusers_ddpm_ext.training import distributed
    from diffusers_ddpm_ext.training.data.latent_cache import cache_latents
    from diffusers_ddpm_ext.training.data.latents import LatentEncoder

    parent, fail_at = sys.argv[1], int(sys.argv[2])
    distributed.EXIT_DELAY = 1
    accelerator = distributed.make_accelerator("no", 1, [])
    assert isinstance(accelerator, Accelerator)
    stage, encoded = make_stage(), []
    original = stage.posterior

    def posterior(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if pixels.any():
            if fail_at and len(encoded) == fail_at and accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            encoded.append(1)
        return original(pixels)

    stage.posterior = posterior  # type: ignore[method-assign]
    cache_latents(parent, "float32", make_data(), LatentEncoder(stage, 0), accelerator)
    sys.stdout.write(f"encoded={len(encoded)}\n")
    sys.stdout.flush()
    distributed.leave_process_group()


if __name__ == "__main__":
    main()
