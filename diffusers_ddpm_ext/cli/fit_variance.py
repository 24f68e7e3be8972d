"""`ddpm-ext fit-variance`: fits reverse variances and optimal timesteps, and writes them to the pipeline's folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers_ddpm_ext.cli.arguments import (
    LOCAL_FOLDER_HELP,
    SCHEDULER_CONFIG,
    Dtype,
    check_scheduler_folder,
    open_scheduler_folder,
)
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.cli.measuring import (
    ConditionedUNet,
    MeasuringOptions,
    caption_encoder,
    check_bin_width,
    choose_decoder,
    ddpm_scheduler,
    image_options,
    images_of_split,
    load_images,
)
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.cli.pipeline_facts import DEFAULT_TIMESTEPS, read_pipeline_facts
from diffusers_ddpm_ext.errors import ConfigError, as_config_error, as_run_error
from diffusers_ddpm_ext.hub.card_facts import BITS_PER_DIM, BITS_PER_LATENT
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, select_device
from diffusers_ddpm_ext.utils.files import CONFIG, write_text_atomically
from diffusers_ddpm_ext.utils.input_files import MAX_TEXT_BYTES, file_name, read_json_object
from diffusers_ddpm_ext.utils.option import option, positional
from diffusers_ddpm_ext.utils.vocabulary import SAMPLE_TIMESTEPS

if TYPE_CHECKING:
    from torch import Tensor

    from diffusers_ddpm_ext.diffusion.variance_fit import VarianceFit, VarianceMeter
    from diffusers_ddpm_ext.training.data.dataset import ImageData
    from diffusers_ddpm_ext.utils.vocabulary import Decoder

FIT_RECORD = "variance_fit.json"
MAX_RECORD_BYTES = 4 * MAX_TEXT_BYTES
FIT_VARIANCE_EXAMPLES = """examples:
  ddpm-ext fit-variance runs/digits
  ddpm-ext fit-variance runs/digits --source logvar          errors from the log-variances that the run learned
  ddpm-ext fit-variance runs/photos --draws 16 --device cuda
afterwards:
  ddpm-ext evaluate runs/digits --num_inference_steps 10 --optimal_timesteps
  pipe = DDPMExtPipeline.from_pretrained("runs/digits"); pipe(num_inference_steps=10, optimal_timesteps=True)

