"""Steps per second and fraction of the device's peak: `train_unconditional.py`, ours, and ours compiled, in bfloat16.

    python benchmarks/gpu/rates.py OUT [CHECKOUT_OR_SCRIPT]

All scripts start at once, stop themselves after their first steps, and then take turns, so that start-up and
compilation are left out. The last turn is not timed: it counts the operations that wait for the device, by torch's
debug mode. FLOPs are those of forward and backward by `torch.utils.flop_counter`; the peak is the rate of a large
matrix multiplication, measured here, and for known cards the published one.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from common import TINY, arguments, device, device_name, seconds, write
from diffusers import UNet2DModel
from stock.contenders import (
    NEVER,
    Job,
    Network,
    environment,
    find_script,
    has_torchvision,
    our_command,
    save_images,
    stock_command,
)
from stock.processes import Script, Turn
from torch.utils.flop_counter import FlopCounterMode

NETWORKS = (
    (Network("32 x 32, 128 images", 32, (128, 256, 256, 256), 1, 128), 20),
    (Network("64 x 64, 64 images", 64, (128, 256, 384, 512), 2, 64), 10),
    (Network("256 x 256, 16 images", 256, (128, 128, 256, 256, 512, 512), 4, 16), 5),
)
TURNS = 4
START_SECONDS = 90 * int(os.environ.get("GPU_TIME_SCALE", "1"))
PUBLISHED = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
"""Dense bfloat16 FLOP/s of NVIDIA's data sheets (SXM where there are several)."""


def flops_per_step(network: Network) -> float:
    """FLOPs of forward and backward of one step, counted without memory or computation."""
    with torch.device("meta"):
        model = UNet2DModel.from_config(network.config)
        images = torch.zeros(1, 3, network.side, network.side)
        counter = FlopCounterMode(display=False)
        with counter:
            model(images, torch.zeros(1)).sample.sum().backward()
    return float(counter.get_total_flops() * network.batch)


def matmul_rate() -> float:
    """FLOP/s of a large matrix multiplication in bfloat16."""
    size = 8192 if torch.cuda.is_available() else 512
    a = torch.randn(size, size, device=device(), dtype=torch.bfloat16)
    return float(2 * size**3 / min(seconds(lambda: a @ a, 10)))


def contenders(job: Job, script: Path | None, folder: Path) -> dict[str, list[str]]:
    """The commands; without a GPU nothing is compiled, which would take minutes."""
    commands = {} if script is None else {"stock": stock_command(job, script, folder / "stock")}
    commands["eager"] = our_command(job, folder / "eager")
    if torch.cuda.is_available():
        commands["compiled"] = our_command(job, folder / "compiled", "--torch_compile")
    return commands


def start(stack: ExitStack, network: Network, steps: int, script: Path | None, folder: Path) -> dict[str, Script]:
    """Start every script of a network."""
    save_images(folder / "images", network.side, ((TURNS + 3) * steps + 1) * network.batch)
    job = Job(network, NEVER, folder / "images", "bf16")
    return {
        name: stack.enter_context(
            Script(command, environment(1, name == "stock"), folder / f"{name}-log", steps, (TURNS + 2) * steps)
        )
        for name, command in contenders(job, script, folder).items()
    }


def drop_late(scripts: dict[str, Script], end: float) -> list[str]:
    """Wait for the first turns, which are the scripts' starts; those that are not ready at ``end`` are killed."""
    late = []
    for name, script in scripts.items():
        try:
            script.turn(max(0.0, end - time.monotonic()))
        except TimeoutError:
            script.end()
            late.append(name)
    return late


def take_turns(scripts: dict[str, Script]) -> dict[str, list[Turn]]:
    """Timed turns of every script, and a last one that counts waits."""
    turns: dict[str, list[Turn]] = {name: [] for name in scripts}
    for number in range(TURNS + 1):
        for name in sorted(scripts, reverse=bool(number % 2)):
            turns[name].append(scripts[name].turn())
    return turns


def rows_of(
    network: Network, steps: int, turns: dict[str, list[Turn]], peak: float, published: float | None
) -> list[dict[str, object]]:
    """Rows of the table; None where something was not measured."""
    flops, rows = flops_per_step(network), []
    for kind, measured in turns.items():
        rate = steps / statistics.median(turn.wall for turn in measured[:-1])
        pairs = zip(turns.get("stock", [])[:-1], measured[:-1], strict=False)
        ratios = [stock.wall / ours.wall for stock, ours in pairs]
        rows.append(
            {
                "network": network.name,
                "kind": kind,
                "steps_per_second": rate,
                "images_per_second": rate * network.batch,
                "of_matmul": rate * flops / peak,
                "of_published": None if published is None else rate * flops / published,
                "waits_per_step": measured[-1].syncs / steps if torch.cuda.is_available() else None,
                "ratio_to_stock": statistics.median(ratios) if ratios else None,
            }
        )
    return rows


def main() -> None:
    """Write rates, fractions and waits after each network, so that a time limit leaves the smaller ones."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: out of time"))  # the scripts are killed on the way out
    args = arguments(__doc__, "script")
    script = None if args.script is None else find_script(args.script)
    networks = NETWORKS if torch.cuda.is_available() else ((TINY, 2),)
    peak = matmul_rate()
    published = next((rate for name, rate in PUBLISHED.items() if name in device_name()), None)
    stand_in = script is not None and not has_torchvision()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        started = [
            (network, steps, start(stack, network, steps, script, Path(name) / str(number)))
            for number, (network, steps) in enumerate(networks)
        ]
        end, left_out = time.monotonic() + START_SECONDS, []
        for network, _, scripts in started:  # nothing is timed while another script still starts or compiles
            late = drop_late(scripts, end)
            left_out += [f"{network.name}, {name}" for name in late]
            for name in late:
                del scripts[name]
        for network, steps, scripts in started:
            rows += rows_of(network, steps, take_turns(scripts), peak, published)
            complete = len(rows) == sum(len(others) for _, _, others in started)
            facts = {"matmul_flops": peak, "published_flops": published, "stand_in": stand_in, "left_out": left_out}
            write(args.out, complete, rows=rows, **facts)


if __name__ == "__main__":
    main()
