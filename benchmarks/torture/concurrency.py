"""Do two processes on one folder ever make a mix?

    python benchmarks/torture/concurrency.py [--opens 2000] [--pairs 20]

Readers open a pipeline while another process replaces it constantly, in the three ways in which the project does (the
folder as a whole, as ``best/`` is; its files, as an export of a run and ``save_pretrained`` do). Every file of a model
says which model it belongs to: weights, raw weights, log-variances, the scheduler's configuration, EMA facts. A *mix*
has facts of two models.

Then pairs of samplings with different seeds start at the same moment with one output. What is there at the end must be
the whole output of one seed; a sampling that was refused has said so in one line.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import subjects
from forked import Forked, findings
from subjects import command

VALUES = (0.25, 0.5)
"""The two models: all of their numbers are made of one of these."""


def networks_of(value: float) -> tuple[Any, Any]:
    """What a run exports, and its scheduler, all made of one value."""
    import torch
    from helpers.tiny import tiny_unet

    from diffusers_ddpm_ext import DDPMExtScheduler
    from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata
    from diffusers_ddpm_ext.training.loop.export import ExportedNetworks

    made = []
    for shift in (0.0, 1.0):
        network = tiny_unet(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(value + shift)
        made.append(network)
    logvar = torch.full((10,), value)
    return ExportedNetworks(made[0], made[1], EmaMetadata(value, 1), logvar, None), DDPMExtScheduler(
        10, beta_end=value
    )


def replace_constantly(folder: Path, way: str, turns: int) -> Callable[[], int]:
    """A writer: one model, then the other, so many times, or until it is killed."""

    def work() -> int:
        from diffusers_ddpm_ext import DDPMExtPipeline
        from diffusers_ddpm_ext.training.loop.export import save_pipeline
        from diffusers_ddpm_ext.utils.files import replace_folder

        made = [networks_of(value) for value in VALUES]
        for turn in range(turns):
            networks, scheduler = made[turn % 2]
            if way == "whole folder":
                draft = folder.with_name(f".writing-{folder.name}")
                shutil.rmtree(draft, ignore_errors=True)
                save_pipeline(draft, networks, scheduler, {})
                replace_folder(draft, folder)
                shutil.rmtree(draft, ignore_errors=True)
            elif way == "export":
                save_pipeline(folder, networks, scheduler, {})
            else:
                pipeline = DDPMExtPipeline(networks.default, scheduler)
                pipeline.logvar = networks.logvar
                pipeline.save_pretrained(folder)
        return 0

    return work


def facts_of(folder: Path, way: str) -> set[float]:
    """The values that one reading of a folder found, one if it is of one model."""
    from diffusers_ddpm_ext import DDPMExtPipeline
    from diffusers_ddpm_ext.models.ema_metadata import load_ema_metadata
    from diffusers_ddpm_ext.utils.generations import read_one_generation

    def read(place: Path) -> set[float]:
        pipeline = DDPMExtPipeline.from_pretrained(place)
        found = {
            round(float(value), 6)
            for weight in pipeline.unet.state_dict().values()
            for value in (weight.min(), weight.max())
        }
        found |= {round(float(value), 6) for value in pipeline.logvar} | {pipeline.scheduler.config.beta_end}
        if way != "save_pretrained":
            raw = DDPMExtPipeline.from_pretrained(place, variant="raw")
            found |= {round(float(weight.min()) - 1, 6) for weight in raw.unet.state_dict().values()}
            found.add(load_ema_metadata(place).decay)
        return found

    return read_one_generation(folder, read)


def open_while_replaced(place: Path, way: str, opens: int) -> Counter[str]:
    """Open a folder so many times during its replacement; how many were of each model, mixed, or failed."""
    from diffusers_ddpm_ext.pipelines.loading import quiet_diffusers

    folder = place / way.replace(" ", "-") / "best"
    folder.parent.mkdir()
    first = Forked(replace_constantly(folder, way, 1), place, place).wait()
    if first.status:
        raise SystemExit(first.stderr)
    writer = Forked(replace_constantly(folder, way, 10**9), place, place)
    tally: Counter[str] = Counter()
    try:
        with quiet_diffusers():
            for number in range(opens):
                try:
                    found = facts_of(folder, way)
                except Exception as error:
                    tally["failed"] += 1
                    print(f"FAILED {way}, open {number}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    continue
                tally["mixed" if len(found) != 1 else f"model {found.pop()}"] += 1
    finally:
        writer.kill()
        writer.wait()
    return tally


def digest(path: Path) -> str:
    """Of a sampling's output: its images, without records."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.png")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def sample_in_pairs(place: Path, source: Path, pairs: int) -> Counter[str]:
    """Start two samplings with other seeds and one output; whose images are there at the end."""
    tally: Counter[str] = Counter()
    shutil.copytree(source / "run", place / "run")
    draw = random.Random(0)
    arguments = [
        "sample",
        "run",
        "--num_images",
        "12",
        "--batch_size",
        "2",
        "--num_inference_steps",
        "20",
        "--device",
        "cpu",
    ]
    outputs = ("pictures", "grid.png", "array.npy", "arrays.npz")
    alone = {}
    for output in outputs:
        for seed in (1, 2):
            name = f"alone{seed}-{output}"
            Forked(command([*arguments, "--seed", str(seed), "--out", name]), place, place).wait()
            alone[digest(place / name)] = (output, seed)
    for number in range(pairs):
        output, work = outputs[number % len(outputs)], place / f"pair-{number}"
        work.mkdir()
        running = []
        for seed in (1, 2):
            (work / f"logs-{seed}").mkdir()
            line = [*arguments, "--seed", str(seed), "--out", str(work / output)]
            running.append(Forked(command(line), place, work / f"logs-{seed}"))
            time.sleep(draw.choice((0, 0, 0.01, 0.05, 0.2)))
        outcomes = [each.wait() for each in running]
        found = alone.get(digest(work / output))
        wrong = [each for outcome in outcomes for each in findings(outcome)]
        refused = sum(outcome.status == 2 for outcome in outcomes)
        if found is None or wrong or refused == 2:
            tally["mixed or wrong"] += 1
            print(f"WRONG pair {number}, {output}: {wrong}, {[o.stderr[-200:] for o in outcomes]}", flush=True)
        else:
            tally[f"one whole output, {refused} refused"] += 1
        leftovers = [path.name for path in work.iterdir() if path.name.endswith(".part")]
        if leftovers:
            tally["leftovers"] += 1
            print(f"WRONG pair {number}, {output}: left {leftovers}", flush=True)
    return tally


def main() -> int:
    """Run both and print the counts; status 1 if anything was mixed or failed."""
    parser = argparse.ArgumentParser(description="Readers and writers of one folder at the same time.")
    parser.add_argument("--opens", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    start, bad = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        subjects.environment(place / "home")
        subjects.import_everything()
        subjects.build(place / "subjects")
        ways = ("whole folder", "export", "save_pretrained")
        for number, way in enumerate(ways):
            opens = arguments.opens // len(ways) + (number < arguments.opens % len(ways))
            tally = open_while_replaced(place, way, opens)
            bad += tally["mixed"] + tally["failed"]
            print(f"{way}: {opens} opens, {dict(tally)}", flush=True)
        tally = sample_in_pairs(place, place / "subjects", arguments.pairs)
        bad += tally["mixed or wrong"] + tally["leftovers"]
        print(f"{arguments.pairs} pairs of samplings: {dict(tally)}")
    print(f"seconds {time.perf_counter() - start:.0f}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