Stock Diffusers can still load the folder: it keeps its own spacing, and fixed_small or fixed_large, whichever is
closer. The minimum of the bound is not always the best image quality; see docs/likelihood.md. --undo restores the
original scheduler settings."""


@dataclass(frozen=True, kw_only=True)
class FitVarianceOptions(MeasuringOptions):
    """Fit reverse variances and timesteps of a trained network to its training images, and write them to its folder.

    They minimize the variational bound: the reverse variance of each step (v_posterior), that of the first step of a
    chain that starts at any step (v_decoder), and the best steps for every number of steps up to --max_steps
    (optimal_timesteps).
    """

    folder: str = positional("FOLDER", LOCAL_FOLDER_HELP, path=True)
    source: Literal["measured", "logvar"] = option(
        "measured",
        "Source of the steps' errors: measured now, with the weights that sampling takes, or the learned"
        " log-variances, which describe the raw weights of an l2 loss. The decoder's cost is always measured.",
    )
    draws: int = option(64, "Images per step.", low=1)
    max_steps: int = option(100, "Choose steps for 1 to K steps.", low=1, metavar="K")
    first_step: int | None = option(
        None, "Last step of every chosen chain, e.g. 0.", low=0, metavar="T", unset="where the bound is least"
    )
    undo: bool = option(False, "Restore the scheduler settings from before the first fit.")
    dtype: Dtype = option("float32", "Precision of the network.")


def fit_variance_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_fit_variance_args(argv)
    require_modules(TRAIN_MODULES)
    return fit_variance(options)


def parse_fit_variance_args(argv: Sequence[str]) -> FitVarianceOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(FitVarianceOptions, argv, "fit-variance", FIT_VARIANCE_EXAMPLES)
    check_bin_width(options)
    check_scheduler_folder(options.folder)
    return options


def fit_variance(options: FitVarianceOptions) -> str:
    """Measure the errors, fit variances and timesteps, and write them.

    Raises:
        ConfigError: the pipeline cannot be loaded, or there is nothing to fit.
        RunError: the folder cannot be written.
    """
    with open_scheduler_folder(options.folder) as folder:
        return _undo(folder) if options.undo else _fit(folder, options)


def _fit(folder: Path, options: FitVarianceOptions) -> str:
    facts = read_pipeline_facts(options.folder)
    assert facts is not None, "parse_fit_variance_args has checked that it is a folder"
    if options.first_step is not None and options.first_step >= facts.num_train_timesteps:
        raise ConfigError(f"--first_step must be below T, {facts.num_train_timesteps}, got {options.first_step}")
    decoder = choose_decoder(options, facts)
    image_data, original = image_options(facts, options.data), _original_settings(folder)
    from diffusers_ddpm_ext.diffusion.optimal_variance import x0_error_of_logvar

    pipeline = load_pipeline(options.folder, None, select_device(options.device), options.dtype)
    _check_pipeline(options, pipeline)
    data = load_images(options.folder, pipeline, image_data, progress=True)
    scheduler = pipeline.scheduler
    schedule = scheduler.schedule
    meter = _measure(options, pipeline, data, decoder)
    try:
        error = None
        if options.source == "logvar":
            error = x0_error_of_logvar(schedule, pipeline.logvar.double().numpy())
        fit = meter.result(error)
        timesteps = fit.choose(schedule, options.max_steps, options.first_step)
    except ValueError as problem:
        raise ConfigError(f"{folder}: {problem}") from None
    changes = {
        "variance_type": "fixed_small",  # where v_posterior is near one of the two types, that one is saved
        "v_posterior": fit.optimal.v.tolist(),
        "v_decoder": fit.v_decoder.clip(0, 1).tolist(),
        "optimal_timesteps": {str(count): steps.tolist() for count, steps in timesteps.items()},
    }
    fitted = type(scheduler).from_config({**scheduler.config, **changes})
    _write(folder, fitted, _record(options, meter, fit, original))
    return _summary(folder, fit, timesteps, BITS_PER_DIM if facts.first_stage is None else BITS_PER_LATENT)


def _check_pipeline(options: FitVarianceOptions, pipeline: Any) -> None:
    """Raise ConfigError if there is nothing to fit, or no log-variances of squared errors for --source logvar."""
    from diffusers_ddpm_ext.diffusion.variance_fit import check_fixed_variance
    from diffusers_ddpm_ext.training.config.layers import read_config

    folder = options.folder
    scheduler = ddpm_scheduler(pipeline, folder, "reverse variance to fit")
    with as_config_error(folder):
        check_fixed_variance(scheduler)
    if options.source != "logvar":
        return
    if pipeline.logvar is None:
        raise ConfigError(f"--source logvar: {folder} has no learned log-variances (--learn_logvar): use measured")
    file = Path(folder) / CONFIG
    loss = read_config(str(file)).options.get("loss_type", "l2") if file.is_file() else "l2"
    if loss != "l2":
        raise ConfigError(
            f"--source logvar: the run's log-variances are of --loss_type {loss}, not of squared errors: use measured"
        )


def _measure(options: FitVarianceOptions, pipeline: Any, data: ImageData, requested: Decoder | None) -> VarianceMeter:
    """Measure with noise from the random keys of this command."""
    import torch
    from tqdm import tqdm

    from diffusers_ddpm_ext.cli.measured_latents import as_samples
    from diffusers_ddpm_ext.diffusion.levels import choose_bins
    from diffusers_ddpm_ext.diffusion.variance_fit import measure_errors
    from diffusers_ddpm_ext.utils import random_keys as keys

    network = ConditionedUNet(pipeline, caption_encoder(pipeline, data))
    device, dtype = pipeline.device, getattr(torch, options.dtype)
    images = images_of_split(data, "train")
    samples = as_samples(pipeline, images, options.seed, options.folder)

    def draw(indices: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x0 = samples.samples(indices)
        noise = keys.noise_of_steps(keys.FIT, options.seed, indices.tolist(), t.tolist(), x0.shape[1:])
        return x0.to(device), noise.to(device)

    def denoise(xt: Tensor, t: Tensor, indices: Tensor) -> Tensor:
        return network(xt.to(dtype), t, samples.conditions(indices).to(device)).float()

    with as_config_error("--decoder"):
        decoder, bin_width = choose_bins(requested, options.bin_width, images.levels)
    pipeline.unet.eval()
    total = len(pipeline.scheduler.schedule) * options.draws
    with tqdm(total=total, desc="measuring", unit="row") as bar:
        return measure_errors(
            pipeline.scheduler,
            len(images),
            draw,
            denoise,
            draws=options.draws,
            decoder=decoder,
            bin_width=bin_width,
            rows=options.batch_size,
            progress=bar.update,
        )


def _record(
    options: FitVarianceOptions, meter: VarianceMeter, fit: VarianceFit, original: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of variance_fit.json, format 1."""
    return {
        "format": 1,
        "source": options.source,
        "draws": options.draws,
        "seed": options.seed,
        "decoder": meter.decoder,
        "bin_width": None if meter.decoder == "continuous" else meter.bin_width,
        "second_moment": fit.second_moment,
        "clipped": fit.optimal.clipped.tolist(),
        "clipping_costs": fit.optimal.loss,
        "x0_error": fit.x0_error.tolist(),
        "decoder_bits": [value if value < float("inf") else None for value in fit.decoder.tolist()],
        "before": dict(original),
    }


