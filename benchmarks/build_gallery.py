"""Build an entry of the gallery from nothing but packages of public registries: data, training, pictures, numbers.

    python benchmarks/build_gallery.py ENTRY FOLDER [--results DIR] [--scale 1]

The same command goes on where it was interrupted. FOLDER holds everything; ``--results`` (default:
``docs/gallery/ENTRY``) gets what is shown: ``samples.png`` (64 samples, seeds 0 to 63 in order), ``calls.png`` (the
first eight with 5, 10, 25 and 50 calls of three samplers), ``copies.png`` (the samples that are most like a training
image, beside it), ``denoising.webp`` (the first eight while they are drawn), ``loss.png``, ``reconstructions.png`` (of
a first stage), ``card.md``, and ``results.json`` with every number, the time of each command and the sha256 of the
weights. ``--scale`` is a factor on all numbers of training steps and samples. ``python benchmarks/gallery/page.py``
then writes the tables of the page.

Times are seconds of the processor, summed over all starts; ``results.json`` has their number. Ctrl-C or SIGTERM stop
it with a checkpoint; what a `kill -9` ended is not in the sum.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gallery.cards import model_card
from gallery.entries import ENTRIES, OWN_SAMPLER, QUIET, Entry, Training
from gallery.features import save_extractor
from gallery.sheets import SAMPLERS, save_sheets, save_small, side_by_side
from PIL import Image
from safetensors import safe_open

from diffusers_ddpm_ext.plotting.sheets import GAP
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data

HERE = Path(__file__).resolve().parent / "gallery"
RESULTS = HERE.parents[1] / "docs" / "gallery"
DDPM_EXT = (sys.executable, "-m", "diffusers_ddpm_ext")
RECONSTRUCTIONS = "first-stage/reconstructions.png"
SHEETS = ("samples.png", "calls.png", "copies/copies.png", "model/samples/loss.png", RECONSTRUCTIONS)
TALL = {"calls.png": ((len(SAMPLERS),), 0), "copies/copies.png": ((3, 2), GAP)}
"""Sheets that are shown in parts side by side: into how many they may be cut, and the pixels between their rows."""
MAX_WIDTH = 1100
"""Pixels; in a wider sheet nobody could read the captions, since a page shows it smaller."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
PACKAGES = ("torch", "diffusers", "numpy", "Pillow")


