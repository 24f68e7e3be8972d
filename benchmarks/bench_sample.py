"""Sampling: the layout channels_last, bfloat16 and the quality of its samples, compared with contiguous float32.

    python benchmarks/bench_sample.py [--rounds 5] [--quality FOLDER --num_samples 512] [--quick]

The reference is stock Diffusers' `DDPMPipeline` with the same network in contiguous float32, beside our pipeline with
it. All take turns of the same steps, from the same noise, in one process and with one thread; the ratio is the median
over the turns, in seconds of the processor, with its quartiles. So a busy machine slows all equally.

Quality (`--quality`, a trained pipeline, e.g. of the digits): the kernel distance of samples in bfloat16 to samples in
float32 of another seed, beside that of samples in float32 to the same ones, and both intervals.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.metrics.features import load_feature_extractor
from diffusers_ddpm_ext.metrics.intervals import Estimate
from diffusers_ddpm_ext.metrics.kernel_distance import estimate_kernel_distance
from diffusers_ddpm_ext.pipelines.acceleration import accelerate_network
from diffusers_ddpm_ext.pipelines.loading import load_pipeline
from diffusers_ddpm_ext.training.data.dataset import DIGITS_LEVELS
from diffusers_ddpm_ext.training.evaluation.samples import LevelImages, to_levels
from diffusers_ddpm_ext.utils.random_keys import generator

# name -> side, widths, levels with attention, width of an attention head (None: one head)
NETWORKS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int | None]] = {
    "14.7 M, 32 x 32": (32, (64, 128, 256), (1,), 8),
    "35.7 M, 32 x 32 (ddpm-cifar10-32)": (32, (128, 256, 256, 256), (1,), None),
    "25.3 M, 64 x 64": (64, (64, 128, 256, 256), (2,), 8),
}
QUICK: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int | None]] = {"tiny, 8 x 8": (8, (32, 32), (1,), 8)}
LAYOUT_BATCHES, PRECISION_BATCH = (1, 4, 16), 16
STEPS = 50


def build_network(side: int, widths: Sequence[int], attention: Sequence[int], head: int | None) -> UNet2DModel:
    """A network of Diffusers with random weights."""
    torch.manual_seed(0)
    levels = range(len(widths))
    return UNet2DModel(
        sample_size=side,
        block_out_channels=tuple(widths),
        attention_head_dim=head,
        down_block_types=tuple("AttnDownBlock2D" if i in attention else "DownBlock2D" for i in levels),
        up_block_types=tuple("AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(levels)),
    ).eval()


def ours(network: UNet2DModel, dtype: torch.dtype, memory_format: str) -> DDPMExtPipeline:
    """Our pipeline with a copy of a network, in a precision and a layout."""
    pipeline = DDPMExtPipeline(copy.deepcopy(network), DDPMExtScheduler()).to(dtype)
    accelerate_network(pipeline, memory_format, compiled=False)  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock(network: UNet2DModel) -> DDPMPipeline:
    """Stock Diffusers with the same network."""
    pipeline = DDPMPipeline(network, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor of each call, by turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in sorted(calls, reverse=bool(number % 2)):
            start = time.process_time()
            calls[name]()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def spread(reference: Sequence[float], other: Sequence[float]) -> str:
    """Median and quartiles of the ratios of turns, as text."""
    ratios = [a / b for a, b in zip(reference, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def compare(network: UNet2DModel, batch: int, steps: int, rounds: int, names: Sequence[str]) -> list[str]:
    """Seconds per step in float32, and the ratios to it of our pipeline by ``names`` and of stock / ours."""
    pipelines = {
        "float32": ours(network, torch.float32, "contiguous"),
        "float32, channels_last": ours(network, torch.float32, "channels_last"),
        "bfloat16": ours(network, torch.bfloat16, "contiguous"),
        "bfloat16, channels_last": ours(network, torch.bfloat16, "channels_last"),
        "stock": stock(network),
    }
    calls: dict[str, Callable[[], object]] = {}
    for name in ("float32", *names):
        call = pipelines[name]
        calls[name] = lambda call=call: call(  # type: ignore[misc]
            batch, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np"
        )
    seconds = in_turns(calls, rounds)
    first = statistics.median(seconds["float32"]) / steps
    return [f"{1000 * first:.0f}", *(spread(seconds["float32"], seconds[name]) for name in names)]


def speed(
    networks: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int | None]], rounds: int, steps: int
) -> None:
    """Print the tables of layouts and precisions."""
    print("| network | batch | float32, ms/step | channels_last | stock |\n|---|---|---|---|---|")
    for name, shape in networks.items():
        for batch in LAYOUT_BATCHES[: 3 if shape[0] < 64 else 2]:
            row = compare(
                build_network(*shape), batch, max(2, 16 // batch), rounds, ["float32, channels_last", "stock"]
            )
            print(f"| {name} | {batch} | {' | '.join(row)} |", flush=True)
    names = ["bfloat16", "bfloat16, channels_last"]
    print(f"\n| network, {steps} steps | batch | float32, ms/step | {' | '.join(names)} |\n|---|---|---|---|---|")
    for name, shape in networks.items():
        row = compare(build_network(*shape), PRECISION_BATCH, steps, rounds, names)
        print(f"| {name} | {PRECISION_BATCH} | {' | '.join(row)} |", flush=True)


def draw(folder: str, dtype: str, seed: int, count: int, steps: int) -> torch.Tensor:
    """Features of samples of a trained pipeline of the digits, (N, D)."""
    pipeline = load_pipeline(folder, None, torch.device("cpu"), dtype)
    accelerate_network(pipeline, None, compiled=False)
    pixels = [
        pipeline(
            len(part),
            generator=[generator("sample", seed, i) for i in part],
            num_inference_steps=steps,
            output_type="pt",
        ).images.float()
        for part in (range(start, min(start + 64, count)) for start in range(0, count, 64))
    ]
    images = LevelImages(to_levels(torch.cat(pixels) * 2 - 1, DIGITS_LEVELS), DIGITS_LEVELS)
    extractor = load_feature_extractor("digits", torch.device("cpu"))
    return extractor(images.pixels(range(count)))


def quality(folder: str, count: int, steps: int, seeds: Sequence[int] = (1, 2, 3)) -> None:
    """Print the kernel distances of samples in both precisions to those in float32 of seed 0."""
    reference = draw(folder, "float32", 0, count, steps)
    print(
        f"\n| kernel distance to float32, seed 0; {count} samples, {steps} steps | float32 | bfloat16 |\n|---|---|---|"
    )
    for seed in seeds:
        cells = []
        for dtype in ("float32", "bfloat16"):
            each: Estimate = estimate_kernel_distance(draw(folder, dtype, seed, count, steps), reference, 0.95, 0)
            cells.append(f"{each.value:+.4f} ({each.low:+.4f} to {each.high:+.4f})")
        print(f"| seed {seed} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the comparison of precisions and of quality")
    parser.add_argument("--network", help="only networks whose name has this text")
    parser.add_argument(
        "--quality", metavar="FOLDER", help="a trained pipeline of the digits; nothing else is measured"
    )
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="one tiny network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quality:
        quality(options.quality, options.num_samples, options.steps)
        return
    networks = {name: shape for name, shape in NETWORKS.items() if (options.network or "") in name}
    if not networks:
        parser.error(f"--network {options.network}: it is in none of {', '.join(NETWORKS)}")
    speed(QUICK if options.quick else networks, options.rounds, options.steps)


if __name__ == "__main__":
    main()
