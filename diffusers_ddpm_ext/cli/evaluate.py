"""`ddpm-ext evaluate`: bits per dimension of held-out images, with an interval."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.arguments import check_dtype, check_pipeline_source
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.cli.measuring import (
    Caller,
    add_measuring_flags,
    check_measuring,
    held_out,
    load_images,
    take_data_flags,
)
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, select_device
from diffusers_ddpm_ext.training.config.flags import Parser

if TYPE_CHECKING:
    from diffusers_ddpm_ext.diffusion.likelihood import Decoder
    from diffusers_ddpm_ext.diffusion.likelihood_estimate import StepBits
    from diffusers_ddpm_ext.training.evaluation.processes import Processes

DTYPES = ("float32", "float64", "bfloat16", "float16")
NAME = "evaluation"
HEAD = """Bits per dimension of held-out images: the variational bound on their negative log-likelihood, in parts
(prior, steps, decoder), with an interval over images. By default the run's own validation images, and all T
steps of each."""
TAIL = """examples:
  ddpm-ext evaluate runs/digits                              all steps of all held-out digits
  ddpm-ext evaluate runs/digits --num_timesteps 20           20 steps of each image, unbiased: T/20 times as fast
  ddpm-ext evaluate runs/digits --num_inference_steps 50     the bound of the chain of 50 steps that sampling takes
  ddpm-ext evaluate runs/photos --validation_data_dir other --json bits.json --device cuda
  accelerate launch -m diffusers_ddpm_ext evaluate runs/photos      on as many devices as configured

In FOLDER/evaluation (--out) it leaves evaluation.json, steps.csv (every step that was drawn) and steps.png. A command
that was broken off goes on where it was when it is given again. --batch_size counts rows of the network: one image at
one step."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What `ddpm-ext evaluate` was asked for; checked."""

    folder: str
    data: dict[str, Any]
    split: str
    weights: str | None
    device: str | None
    dtype: str
    json: Path | None
    out: Path
    num_timesteps: int | None
    num_inference_steps: int | None
    optimal_timesteps: bool
    max_images: int | None
    confidence: float
    seed: int
    batch_size: int
    clip_denoised: bool
    decoder: Decoder
    bin_width: float | None


def evaluate_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_evaluate_args(argv)
    require_modules({**TRAIN_MODULES, "scipy": "scipy"})
    return evaluate(options)


def parse_evaluate_args(argv: Sequence[str], prog: str = "ddpm-ext evaluate") -> EvaluateOptions:
    """The options of a command line, checked; arguments and errors are those of `Parser.parse_checked`."""
    parser = Parser(prog=prog, usage=f"{prog} FOLDER [options]", description=HEAD, epilog=TAIL)
    parser.add_argument("folder", metavar="FOLDER", help="Output folder of a run, saved pipeline, or Hub id.")
    add = parser.add_argument
    add("--num_timesteps", default="all", metavar="all|K", help="Steps of each image (default: all).")
    add(
        "--num_inference_steps",
        type=int,
        metavar="K",
        help="Evaluate the shorter chain that sampling with K steps takes (default: the full one).",
    )
    add("--optimal_timesteps", action="store_true", help="The K steps are those that `ddpm-ext fit-variance` chose.")
    add("--split", default="validation", metavar="{validation,train}", help="Which images (default: validation).")
    add("--max_images", type=int, metavar="N", help="At most so many, evenly from all (default: all).")
    add("--weights", metavar="{ema,raw}", help="Averaged or raw weights (default: those that sampling takes).")
    add("--confidence", type=float, default=0.95, metavar="P", help="Of the interval (default: 0.95).")
    add("--clip_denoised", action="store_true", help="Clip the predicted image to [-1, 1], as sampling may.")
    add("--json", metavar="FILE", help="Also write the result here.")
    add("--out", metavar="DIR", help="Folder of the result (default: FOLDER/evaluation).")
    add_measuring_flags(parser, DTYPES)
    given = parser.parse_checked(argv)
    data = take_data_flags(given)
    given["num_timesteps"] = _count(given["num_timesteps"])
    given["json"] = None if given["json"] is None else Path(given["json"])
    folder = given["folder"]
    default = Path(folder) / NAME if Path(folder).is_dir() else Path(f"{Path(folder).name}-{NAME}")
    given["out"] = default if given["out"] is None else Path(given["out"])
    options = EvaluateOptions(data=data, **given)
    _check(options)
    return options