class Stages:
    """Steps of the work that are done once, with their times; a file remembers them.

    Args:
        folder: of the entry.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stages.json"
        self.done: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}

    def run(self, name: str, work: Callable[[], object]) -> None:
        """Do ``work`` unless it is done; its result is kept if it is a number."""
        stage = self.done.setdefault(name, {"starts": 0, "cpu_seconds": 0.0, "seconds": 0.0, "is_done": False})
        if stage["is_done"]:
            return
        stage["starts"] += 1
        self._save()
        print(f"{name} ...", flush=True)
        before, started = cpu_seconds(), time.monotonic()
        try:
            value = work()
            stage["is_done"] = True
            if isinstance(value, float):
                stage["value"] = value
        finally:
            stage["cpu_seconds"] += cpu_seconds() - before
            stage["seconds"] += time.monotonic() - started
            self._save()

    def _save(self) -> None:
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.done, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def cpu_seconds() -> float:
    """Seconds of the processor of this process and of the commands that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def command(*words: str) -> Callable[[], None]:
    """A command of the package, or another program; an error ends the script.

    Ctrl-C reaches the program as well, and SIGTERM is passed on; training then saves a checkpoint before it ends.
    """

    def run() -> None:
        with subprocess.Popen(words, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
            previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            status = None
            while status is None:
                try:
                    status = process.wait()
                except KeyboardInterrupt:
                    continue
            signal.signal(signal.SIGTERM, previous)
        if status:
            sys.exit(f"error: {shlex.join(words)} ended with status {status}")

    return run


def training_words(training: Training, names: dict[str, str], folder: Path, scale: float) -> list[str]:
    """The training command."""
    steps = max(2, round(training.steps * scale))
    options = [option.format(**names) for option in shlex.split(training.options)]
    chosen = QUIET | {"--max_train_steps": str(steps), "--output_dir": str(folder)}
    return [*DDPM_EXT, training.command, *options, *(word for pair in chosen.items() for word in pair)]


def names_in(folder: Path) -> dict[str, str]:
    """What the options of a training command may name."""
    return {"folder": str(folder), "data": str(folder / "data"), "vae": str(folder / "first-stage")}


def place_of(training: Training, folder: Path) -> Path:
    """Output folder of a training command."""
    return folder / training.name.replace(" ", "-")


def labels_like(folder: Path, count: int) -> list[str]:
    """Classes of ``count`` samples, in the shares that they have in an image folder; deterministic."""
    labels = [
        place.name
        for place in sorted(folder.iterdir())
        if place.is_dir()
        for _ in range(sum(1 for _ in place.iterdir()))
    ]
    return [labels[(2 * index + 1) * len(labels) // (2 * count)] for index in range(count)]


def save_held_out_digits(path: Path) -> None:
    """Write the digits that a run holds out by default, (N, 8, 8) in [0, 1]."""
    held_out = load_data(DataOptions(resolution=(8, 8))).validation
    levels = np.stack([held_out.images.image(int(row))[0].numpy() for row in held_out.rows])
    np.savez(path, levels.astype(np.float32) / 16)


def array_of(path: Path) -> tuple[str, np.ndarray]:
    """Name and values of the array of a .npz file that has one."""
    with np.load(path) as arrays:
        (name,) = arrays.files
        return name, arrays[name]


def save_evenly(samples: Path, path: Path, count: int) -> None:
    """Write ``count`` of the samples, evenly spaced, so that classes keep their shares; all, if there are fewer."""
    name, images = array_of(samples)
    count = min(count, len(images))
    np.savez(path, **{name: images[(2 * np.arange(count) + 1) * len(images) // (2 * count)]})


def processor() -> str:
    """Name of the processor, as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    return found.get("model name", platform.processor() or platform.machine()) + family


def build(entry: Entry, folder: Path, scale: float) -> Stages:
    """Do everything that is not done yet."""
    stages, data = Stages(folder), folder / "data"
    names = names_in(folder)
    if entry.data is not None:
        if not stages.done.get("data", {}).get("is_done") and data.exists():
            shutil.rmtree(data)  # of an interrupted start
        stages.run("data", command(sys.executable, str(HERE / entry.data), str(data)))
    for training in entry.training:
        words = training_words(training, names, place_of(training, folder), scale)
        stages.run(training.name, command(*words))
    model, features = str(folder / "model"), folder / "features.pt"
    if entry.features == "classes":
        stages.run("features", lambda: save_extractor(data, features))
    extractor = (
        ["--feature_extractor", str(features), "--trust_feature_extractor"]
        if entry.features == "classes"
        else ["--feature_extractor", entry.features]
    )
    count = max(60, round(entry.num_samples * min(1, scale)))
    drawing = ["--num_inference_steps", str(entry.calls), "--num_images", str(count)]
    if entry.scheduler != OWN_SAMPLER:
        drawing += ["--scheduler", entry.scheduler, "--scheduler_args", "timestep_spacing=trailing"]
    drawing += ["--guidance_scale", str(entry.guidance)] if entry.guidance != 1 else []
    if entry.data is not None:
        drawing += ["--class_labels", *labels_like(data / "train", count)]
    samples = folder / "samples.npz"
    stages.run("samples", command(*DDPM_EXT, "sample", model, *drawing, "--out", str(samples)))
    metrics = ["--split", "train", "--metrics", "fd", "kid", "prdc", *extractor]
    evaluate = [*DDPM_EXT, "evaluate", model]
    held_out = data / "held_out"
    if entry.data is None:
        held_out = folder / "held_out.npz"
        save_held_out_digits(held_out)
        num_held_out = len(array_of(held_out)[1])
    else:
        num_held_out = sum(1 for _ in held_out.glob("*/*"))
    fewer = folder / "samples-fewer.npz"
    save_evenly(samples, fewer, num_held_out)
    for name, title, path in (
        ("metrics", "metrics", samples),
        ("metrics-fewer", "metrics, as many samples as held-out images", fewer),
        ("metrics-real", "metrics, held-out images", held_out),
    ):
        out = ["--out", str(folder / name), "--samples", str(path)]
        stages.run(title, command(*evaluate, *metrics, *out))
    out = ["--out", str(folder / "copies"), "--samples", str(samples)]
    stages.run("copies", command(*evaluate, "--memorization", *extractor, *out))
    if entry.has_bound:
        bound = ["--num_timesteps", "50" if scale >= 1 else "2", "--out", str(folder / "bound")]
        stages.run("bits per dimension", command(*evaluate, *bound))
    drawn = (entry.scheduler, entry.calls, entry.guidance, entry.enlarge)
    stages.run("pictures", lambda: save_sheets(folder / "model", folder, *drawn))
    return stages


def count_parameters(path: Path) -> int:
    """Number of values in a file of weights."""
    with safe_open(path, "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def results(name: str, folder: Path, stages: Stages, scale: float) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    entry, names = ENTRIES[name], names_in(folder)
    found: dict[str, Any] = {
        "name": name,
        "title": entry.title,
        "scale": scale,
        "commands": {
            training.name: shlex.join(
                ["ddpm-ext", *training_words(training, names, place_of(training, folder), scale)[len(DDPM_EXT) :]]
            )
            for training in entry.training
        },
        "sampler": {"scheduler": entry.scheduler, "calls": entry.calls, "guidance_scale": entry.guidance},
        "stages": stages.done,
        "machine": {"name": processor(), "cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]},
        "model": {
            "threads": json.loads((folder / "model" / "environment.json").read_text("utf-8"))["num_threads"],
            "parameters": count_parameters(folder / "model" / "unet" / WEIGHTS),
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    for name in ("metrics", "metrics-fewer", "metrics-real", "copies"):
        path = folder / name / "sample_metrics.json"
        if path.exists():
            found[name] = json.loads(path.read_text("utf-8"))
    if len(entry.training) > 1:
        rows = map(json.loads, (folder / "first-stage" / "metrics.jsonl").read_text("utf-8").splitlines())
        found["first stage"] = [row for row in rows if "val/psnr_ema" in row][-1]
    path = folder / "bound" / "evaluation.json"
    if path.exists():
        found["bound"] = json.loads(path.read_text("utf-8"))
    weights = sorted((folder / "model").glob(f"*/{WEIGHTS}"))
    found["sha256"] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in weights
    }
    return found


def without_place(text: str, folder: Path) -> str:
    """A text with FOLDER in place of the path of the entry's folder, where it is a path or the start of one."""
    for path in (str(folder.resolve()), str(folder)):
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?=/)", "FOLDER", text)
        if os.path.isabs(path):
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w./-])", "FOLDER", text)
    return text


def publish(folder: Path, results_of: dict[str, Any], place: Path) -> None:
    """Copy what the page shows."""
    place.mkdir(parents=True, exist_ok=True)
    for name in SHEETS:
        if name == RECONSTRUCTIONS and not (folder / name).exists():
            continue  # a model of pixels
        with Image.open(folder / name) as sheet:
            shown = sheet.convert("RGB")
            if name in TALL:
                choices, between = TALL[name]
                shown = side_by_side(shown, next((n for n in choices if n * shown.width < MAX_WIDTH), 1), between)
            save_small(shown, place / Path(name).name)
    shutil.copy(folder / "denoising.webp", place)
    for name, text in (
        ("results.json", json.dumps(results_of, indent=1) + "\n"),
        ("card.md", model_card(results_of["name"], folder, place)),
    ):
        (place / name).write_text(without_place(text, folder), encoding="utf-8")


def main() -> int:
    """Build one entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", choices=list(ENTRIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on training steps and samples (default: 1)")
    options = parser.parse_args()
    if not 0 < options.scale < math.inf:
        parser.error(f"--scale {options.scale} must be a positive number")
    if options.folder.exists() and not options.folder.is_dir():
        parser.error(f"{options.folder} is a file: name a folder")
    place = options.results or RESULTS / options.entry
    if place.exists() and not place.is_dir():
        parser.error(f"--results {place} is a file: name a folder")
    entry = ENTRIES[options.entry]
    begun, chosen = options.folder / "begun.json", {"entry": options.entry, "scale": options.scale}
    if begun.exists() and json.loads(begun.read_text("utf-8")) != chosen:
        parser.error(f"{options.folder} has another entry or scale, {begun.read_text('utf-8')}: name another folder")
    options.folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(chosen), encoding="utf-8")
    stages = build(entry, options.folder, options.scale)
    publish(options.folder, results(options.entry, options.folder, stages, options.scale), place)
    print(f"written to {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
