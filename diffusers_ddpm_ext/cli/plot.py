"""`ddpm-ext plot`: plots of a pipeline's schedule, loss weights, log-variances, bound and reverse variances."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers_ddpm_ext.cli.arguments import LOCAL_FOLDER_HELP, check_pipeline_folder
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.cli.fit_variance import FIT_RECORD
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError, as_config_error, as_run_error, printable
from diffusers_ddpm_ext.hub.card_facts import BITS_PER_DIM, BITS_PER_LATENT, MAX_CONFIG_BYTES, load_config_text
from diffusers_ddpm_ext.utils.files import CONFIG, EVALUATION
from diffusers_ddpm_ext.utils.input_files import exists, file_name, read_csv_rows, read_json_object, read_text
from diffusers_ddpm_ext.utils.option import option, positional

if TYPE_CHECKING:
    from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
    from diffusers_ddpm_ext.schedulers.resolved_config import ResolvedConfig

PLOT_EXAMPLES = """examples:
  ddpm-ext plot runs/digits                   to runs/digits/plots
  ddpm-ext plot runs/digits --out plots
  ddpm-ext plot runs/digits --format svg      for a paper or a page: pdf, too
first, for the plots that need it:
  ddpm-ext fit-variance runs/digits
  ddpm-ext evaluate runs/digits --num_timesteps 20

plots, each if the folder has its data:
  schedule.png      betas and signal-to-noise ratio
  weights.png       weights in use: the run's loss weighting, the bound's, CompVis' of the bound
  logvar.png        learned log-variances, against the measured log loss (after `ddpm-ext fit-variance`)
  steps.png         the bound's term at each step (after `ddpm-ext evaluate`)
  variance.png      v of each reverse step, against 0 and 1
  timesteps.png     the best steps for each number of steps (after `ddpm-ext fit-variance`)"""


@dataclass(frozen=True)
class PlotOptions:
    """Plot the noise schedule of a trained pipeline, and what was measured and fitted on it."""

    folder: Path = positional("FOLDER", LOCAL_FOLDER_HELP)
    out: Path | None = option(None, "Folder of the plots.", metavar="DIR", unset="FOLDER/plots")
    format: Literal["png", "svg", "pdf"] = option("png", "Format of the plots; svg and pdf have no pixels.")

    @property
    def output_folder(self) -> Path:
        """Folder of the plots: ``--out``, or its default."""
        return self.folder / "plots" if self.out is None else self.out


def plot_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_plot_args(argv)
    require_modules(TRAIN_MODULES)
    return plot(options)


def parse_plot_args(argv: Sequence[str]) -> PlotOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(PlotOptions, argv, "plot", PLOT_EXAMPLES)
    check_pipeline_folder(str(options.folder))
    out = options.output_folder
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder")
    folder = next((path for name in PLOTS if (path := out / f"{name}.{options.format}").is_dir()), None)
    if folder is not None:
        raise ConfigError(f"{folder} is a folder, in the place of a plot: name another --out, or move it away")
    return options


def plot(options: PlotOptions) -> str:
    """Draw every plot that the folder has data for.

    Raises:
        ConfigError: the folder cannot be read.
        RunError: a plot cannot be written.
    """
    from diffusers_ddpm_ext.schedulers.resolved_config import read_scheduler_config

    folder, out = options.folder, options.output_folder
    scheduler = read_scheduler_config(folder)
    with as_run_error(out), tempfile.TemporaryDirectory() as temporary:
        drafts = [draw_plot(name, folder, scheduler, Path(temporary) / f"{name}.{options.format}") for name in PLOTS]
        paths = [path for path in drafts if path is not None]
        _place(paths, out)
    return f"{', '.join(path.name for path in paths)} written to {out}"


def _place(paths: Sequence[Path], out: Path) -> None:
    """Copy files into a folder: all of them, or none where the disk is full."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".plots-", dir=out) as beside:
        copies = [Path(shutil.copyfile(path, Path(beside) / path.name)) for path in paths]
        for copy in copies:
            os.replace(copy, out / copy.name)


def draw_plot(name: str, folder: Path, scheduler: ResolvedConfig, path: Path) -> Path | None:
    """Draw one of `PLOTS`; None if the folder has no data for it, ConfigError if they are wrong."""
    with as_config_error(f"{name}.png"):
        return PLOTS[name](folder, scheduler, path)


def _plot_schedule(folder: Path, scheduler: ResolvedConfig, path: Path) -> Path | None:
    from diffusers_ddpm_ext.plotting.chain import plot_schedule

    return plot_schedule(path, scheduler.schedule)


def _plot_weights(folder: Path, scheduler: ResolvedConfig, path: Path) -> Path | None:
    from diffusers_ddpm_ext.diffusion.weighting import elbo_weights
    from diffusers_ddpm_ext.plotting.chain import plot_weights

    schedule = scheduler.schedule
    weights = _run_weights(schedule, _run_options(folder))
    weights["the bound's (elbo)"] = elbo_weights(schedule)
    weights["the published code's (compvis_elbo)"] = elbo_weights(schedule, "compvis")
    return plot_weights(path, weights, schedule.prediction_type)


def _run_options(folder: Path) -> dict[str, Any]:
    """The options of the run by name; empty where no configuration states them."""
    from diffusers_ddpm_ext.training.config.layers import convert_options

    file = folder / CONFIG
    if not file.is_file():
        return {}
    return convert_options(load_config_text(read_text(file, max_bytes=MAX_CONFIG_BYTES)), CONFIG).options