def _count(word: str) -> int | None:
    if word == "all":
        return None
    if not re.fullmatch(r"\d+", word) or int(word) < 1:
        raise ConfigError(f"--num_timesteps {word!r}: say all, or how many steps of each image")
    return int(word)


def _check(options: EvaluateOptions) -> None:
    choices = {"split": ("validation", "train"), "weights": ("ema", "raw", None)}
    check_measuring(options, {"num_inference_steps": 1, "max_images": 1}, choices)
    if not 0 < options.confidence < 1:
        raise ConfigError(f"--confidence must lie between 0 and 1, got {options.confidence}; 0.95 is usual")
    if options.optimal_timesteps and options.num_inference_steps is None:
        raise ConfigError("--optimal_timesteps needs --num_inference_steps: how many steps are chosen")
    check_dtype(options.dtype, DTYPES)
    check_pipeline_source(options.folder)
    for name, path in (("json", options.json), ("out", options.out)):
        if path is None:
            continue
        parent = path.absolute().parent
        if path.is_dir() != (name == "out") and path.exists():
            raise ConfigError(
                f"--{name} {path} is a {'folder: name a file' if path.is_dir() else 'file: name a folder'}"
            )
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"--{name} {path} lies in a folder that does not exist or is not writable")


def evaluate(options: EvaluateOptions) -> str:
    """Measure, and write what was measured.

    Args:
        options: what was asked for.

    Returns:
        The lines to print; empty but in the first process.

    Raises:
        ConfigError: the pipeline cannot be opened, or does not take these options.
        RunError: the bound is not finite, or cannot be written.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from diffusers_ddpm_ext.diffusion.likelihood_estimate import Strata, estimate, step_table
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
    from diffusers_ddpm_ext.training.evaluation.bound import BoundEvaluation, evaluate_bound
    from diffusers_ddpm_ext.training.evaluation.cache import EvaluationCache

    processes = _processes(options.device)
    folder, variant = options.folder, _variant(options)
    asked = f"--weights {options.weights}"
    pipeline = load_pipeline(folder, variant, processes.device, options.dtype, asked)
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, DDPMExtScheduler):
        raise ConfigError(f"{folder}: a {type(scheduler).__name__} defines no chain to evaluate; it needs DDPM's")
    data = load_images(folder, pipeline, options.data, processes.rank == 0)
    images = held_out(data, options.split)
    bin_width = 2 / (images.levels - 1) if options.bin_width is None else options.bin_width
    try:
        if options.num_inference_steps is not None:
            scheduler.set_timesteps(options.num_inference_steps, optimal=options.optimal_timesteps)
        strata = Strata.from_schedule(scheduler.kept, options.num_timesteps)
    except ValueError as error:
        raise ConfigError(f"--num_{_named(str(error))}: {error}") from None
    evaluation = BoundEvaluation(
        scheduler,
        images,
        strata,
        options.max_images,
        options.seed,
        batch_size=options.batch_size,
        dtype=getattr(torch, options.dtype),
        clip_denoised=options.clip_denoised,
        decoder=options.decoder,
        bin_width=bin_width,
    )
    options.out.mkdir(exist_ok=True)
    cache = EvaluationCache(options.out, _fingerprint(options, data.fingerprint, pipeline), processes)
    pipeline.unet.eval()
    with tqdm(
        total=-(-evaluation.rows // processes.world_size), desc="evaluating", unit="row", disable=processes.rank > 0
    ) as bar:
        rows = evaluate_bound(Caller(pipeline), evaluation, processes, cache, bar.update)
    if not np.isfinite(rows.bits).all():
        place = int(rows.places[~np.isfinite(rows.bits)].min())
        raise RunError(f"the bound is not finite at step {int(scheduler.kept.timesteps[place])} of {folder}")
    if processes.rank > 0:
        return ""
    result = estimate(rows.bits, rows.prior, strata, options.confidence)
    table = step_table(rows.bits, rows.places, scheduler.kept.timesteps)
    facts = asdict(result) | {
        "num_timesteps": len(strata),
        "chain": len(scheduler.kept),
        "chain_timesteps": "all" if scheduler.kept is scheduler.schedule else scheduler.kept.timesteps.tolist(),
        "weights": options.weights or ("ema" if (Path(folder) / "ema.json").is_file() else "default"),
        "split": options.split,
        "seed": options.seed,
        "decoder_kind": options.decoder,
        "bin_width": None if options.decoder == "continuous" else bin_width,
        "clip_denoised": options.clip_denoised,
        "unit": "bits per dimension",
        "data": data.description,
    }
    try:
        _write(options, facts, table)
    except OSError as error:
        raise RunError(f"cannot write {error.filename or options.out}: {error.strerror or error}") from None
    cache.delete()
    return _told(facts, options)


def _named(message: str) -> str:
    return "timesteps" if message.startswith("num_timesteps") else "inference_steps"


def _variant(options: EvaluateOptions) -> str | None:
    """Name of the weights' variant: averaged weights are the default files, raw ones stand beside them."""
    averaged = (Path(options.folder) / "ema.json").is_file()
    if options.weights == "ema" and Path(options.folder).is_dir() and not averaged:
        raise ConfigError(f"--weights ema: {options.folder} has no averaged weights (no ema.json): leave it out")
    raw = options.weights == "raw" and (averaged or not Path(options.folder).is_dir())
    return "raw" if raw else None


