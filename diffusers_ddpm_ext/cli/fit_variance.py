"""`ddpm-ext fit-variance`: the best reverse variance and the best few steps of a network, put into its folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.arguments import PIPELINE_DTYPES, check_dtype, check_pipeline_source
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.cli.measuring import Caller, add_measuring_flags, check_measuring, load_images, take_data_flags
from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, select_device
from diffusers_ddpm_ext.training.config.flags import Parser
from diffusers_ddpm_ext.utils.files import CONFIG

if TYPE_CHECKING:
    from torch import Tensor

    from diffusers_ddpm_ext.diffusion.likelihood import Decoder

RECORD = "variance_fit.json"
SCHEDULER = Path("scheduler") / "scheduler_config.json"
HEAD = """Measure a trained network once on its training images, and write into its folder what makes the variational
bound least: the reverse variance of each step (v_posterior), that of the first step of a chain beginning anywhere
(v_decoder), and for every number of steps up to --max_steps the best ones (optimal_timesteps)."""
TAIL = """examples:
  ddpm-ext fit-variance runs/digits
  ddpm-ext fit-variance runs/digits --source logvar          errors from the log-variances that the run learned
  ddpm-ext fit-variance runs/photos --draws 16 --device cuda
afterwards:
  ddpm-ext evaluate runs/digits --num_inference_steps 10 --optimal_timesteps
  pipe = DDPMExtPipeline.from_pretrained("runs/digits"); pipe(num_inference_steps=10, optimal_timesteps=True)

