"""The bound of a batch compared with improved-diffusion's `calc_bpd_loop`: equal values, and the time they take.

    python benchmarks/bench_likelihood.py RUN_FOLDER --peer CHECKOUT [--rounds 3] [--batches 1 4 64]

CHECKOUT is a clone of openai/improved-diffusion, of which nothing is copied here. RUN_FOLDER is a digits run that
predicts v; for the reference, which does not support v, its network is wrapped to predict the noise. First both
evaluate the same images with the same noise in float64 (the reference's tables stay in float64 for that; it casts them
to float32, where 1 - abar loses four digits), with 8-bit bins and the reference's decoder. Then they alternate, in
float32, unmodified.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.diffusion.likelihood import bits_per_dim
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data


def load_peer(checkout: Path) -> Any:
    """Import improved-diffusion's module without its package's imports of MPI."""
    package = ModuleType("improved_diffusion")
    package.__path__ = [str(checkout / "improved_diffusion")]
    sys.modules["improved_diffusion"] = package
    from improved_diffusion import gaussian_diffusion

    return gaussian_diffusion


def peer_diffusion(peer: Any, scheduler: DDPMExtScheduler) -> Any:
    """The reference's diffusion with our betas, predicting the noise, with the posterior variance."""
    return peer.GaussianDiffusion(
        betas=np.array(scheduler.schedule.betas),
        model_mean_type=peer.ModelMeanType.EPSILON,
        model_var_type=peer.ModelVarType.FIXED_SMALL,
        loss_type=peer.LossType.RESCALED_MSE,
    )


class NoisePredictor:
    """The network as the reference calls it: from noisy images and timesteps to the predicted noise."""

    def __init__(self, unet: Any, scheduler: DDPMExtScheduler) -> None:
        abar = torch.from_numpy(np.array(scheduler.schedule.alphas_cumprod))
        self.unet, self.signal, self.noise = unet, abar.sqrt(), (1 - abar).sqrt()

    def __call__(self, xt: Tensor, t: Tensor) -> Tensor:
        v = self.unet(xt, t).sample
        shape = (-1, *(1,) * (xt.ndim - 1))
        return self.signal[t].to(xt).reshape(shape) * v + self.noise[t].to(xt).reshape(shape) * xt


def largest_difference(peer: Any, pipeline: DDPMExtPipeline, images: Tensor) -> float:
    """Largest difference of the totals and steps, in bits per dimension, with the same noise in float64."""
    scheduler = pipeline.scheduler
    unet, x0 = pipeline.unet.double(), images.double()
    diffusion, cast = peer_diffusion(peer, scheduler), peer._extract_into_tensor

    def in_double(table: Any, timesteps: Tensor, shape: Any) -> Tensor:
        values = torch.from_numpy(np.asarray(table)).to(timesteps.device)[timesteps].double()
        return values.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)

    peer._extract_into_tensor = in_double
    torch.manual_seed(0)
    theirs = diffusion.calc_bpd_loop(NoisePredictor(unet, scheduler), x0, clip_denoised=False)
    peer._extract_into_tensor = cast
    torch.manual_seed(0)
    noise = torch.stack([torch.randn_like(x0) for _ in range(len(scheduler.schedule))]).flip(0)
    ours = bits_per_dim(lambda x, t: unet(x, t).sample, scheduler, x0, noise=noise, decoder="improved_diffusion")
    pipeline.unet.float()
    steps = float((ours.steps.flip(1) - theirs["vb"]).abs().max())
    return max(steps, float((ours.total - theirs["total_bpd"]).abs().max()))


def main() -> int:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peer = load_peer(arguments.peer)
    pipeline = DDPMExtPipeline.from_pretrained(arguments.folder)
    config = dict(pipeline.scheduler.config) | {"v_posterior": None, "v_decoder": None, "variance_type": "fixed_small"}
    pipeline.scheduler = DDPMExtScheduler.from_config(config)
    pipeline.unet.eval()
    held_out = load_data(DataOptions(resolution=(8, 8))).validation
    assert held_out is not None
    images = held_out.pixels(torch.arange(max(arguments.batches)))
    difference = largest_difference(peer, pipeline, images[:2])
    print(f"largest difference on 2 images, float64: {difference:.2e} bits per dimension", flush=True)
    print("| images | calc_bpd_loop, s | bits_per_dim, s | reference / ours | single rounds |\n|---|---|---|---|---|")
    unet, scheduler = pipeline.unet, pipeline.scheduler
    diffusion, predictor = peer_diffusion(peer, scheduler), NoisePredictor(unet, scheduler)
    for count in arguments.batches:
        x0 = images[:count]
        times: list[tuple[float, float]] = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            with torch.no_grad():
                diffusion.calc_bpd_loop(predictor, x0, clip_denoised=False)
            middle = time.perf_counter()
            bits_per_dim(lambda x, t: unet(x, t).sample, scheduler, x0, decoder="improved_diffusion")
            times.append((middle - start, time.perf_counter() - middle))
        ratios = [theirs / ours for theirs, ours in times]
        theirs, ours = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {count} | {theirs:.2f} | {ours:.2f} | {statistics.median(ratios):.2f}x |"
            f" {min(ratios):.2f} to {max(ratios):.2f} |",
            flush=True,
        )
    return 0 if difference < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