def _original_settings(folder: Path) -> dict[str, Any]:
    """The scheduler's settings before the first fit.

    Raises:
        ConfigError: the scheduler was fitted, and the record of its original settings is damaged.
    """
    config = read_json_object(folder / SCHEDULER_CONFIG, allow_infinity=True).content
    if not config.get("optimal_timesteps") or not os.path.lexists(folder / FIT_RECORD):
        return config
    return _recorded_settings(folder)


def _recorded_settings(folder: Path) -> dict[str, Any]:
    """The original settings in the record of a fit.

    Raises:
        ConfigError: the record is damaged, or of a chain of another length.
    """
    config = read_json_object(folder / SCHEDULER_CONFIG, allow_infinity=True)
    settings = read_json_object(folder / FIT_RECORD, max_bytes=MAX_RECORD_BYTES).object("before")
    steps = settings.integer("num_train_timesteps", 1, default=DEFAULT_TIMESTEPS)
    trained = config.integer("num_train_timesteps", 1, default=DEFAULT_TIMESTEPS)
    if steps != trained:
        raise ConfigError(
            f"{folder / FIT_RECORD} is of a chain of {steps} steps, and {config.name} has {trained}: delete the former"
        )
    return settings.content


def _write(folder: Path, fitted: Any, record: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        fitted.save_pretrained(temporary)
        text = (Path(temporary) / SCHEDULER_CONFIG.name).read_text(encoding="utf-8")
    with as_run_error(folder):
        write_text_atomically(folder / FIT_RECORD, json.dumps(record) + "\n")
        write_text_atomically(folder / SCHEDULER_CONFIG, text)


def _with_current_steps(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the steps that `fit-steps` has fitted by now."""
    config = read_json_object(folder / SCHEDULER_CONFIG, allow_infinity=True).content
    others = {name: value for name, value in settings.items() if name != SAMPLE_TIMESTEPS}
    return others | {name: value for name, value in config.items() if name == SAMPLE_TIMESTEPS}


def _undo(folder: Path) -> str:
    if not os.path.lexists(folder / FIT_RECORD):
        raise ConfigError(f"--undo: {folder} has no {FIT_RECORD} of a fit")
    original = _with_current_steps(folder, _recorded_settings(folder))
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

    with as_config_error(file_name(folder / FIT_RECORD)):
        DDPMExtScheduler.from_config(original)  # settings that no scheduler takes are not written
    with as_run_error(folder):
        write_text_atomically(folder / SCHEDULER_CONFIG, json.dumps(original, indent=2, sort_keys=True) + "\n")
        (folder / FIT_RECORD).unlink()
    return f"{folder / SCHEDULER_CONFIG} has the settings from before the fit"


def _summary(folder: Path, fit: VarianceFit, timesteps: dict[int, Any], unit: str) -> str:
    v = fit.optimal.v
    lines = [
        f"v from {v[1:].min() if len(v) > 1 else v[0]:.3f} to {v.max():.3f}, mean {v.mean():.3f}: written to"
        f" {folder / SCHEDULER_CONFIG}, with the best steps for 1 to {max(timesteps)}"
    ]
    if len(fit.optimal.clipped):
        steps = fit.optimal.clipped
        lines.append(
            f"{len(steps)} step{'s' if len(steps) > 1 else ''} would need v above 1 (the first: {steps[0]}): clipped,"
            f" which costs {fit.optimal.loss:.2g} {unit}"
        )
    for count in (1, 10, 50):
        if count in timesteps:
            chosen = [str(step) for step in timesteps[count]]
            text = " ".join(chosen if count <= 12 else [*chosen[:5], "...", *chosen[-5:]])
            lines.append(f"best {count} step{'s' if count > 1 else ''}: {text}")
    return "\n".join(lines)
