"""`ddpm-ext plot`: what a folder says about its chain, as pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.arguments import check_pipeline_folder
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training.config.flags import Parser
from diffusers_ddpm_ext.utils.files import CONFIG

if TYPE_CHECKING:
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

HEAD = "Draw what the folder of a trained pipeline says about its chain of noise."
TAIL = """examples:
  ddpm-ext plot runs/digits                   to runs/digits/plots
  ddpm-ext plot runs/digits --out pictures
first, for the pictures that need it:
  ddpm-ext fit-variance runs/digits
  ddpm-ext evaluate runs/digits --num_timesteps 20

what is drawn, from what is there:
  schedule.png      betas and signal-to-noise ratio
  weights.png       the weights in force: the loss weighting of the run, the bound's, CompVis' of the bound
  logvar.png        learned log-variances, against the measured log loss (after `ddpm-ext fit-variance`)
  steps.png         what each step adds to the bound (after `ddpm-ext evaluate`)
  variance.png      v of each step back, against 0 and 1
  timesteps.png     the best steps for each number of steps (after `ddpm-ext fit-variance`)"""


@dataclass(frozen=True)
class PlotOptions:
    """What `ddpm-ext plot` was asked for; checked."""

    folder: Path
    out: Path


def plot_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_plot_args(argv)
    require_modules(TRAIN_MODULES)
    return plot(options)


def parse_plot_args(argv: Sequence[str], prog: str = "ddpm-ext plot") -> PlotOptions:
    """The options of a command line, checked; arguments and errors are those of `Parser.parse_checked`."""
    parser = Parser(prog=prog, usage=f"{prog} FOLDER [options]", description=HEAD, epilog=TAIL)
    parser.add_argument("folder", metavar="FOLDER", help="Output folder of a run, or a saved pipeline.")
    parser.add_argument("--out", metavar="DIR", help="Where the pictures go (default: FOLDER/plots).")
    given = parser.parse_checked(argv)
    folder = check_pipeline_folder(given["folder"])
    out = folder / "plots" if given["out"] is None else Path(given["out"])
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder")
    return PlotOptions(folder, out)


def plot(options: PlotOptions) -> str:
    """Draw all that can be drawn.

    Args:
        options: what was asked for.

    Returns:
        A line that names the pictures.

    Raises:
        ConfigError: the folder cannot be read.
        RunError: a picture cannot be written.
    """
    from diffusers_ddpm_ext.plotting.chain import plot_schedule
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

    try:
        scheduler = DDPMExtScheduler.from_pretrained(options.folder, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{options.folder}: its scheduler cannot be read: {error}") from None
    made: list[Path] = []
    try:
        made.append(plot_schedule(options.out / "schedule.png", scheduler.schedule))
        for draw in DRAWN:
            picture = draw(options, scheduler)
            if picture is not None:
                made.append(picture)
    except OSError as error:
        raise RunError(f"cannot write {error.filename or options.out}: {error.strerror or error}") from None
    return f"{', '.join(path.name for path in made)} written to {options.out}"


def _weights(options: PlotOptions, scheduler: DDPMExtScheduler) -> Path | None:
    import numpy as np

    from diffusers_ddpm_ext.diffusion.weighting import elbo_weights, weight_table
    from diffusers_ddpm_ext.plotting.chain import plot_weights
    from diffusers_ddpm_ext.training.config.train_config import read_config

    schedule = scheduler.schedule
    shown: dict[str, Any] = {}
    file = options.folder / CONFIG
    if file.is_file():
        run = read_config(str(file)).options
        numbers = (run.get("p2_k", 1.0), run.get("p2_gamma", 1.0))
        name, table = weight_table(schedule, run.get("loss_weighting", "simple"), run.get("snr_gamma"), *numbers)
        shown[f"this run: {name}"] = np.ones(len(schedule)) if table is None else table
    shown["the bound's (elbo)"] = elbo_weights(schedule)
    shown["the published code's (compvis_elbo)"] = elbo_weights(schedule, "compvis")
    return plot_weights(options.out / "weights.png", shown, schedule.prediction_type)


def _logvar(options: PlotOptions, scheduler: DDPMExtScheduler) -> Path | None:
    import numpy as np

    from diffusers_ddpm_ext.diffusion.optimal_variance import log_loss_of_x0_error
    from diffusers_ddpm_ext.losses.logvar import load_logvar
    from diffusers_ddpm_ext.plotting.curves import plot_logvar

    table = load_logvar(options.folder)
    if table is None:
        return None
    record = _record(options)
    measured = np.full(len(table), np.nan)
    if record is not None and record["source"] == "measured":
        measured = log_loss_of_x0_error(scheduler.schedule, np.array(record["x0_error"]))
    return plot_logvar(options.out / "logvar.png", table.numpy(), measured)


def _steps(options: PlotOptions, scheduler: DDPMExtScheduler) -> Path | None:
    from diffusers_ddpm_ext.plotting.chain import plot_steps

    table, facts = options.folder / "evaluation" / "steps.csv", options.folder / "evaluation" / "evaluation.json"
    if not table.is_file():
        return None
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = [(int(row["timestep"]), float(row["bits_per_dim"])) for row in csv.DictReader(file)]
        total = json.loads(facts.read_text(encoding="utf-8"))["bits_per_dim"] if facts.is_file() else None
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{table} cannot be read: {error}; write it anew with ddpm-ext evaluate") from None
    steps, bits = zip(*rows, strict=True)
    return plot_steps(options.out / "steps.png", steps, bits, total)


def _variance(options: PlotOptions, scheduler: DDPMExtScheduler) -> Path | None:
    import numpy as np

    from diffusers_ddpm_ext.plotting.chain import plot_variance

    v, decoder = scheduler.config.v_posterior, scheduler.config.v_decoder
    if v is None:
        return None
    curves = {"v_posterior": np.broadcast_to(np.asarray(v, dtype=float), (len(scheduler.schedule),))}
    if decoder is not None:
        curves["v_decoder: of the first step of a chain"] = np.broadcast_to(
            np.asarray(decoder, dtype=float), (len(scheduler.schedule),)
        )
    return plot_variance(options.out / "variance.png", curves)


def _timesteps(options: PlotOptions, scheduler: DDPMExtScheduler) -> Path | None:
    from diffusers_ddpm_ext.plotting.chain import plot_timesteps

    chosen = scheduler.config.optimal_timesteps
    if not chosen:
        return None
    steps = {int(count): list(some) for count, some in chosen.items()}
    return plot_timesteps(options.out / "timesteps.png", steps, len(scheduler.schedule))


def _record(options: PlotOptions) -> dict[str, Any] | None:
    from diffusers_ddpm_ext.cli.fit_variance import RECORD

    path = options.folder / RECORD
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}; write it anew with ddpm-ext fit-variance") from None
    return record


DRAWN: tuple[Callable[[PlotOptions, DDPMExtScheduler], Path | None], ...]
DRAWN = (_weights, _logvar, _steps, _variance, _timesteps)
