"""Sampling: our layouts and bfloat16, compared with stock Diffusers, and the quality of samples in bfloat16.

    python benchmarks/bench_sample.py [--rounds 5] [--quality FOLDER --num_samples 512] [--quick]

The reference is stock Diffusers' `DDPMPipeline` with the same network in float32. Our pipeline has the network as
`ddpm-ext sample` prepares it: in float32 with `--memory_format contiguous` and with its default, channels_last, and in
bfloat16. Each has a process of its own, with the settings that a script or the command has there, and one thread. All
take turns of the same steps; a ratio is the median over the turns, in seconds of the processor, with its quartiles. So
a busy machine slows all equally.

Quality (`--quality`, a trained pipeline, e.g. of the digits): the kernel distance of samples in bfloat16 to samples in
float32 of another seed, beside that of samples in float32 to the same ones, and both intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from subprocess import DEVNULL, PIPE

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.cli.process import tune_process
from diffusers_ddpm_ext.metrics.features import load_feature_extractor
from diffusers_ddpm_ext.metrics.intervals import Estimate
from diffusers_ddpm_ext.metrics.kernel_distance import estimate_kernel_distance
from diffusers_ddpm_ext.pipelines.acceleration import accelerate_network
from diffusers_ddpm_ext.pipelines.loading import load_pipeline
from diffusers_ddpm_ext.training.data.dataset import DIGITS_LEVELS
from diffusers_ddpm_ext.training.evaluation.samples import LevelImages, to_levels
from diffusers_ddpm_ext.utils.random_keys import generator

# side, widths, levels with attention, width of an attention head (None: one head)
Shape = tuple[int, tuple[int, ...], tuple[int, ...], int | None]
NETWORKS: dict[str, Shape] = {
    "14.7 M, 32 x 32": (32, (64, 128, 256), (1,), 8),
    "35.7 M, 32 x 32 (ddpm-cifar10-32)": (32, (128, 256, 256, 256), (1,), None),
    "25.3 M, 64 x 64": (64, (64, 128, 256, 256), (2,), 8),
}
QUICK: dict[str, Shape] = {"tiny, 8 x 8": (8, (32, 32), (1,), 8)}
LAYOUT_BATCHES, PRECISION_BATCH = (1, 4, 16), 16
STEPS = 50
THREADS = {"OMP_NUM_THREADS": "1"}


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


STOCK, CONTIGUOUS, LAST, HALF = "stock", "float32, contiguous", "float32", "bfloat16"
KINDS: dict[str, Callable[[UNet2DModel], DDPMPipeline]] = {
    STOCK: stock,
    CONTIGUOUS: lambda network: ours(network, torch.float32, "contiguous"),
    LAST: lambda network: ours(network, torch.float32, "channels_last"),
    HALF: lambda network: ours(network, torch.bfloat16, "channels_last"),
}


def serve(kind: str, shape: Shape, batch: int, steps: int) -> None:
    """Sample once per line of the input, and print the seconds of the processor."""
    if kind != STOCK:
        tune_process()
    torch.set_num_threads(1)
    pipeline = KINDS[kind](build_network(*shape))
    for _ in sys.stdin:
        start = time.process_time()
        pipeline(batch, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np")
        print(time.process_time() - start, flush=True)


def in_turns(kinds: Sequence[str], shape: Shape, batch: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor of each kind, by turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with contextlib.ExitStack() as processes:
        workers = {}
        for kind in kinds:
            words = [sys.executable, __file__, "--serve", json.dumps([kind, shape, batch, steps])]
            workers[kind] = processes.enter_context(
                subprocess.Popen(words, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, env=os.environ | THREADS)
            )
        for number in range(rounds + 1):
            for kind in sorted(kinds, reverse=bool(number % 2)):
                worker = workers[kind]
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                taken = worker.stdout.readline()
                if not taken:
                    raise SystemExit(f"error: the process of {kind} ended with status {worker.wait()}")
                if number:
                    seconds[kind].append(float(taken))
        for worker in workers.values():
            worker.communicate()
    return seconds


def spread(reference: Sequence[float], other: Sequence[float]) -> str:
    """Median and quartiles of the ratios of turns, as text."""
    ratios = [a / b for a, b in zip(reference, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def speed(networks: dict[str, Shape], rounds: int, steps: int) -> None:
    """Print the tables of layouts and precisions."""
    print(
        "| network | batch | stock, ms/step | stock / contiguous | stock / channels_last |"
        " contiguous / channels_last |\n|---|---|---|---|---|---|"
    )
    for name, shape in networks.items():
        for batch in LAYOUT_BATCHES:
            count = max(2, 16 // batch)
            taken = in_turns((STOCK, CONTIGUOUS, LAST), shape, batch, count, rounds)
            cells = [spread(taken[STOCK], taken[CONTIGUOUS]), spread(taken[STOCK], taken[LAST])]
            cells.append(spread(taken[CONTIGUOUS], taken[LAST]))
            first = 1000 * statistics.median(taken[STOCK]) / count
            print(f"| {name} | {batch} | {first:.0f} | {' | '.join(cells)} |", flush=True)
    print(
        f"\n| network, {steps} steps | batch | stock, ms/step | stock / float32 | stock / bfloat16 |"
        " float32 / bfloat16 |\n|---|---|---|---|---|---|"
    )
    for name, shape in networks.items():
        taken = in_turns((STOCK, LAST, HALF), shape, PRECISION_BATCH, steps, rounds)
        cells = [spread(taken[STOCK], taken[kind]) for kind in (LAST, HALF)] + [spread(taken[LAST], taken[HALF])]
        first = 1000 * statistics.median(taken[STOCK]) / steps
        print(f"| {name} | {PRECISION_BATCH} | {first:.0f} | {' | '.join(cells)} |", flush=True)


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
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one tiny network")
    options = parser.parse_args()
    if options.serve:
        serve(*json.loads(options.serve))
        return
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