Stock Diffusers still opens the folder: it keeps its own spacing, and fixed_small or fixed_large, whichever is nearer.
What is least for the bound is not always best for the eye; see docs/likelihood.md. The original scheduler settings
are restored by --undo."""


@dataclass(frozen=True)
class FitOptions:
    """What `ddpm-ext fit-variance` was asked for; checked."""

    folder: str
    data: dict[str, Any]
    source: str
    draws: int
    max_steps: int
    first_step: int | None
    decoder: Decoder
    bin_width: float | None
    seed: int
    batch_size: int
    device: str | None
    dtype: str
    undo: bool


def fit_variance_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_fit_args(argv)
    require_modules(TRAIN_MODULES)
    return fit_variance(options)


def parse_fit_args(argv: Sequence[str], prog: str = "ddpm-ext fit-variance") -> FitOptions:
    """The options of a command line, checked; arguments and errors are those of `Parser.parse_checked`."""
    parser = Parser(prog=prog, usage=f"{prog} FOLDER [options]", description=HEAD, epilog=TAIL)
    parser.add_argument("folder", metavar="FOLDER", help="Output folder of a run, or a saved pipeline.")
    add = parser.add_argument
    add(
        "--source",
        default="measured",
        metavar="{measured,logvar}",
        help="Where the steps' errors come from: measured now, with the weights that sampling takes, or the"
        " learned log-variances, which speak of the raw weights of an l2 loss. What the decoder costs is"
        " measured in both cases (default: measured).",
    )
    add("--draws", type=int, default=64, metavar="N", help="Images of each step (default: 64).")
    add("--max_steps", type=int, default=100, metavar="K", help="Choose steps for 1 to K (default: 100).")
    add(
        "--first_step",
        type=int,
        metavar="T",
        help="Make every chosen chain end at this step, e.g. 0 (default: wherever the bound is least).",
    )
    add("--undo", action="store_true", help="Put the scheduler back to what it was before the first fit.")
    add_measuring_flags(parser, PIPELINE_DTYPES)
    given = parser.parse_checked(argv)
    data = take_data_flags(given)
    options = FitOptions(data=data, **given)
    _check(options)
    return options


def _check(options: FitOptions) -> None:
    least = {"draws": 1, "max_steps": 1, "first_step": 0}
    check_measuring(options, least, {"source": ("measured", "logvar")})
    check_dtype(options.dtype)
    check_pipeline_source(options.folder)
    if not (Path(options.folder) / SCHEDULER).is_file():
        raise ConfigError(f"{options.folder} has no {SCHEDULER} to write to: give the folder of a saved pipeline")


def fit_variance(options: FitOptions) -> str:
    """Measure, choose, and write.

    Args:
        options: what was asked for.

    Returns:
        The lines to print.

    Raises:
        ConfigError: the pipeline cannot be opened, or has nothing to fit.
        RunError: the folder cannot be written.
    """
    folder = Path(options.folder)
    if options.undo:
        return _undo(folder)
    import torch
    from tqdm import tqdm

    from diffusers_ddpm_ext.diffusion.optimal_variance import x0_error_of_logvar
    from diffusers_ddpm_ext.diffusion.reverse_step import LEARNED_VARIANCES
    from diffusers_ddpm_ext.diffusion.variance_fit import measure_errors
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
    from diffusers_ddpm_ext.utils import random_keys as keys

    pipeline = load_pipeline(options.folder, None, select_device(options.device), options.dtype)
    scheduler, device = pipeline.scheduler, pipeline.device
    if not isinstance(scheduler, DDPMExtScheduler):
        raise ConfigError(f"{folder}: a {type(scheduler).__name__} has no reverse variance to fit; it needs DDPM's")
    if scheduler.config.variance_type in LEARNED_VARIANCES:
        raise ConfigError(
            f"{folder} was trained with variance_type {scheduler.config.variance_type}: its network says its own"
            " variance, nothing to fit"
        )
    if options.source == "logvar" and pipeline.logvar is None:
        raise ConfigError(f"--source logvar: {folder} has no learned log-variances (--learn_logvar): say measured")
    if options.source == "logvar":
        _check_loss(folder)
    data = load_images(options.folder, pipeline, options.data, progress=True)
    schedule, images = scheduler.schedule, data.train
    if options.first_step is not None and options.first_step >= len(schedule):
        raise ConfigError(f"--first_step must be below T, {len(schedule)}, got {options.first_step}")
    bin_width = 2 / (images.levels - 1) if options.bin_width is None else options.bin_width
    network, dtype = Caller(pipeline), getattr(torch, options.dtype)

    def draw(chosen: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x0 = images.pixels(chosen)
        noise = keys.noise_of_steps(keys.FIT, options.seed, chosen.tolist(), t.tolist(), x0.shape[1:])
        return x0.to(device), noise.to(device)

    def denoise(xt: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        return network(xt.to(dtype), t, images.conditions(chosen).to(device)).float()

    pipeline.unet.eval()
    with tqdm(total=len(schedule) * options.draws, desc="measuring", unit="row") as bar:
        meter = measure_errors(
            scheduler,
            len(images),
            draw,
            denoise,
            draws=options.draws,
            decoder=options.decoder,
            bin_width=bin_width,
            rows=options.batch_size,
            progress=bar.update,
        )
    try:
        error = None
        if options.source == "logvar" and pipeline.logvar is not None:
            error = x0_error_of_logvar(schedule, pipeline.logvar.double().numpy())
        fit = meter.result(error)
        chosen_steps = fit.choose(schedule, options.max_steps, options.first_step)
    except ValueError as problem:
        raise ConfigError(f"{folder}: {problem}") from None
    record = {
        "format": 1,
        "source": options.source,
        "draws": options.draws,
        "seed": options.seed,
        "decoder": options.decoder,
        "bin_width": None if options.decoder == "continuous" else bin_width,
        "second_moment": fit.second_moment,
        "clipped": fit.optimal.clipped.tolist(),
        "clipping_costs": fit.optimal.loss,
        "x0_error": fit.x0_error.tolist(),
        "decoder_bits": [value if value < float("inf") else None for value in fit.decoder.tolist()],
        "before": _before(folder, dict(json.loads((folder / SCHEDULER).read_text(encoding="utf-8")))),
    }
    changes = {
        "v_posterior": fit.optimal.v.tolist(),
        "v_decoder": fit.v_decoder.clip(0, 1).tolist(),
        "optimal_timesteps": {str(count): steps.tolist() for count, steps in chosen_steps.items()},
    }
    fitted = DDPMExtScheduler.from_config(scheduler.config, variance_type="fixed_small", **changes)
    _write(folder, fitted, record)
    return _told(folder, fit, chosen_steps)


def _check_loss(folder: Path) -> None:
    """Refuse log-variances that are not of squared errors, where the run says what they are of."""
    from diffusers_ddpm_ext.training.config.train_config import read_config

    file = folder / CONFIG
    loss = read_config(str(file)).options.get("loss_type", "l2") if file.is_file() else "l2"
    if loss != "l2":
        raise ConfigError(
            f"--source logvar: the run's log-variances are of --loss_type {loss}, not of squared errors: say measured"
        )


def _before(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The scheduler's settings before the first fit."""
    record = folder / RECORD
    if config.get("optimal_timesteps") and record.is_file():
        try:
            return dict(json.loads(record.read_text(encoding="utf-8"))["before"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not ours: what stands there now is all there is
    return config


def _write(folder: Path, fitted: Any, record: dict[str, Any]) -> None:
    from diffusers_ddpm_ext.utils.files import write_text_atomically

    with tempfile.TemporaryDirectory() as place:
        fitted.save_pretrained(place)
        text = (Path(place) / SCHEDULER.name).read_text(encoding="utf-8")
    try:
        write_text_atomically(folder / RECORD, json.dumps(record) + "\n")
        write_text_atomically(folder / SCHEDULER, text)
    except OSError as error:
        raise RunError(f"cannot write {error.filename or folder}: {error.strerror or error}") from None


def _undo(folder: Path) -> str:
    from diffusers_ddpm_ext.utils.files import write_text_atomically

    record = folder / RECORD
    try:
        before = json.loads(record.read_text(encoding="utf-8"))["before"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--undo: {folder} has no {RECORD} of a fit") from None
    text = json.dumps(before, indent=2, sort_keys=True) + "\n"
    try:
        write_text_atomically(folder / SCHEDULER, text)
        record.unlink()
    except OSError as error:
        raise RunError(f"cannot write {error.filename or folder}: {error.strerror or error}") from None
    return f"{folder / SCHEDULER} is what it was before the fit"


def _told(folder: Path, fit: Any, chosen: dict[int, Any]) -> str:
    v = fit.optimal.v
    lines = [
        f"v from {v[1:].min() if len(v) > 1 else v[0]:.3f} to {v.max():.3f}, mean {v.mean():.3f}: written to"
        f" {folder / SCHEDULER}, with the best steps for 1 to {max(chosen)}"
    ]
    if len(fit.optimal.clipped):
        steps = fit.optimal.clipped
        lines.append(
            f"{len(steps)} step{'s' if len(steps) > 1 else ''} would need v above 1 (the first: {steps[0]}): clipped,"
            f" which costs {fit.optimal.loss:.2g} bits per dimension"
        )
    some = [count for count in (1, 10, 50) if count in chosen]
    lines += [f"best {count} step{'s' if count > 1 else ''}: {_shown(chosen[count])}" for count in some]
    return "\n".join(lines)


def _shown(steps: Any) -> str:
    words = [str(step) for step in steps]
    return " ".join(words if len(words) <= 12 else [*words[:5], "...", *words[-5:]])
