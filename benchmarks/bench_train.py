"""The whole training script, compared with Diffusers' real `train_unconditional.py`, which is not changed.

    python benchmarks/bench_train.py CHECKOUT_OR_SCRIPT [--quick] [--json FILE]

CHECKOUT_OR_SCRIPT is a clone of huggingface/diffusers, or the script. Both get the same pictures (PNG files of a
folder), network, batch, precision and random flips, both with EMA, TensorBoard, one checkpoint, four sampled pictures
and the saved pipeline, and otherwise their own defaults. Where torchvision is not installed, the reference's process
gets a stand-in for its transforms (`stock/stand_in`).

Steps: both scripts run at the same time and take turns of a few steps each, while the other one is stopped; a hook of
torch after each optimizer step is the clock (`stock/hooks`). So start-up is left out and other load slows both. The
ratio is the median over pairs of turns, with its quartiles, in seconds and in seconds of the processor.

    equal threads: one thread each, four networks; the third is that of DDPM for CIFAR-10 (Ho et al. 2020).
    as launched: `accelerate launch SCRIPT` with all cores, each with the threads it chooses, the largest network.

Whole: runs of 10 steps and longer ones from start to end, one after the other in turns: seconds, seconds of the
processor, and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

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
from stock.processes import Script, Turn, run_whole

NETWORKS = (
    Network("4.0 M, 64 x 3 x 8 x 8", 8, (64, 128), 1, 64),
    Network("14.7 M, 8 x 3 x 32 x 32", 32, (64, 128, 256), 1, 8),
    Network("35.7 M, 4 x 3 x 32 x 32", 32, (128, 256, 256, 256), 1, 4),
    Network("25.3 M, 2 x 3 x 64 x 64", 64, (64, 128, 256, 256), 2, 2),
)
QUICK = (Network("0.1 M, 8 x 3 x 8 x 8", 8, (16, 32), 1, 8, layers=1, groups=8),)
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def spread(values: Sequence[float], unit: str = "x") -> str:
    """Median and quartiles as text."""
    middle, low, high = quartiles(values)
    return f"{middle:.2f}{unit} ({low:.2f} to {high:.2f})"


def compare_steps(
    script: Path, network: Network, turns: int, steps: int, threads: int | None, folder: Path
) -> dict[str, object]:
    """Steps of both scripts in turns; ``threads`` None starts both with `accelerate launch`."""
    images, total = folder / "images", (turns + 2) * steps
    save_images(images, network.side, (total + 1) * network.batch)
    job = Job(network, NEVER, images, launcher=(sys.executable,) if threads else LAUNCH)
    commands = {"stock": stock_command(job, script, folder / "stock"), "ours": our_command(job, folder / "ours")}
    times: dict[str, list[Turn]] = {"stock": [], "ours": []}
    threads_used: list[int] = []
    with ExitStack() as stack:
        scripts: dict[str, Script] = {}
        for name, command in commands.items():
            env = environment(threads, stock=name == "stock")
            scripts[name] = stack.enter_context(Script(command, env, folder / f"{name}-log", steps))
            threads_used.append(scripts[name].turn().threads)  # its start, before the other one's
        for number in range(turns):
            for name in sorted(scripts, reverse=bool(number % 2)):
                times[name].append(scripts[name].turn())
    pairs = list(zip(times["stock"], times["ours"], strict=True))
    return {
        "network": network.name,
        "threads": threads_used,
        "steps": steps,
        "stock_seconds_per_step": [turn.wall / steps for turn, _ in pairs],
        "ours_seconds_per_step": [turn.wall / steps for _, turn in pairs],
        "ratio": [stock.wall / ours.wall for stock, ours in pairs],
        "cpu_ratio": [stock.cpu / ours.cpu for stock, ours in pairs],
    }


def compare_whole(script: Path, network: Network, steps: int, rounds: int, folder: Path) -> dict[str, object]:
    """Runs from start to end, one thread each."""
    images = folder / "images"
    save_images(images, network.side, steps * network.batch)
    job = Job(network, steps, images)
    makers: dict[str, Callable[[Path], list[str]]] = {
        "stock": lambda output: stock_command(job, script, output),
        "ours": lambda output: our_command(job, output),
    }
    results: dict[str, list[list[float]]] = {"stock": [], "ours": []}
    for number in range(rounds):
        for name in sorted(makers, reverse=bool(number % 2)):
            output = folder / f"{name}-{number}"
            whole = run_whole(makers[name](output), environment(1, name == "stock"), folder / f"{name}-{number}-log")
            results[name].append([whole.wall, whole.cpu, whole.memory])
    return {"network": network.name, "steps": steps} | results


def steps_row(result: dict[str, object]) -> str:
    """A row of the table of steps."""
    stock, ours = (1 / statistics.median(result[f"{name}_seconds_per_step"]) for name in ("stock", "ours"))
    threads = " and ".join(map(str, result["threads"]))
    ratios = f"{spread(result['ratio'])} | {spread(result['cpu_ratio'])}"
    return f"| {result['network']} | {threads} | {stock:.2f} | {ours:.2f} | {ratios} |"


def whole_rows(result: dict[str, object]) -> list[str]:
    """Rows of the table of whole runs."""
    stock, ours = result["stock"], result["ours"]
    rows = []
    for name, values in (("`train_unconditional.py`", stock), ("ours", ours)):
        columns = " | ".join(f"{statistics.median(column):.1f}" for column in zip(*values, strict=True))
        rows.append(f"| {result['network']}, {result['steps']} steps | {name} | {columns} |")
    ratios = [
        spread([theirs[column] / mine[column] for theirs, mine in zip(stock, ours, strict=True)])
        for column in range(3)
    ]
    return [*rows, f"| | stock / ours | {' | '.join(ratios)} |"]


def main() -> None:
    """Print the tables."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))  # the scripts are killed on the way out
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, metavar="CHECKOUT_OR_SCRIPT")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few turns, to try the script")
    parser.add_argument("--network", help="only steps on one thread, of networks whose name has this text")
    parser.add_argument("--json", type=Path, help="also write every single measurement to this file")
    args = parser.parse_args()
    script = find_script(args.script)
    turns, rounds = (3, 1) if args.quick else (12, 3)
    steps = dict.fromkeys(QUICK, 5) if args.quick else dict(zip(NETWORKS, (10, 2, 2, 2), strict=True))
    networks = [network for network in steps if (args.network or "") in network.name]
    if not networks:
        parser.error(f"--network {args.network}: it is in none of {', '.join(network.name for network in steps)}")
    report: dict[str, object] = {"load": os.getloadavg()[0], "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        equal = [
            compare_steps(script, network, turns, steps[network], 1, folder / f"equal-{number}")
            for number, network in enumerate(networks)
        ]
        launched, whole = [], []
        if args.network is None:
            last = networks[-1]
            launched = [compare_steps(script, last, turns, steps[last], None, folder / "launched")]
            whole = [
                compare_whole(script, networks[0], count, rounds, folder / f"whole-{count}") for count in (10, 50)
            ]
    report |= {"equal": equal, "launched": launched, "whole": whole}
    if not has_torchvision():
        print("torchvision is not installed: the reference has a stand-in for its transforms.\n")
    print(
        "| steps | threads, stock and ours | stock, steps/s | ours, steps/s | stock / ours, s | stock / ours, CPU s |"
    )
    print("|---|---|---|---|---|---|")
    print("\n".join(map(steps_row, equal)))
    print("\n".join(steps_row(result | {"network": f"{result['network']}, as launched"}) for result in launched))
    if whole:
        print("\n| whole run, one thread | | s | CPU s | MiB |\n|---|---|---|---|---|")
        print("\n".join(row for result in whole for row in whole_rows(result)))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