def _run_weights(schedule: NoiseSchedule, run: Mapping[str, Any]) -> dict[str, Any]:
    """Weight of each step in the loss of a run, before a learned log-variance divides it; empty without options."""
    import numpy as np

    from diffusers_ddpm_ext.diffusion.weighting import elbo_weights, weight_table

    if not run or run.get("loss_type") == "vlb":  # vlb: the bound alone
        return {}
    p2 = (run.get("p2_k", 1.0), run.get("p2_gamma", 1.0))
    name, table = weight_table(schedule, run.get("loss_weighting", "simple"), run.get("snr_gamma"), *p2)
    simple, bound = run.get("l_simple_weight", 1.0), run.get("original_elbo_weight", 0.0)
    total = simple * (np.ones(len(schedule)) if table is None else table)
    parts = [name if simple == 1 else f"{simple:g} x {name}"] if simple else []
    if bound:
        total = total + bound * elbo_weights(schedule, run.get("elbo_weights", "exact"))
        parts.append(f"{bound:g} x the bound's")
    return {f"this run: {' + '.join(parts)}": total}


def _plot_logvar(folder: Path, scheduler: ResolvedConfig, path: Path) -> Path | None:
    import numpy as np

    from diffusers_ddpm_ext.diffusion.optimal_variance import log_loss_of_x0_error
    from diffusers_ddpm_ext.losses.logvar_files import read_logvar
    from diffusers_ddpm_ext.plotting.curves import plot_logvar

    table = read_logvar(folder)
    if table is None:
        return None
    if len(table) != len(scheduler.schedule):
        raise ConfigError(f"logvar has {len(table):,} values, and the chain {len(scheduler.schedule):,} steps")
    measured = np.full(len(table), np.nan)
    record = folder / FIT_RECORD
    if exists(record):
        fit = read_json_object(record)
        if fit.string("source") == "measured":
            error = np.array(fit.numbers("x0_error"))
            if error.shape != measured.shape:
                raise ConfigError(
                    f"{fit.name}: x0_error has {len(error):,} values, and the chain {len(table):,} steps"
                )
            measured = log_loss_of_x0_error(scheduler.schedule, error)
    return plot_logvar(path, table, measured)


def _plot_steps(folder: Path, scheduler: ResolvedConfig, path: Path) -> Path | None:
    from diffusers_ddpm_ext.plotting.chain import plot_steps

    result = folder / EVALUATION
    table = result.with_name("steps.csv")
    if not exists(table):
        return None
    rows = read_csv_rows(table, columns=("timestep", "bits_per_dim"))
    steps, bits = (_csv_numbers(table, rows, column) for column in ("timestep", "bits_per_dim"))
    if not rows or any(step != int(step) for step in steps):
        raise ConfigError(f"{file_name(table)} has no steps, or one that is not a whole number")
    total, unit = None, BITS_PER_DIM
    if exists(result):
        record = read_json_object(result)
        total, unit = record.number("bits_per_dim"), record.string("unit", unit)
        if unit not in (BITS_PER_DIM, BITS_PER_LATENT):
            raise ConfigError(f"{record.name}: unit is {printable(unit, 60)!r}; write it with ddpm-ext evaluate")
    return plot_steps(path, [int(step) for step in steps], bits, total, unit)


def _csv_numbers(table: Path, rows: list[dict[str, str]], column: str) -> list[float]:
    """The finite numbers in a column; ConfigError if a cell holds something else."""
    numbers = []
    for index, row in enumerate(rows):
        cell = row[column]
        is_number = len(cell) < 40 and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", cell)
        if not is_number or not math.isfinite(float(cell)):
            where = f"{file_name(table)}, row {index + 1:,}: {column}"
            raise ConfigError(f"{where} is {printable(cell, 40)!r}, not a number; write it with ddpm-ext evaluate")
        numbers.append(float(cell))
    return numbers


def _plot_variance(folder: Path, scheduler: ResolvedConfig, path: Path) -> Path | None:
    import numpy as np

    from diffusers_ddpm_ext.plotting.chain import plot_variance

    config, shape = scheduler.values, (len(scheduler.schedule),)
    if config["v_posterior"] is None:
        return None
    curves = {"v_posterior": np.broadcast_to(np.asarray(config["v_posterior"], dtype=float), shape)}
    if config["v_decoder"] is not None:
        label = "v_decoder: of the first step of a chain"
        curves[label] = np.broadcast_to(np.asarray(config["v_decoder"], dtype=float), shape)
    return plot_variance(path, curves)


def _plot_timesteps(folder: Path, scheduler: ResolvedConfig, path: Path) -> Path | None:
    from diffusers_ddpm_ext.plotting.chain import plot_timesteps

    optimal = scheduler.values["optimal_timesteps"]
    if not optimal:
        return None
    timesteps = {int(count): list(steps) for count, steps in optimal.items()}
    return plot_timesteps(path, timesteps, len(scheduler.schedule))


PLOTS: dict[str, Callable[[Path, ResolvedConfig, Path], Path | None]] = {
    "schedule": _plot_schedule,
    "weights": _plot_weights,
    "logvar": _plot_logvar,
    "steps": _plot_steps,
    "variance": _plot_variance,
    "timesteps": _plot_timesteps,
}