def _processes(device: str | None) -> Processes:
    """This process alone, or all that a launcher started."""
    from diffusers_ddpm_ext.training.evaluation.processes import Processes

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, select_device(device), lambda tensor: tensor)
    from diffusers_ddpm_ext.training.distributed import make_accelerator, sum_over_ranks

    accelerator = make_accelerator(None, 1, [])
    if device is not None and select_device(device).type != accelerator.device.type:
        raise ConfigError(f"--device {device}: the launcher gives each process its own: leave it out")
    return Processes(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        lambda tensor: sum_over_ranks(accelerator, tensor),
    )


def _fingerprint(options: EvaluateOptions, data: str, pipeline: Any) -> str:
    """Of all that decides the rows' numbers."""
    import torch

    asked = {name: value for name, value in vars(options).items() if name not in ("json", "out", "data", "confidence")}
    weights = hashlib.sha256()
    for name, tensor in sorted(pipeline.unet.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    parts = [json.dumps(asked, sort_keys=True, default=str), data, weights.hexdigest()]
    parts.append(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write(options: EvaluateOptions, facts: dict[str, Any], table: list[StepBits]) -> None:
    from diffusers_ddpm_ext.plotting.chain import plot_steps
    from diffusers_ddpm_ext.utils.files import write_text_atomically

    text = json.dumps(facts, indent=1) + "\n"
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["timestep", "bits_per_dim", "standard_error", "draws"])
    writer.writerows([t, f"{mean:.9g}", "" if error is None else f"{error:.3g}", n] for t, mean, error, n in table)
    places = [options.out / f"{NAME}.json", *([] if options.json is None else [options.json])]
    write_text_atomically(options.out / "steps.csv", sheet.getvalue())
    steps, means = [row[0] for row in table], [row[1] for row in table]
    plot_steps(options.out / "steps.png", steps, means, facts["bits_per_dim"])
    for place in places:
        write_text_atomically(place, text)


def _told(facts: dict[str, Any], options: EvaluateOptions) -> str:
    interval = "  (a single image has no interval)"
    if facts["low"] is not None:
        interval = f"  {100 * facts['confidence']:g} % interval {facts['low']:.4f} to {facts['high']:.4f}"
    kind = "" if options.decoder != "continuous" else " (of the density: no levels are counted)"
    return "\n".join(
        [
            f"bits per dimension{kind}  {facts['bits_per_dim']:.4f}{interval}",
            f"  prior    {facts['prior']:.4f}",
            f"  steps    {facts['steps']:.4f}",
            f"  decoder  {facts['decoder']:.4f}",
            f"{facts['num_images']:,} images, {facts['num_timesteps']:,} of the {facts['chain']:,} steps of the chain"
            f" each; written to {options.out}",
        ]
    )
