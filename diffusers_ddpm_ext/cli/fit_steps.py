"""`ddpm-ext fit-steps`: the few steps whose samples are closest to those of many, written to the pipeline's folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.arguments import (
    DEVICE_HELP,
    LOCAL_FOLDER_HELP,
    SCHEDULER_CONFIG,
    Dtype,
    check_scheduler_folder,
    open_scheduler_folder,
)
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts, read_pipeline_facts
from diffusers_ddpm_ext.cli.sample_conditions import SampleConditions, check_sample
from diffusers_ddpm_ext.cli.sample_options import SampleOptions
from diffusers_ddpm_ext.errors import ConfigError, as_config_error, as_run_error
from diffusers_ddpm_ext.pipelines.acceleration import accelerate_network, images_per_pass
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, quiet_diffusers, select_device
from diffusers_ddpm_ext.utils.files import write_text_atomically
from diffusers_ddpm_ext.utils.input_files import JsonObject, read_json_object
from diffusers_ddpm_ext.utils.memory import memory_bytes
from diffusers_ddpm_ext.utils.option import option, option_like, positional
from diffusers_ddpm_ext.utils.pipeline_files import STEPS_RECORD
from diffusers_ddpm_ext.utils.vocabulary import SAMPLE_TIMESTEPS

if TYPE_CHECKING:
    from diffusers_ddpm_ext.diffusion.step_fit import StepFit

MAX_STEPS, MAX_TRAJECTORIES = 200, 100_000
NOISE_CHECK = 4  # network calls that find out whether a scheduler draws noise
CONDITIONS = (
    *("class_labels", "concat_inputs", "concat", "image", "prompt", "negative_prompt", "prompts", "input_ids"),
    *("negative_input_ids", "text_encoder", "tokenizer", "encoder_hidden_states", "guidance_scale"),
    "guidance_interval",
)
"""Options of `sample` that say what is drawn."""
FIT_STEPS_EXAMPLES = """examples:
  ddpm-ext fit-steps runs/digits
  ddpm-ext fit-steps runs/digits --scheduler DPMSolverMultistepScheduler --num_inference_steps 6 8 12
  ddpm-ext fit-steps runs/classes --guidance_scale 3                        every class in turn, with guidance
  ddpm-ext fit-steps runs/emoji --prompts prompts.txt --guidance_scale 3
afterwards:
  ddpm-ext sample runs/digits --scheduler DDIMScheduler --num_inference_steps 10 --timesteps samples
  pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config); pipe(num_inference_steps=10, timesteps="samples")

The steps are of one class of schedulers, and best for the guidance and the conditions they were fitted with. Those of
other numbers and classes stay in the folder, which stock Diffusers can still load. --undo removes all of them."""


@dataclass(frozen=True, kw_only=True)
class FitStepsOptions:
    """Find the few steps whose samples are closest to those of many steps from the same noise, and write them.

    It needs no images. The steps are kept for each class of schedulers and each number of steps; --timesteps samples
    uses them.
    """

    folder: str = positional("FOLDER", LOCAL_FOLDER_HELP, path=True)
    scheduler: str = option(
        "DDIMScheduler", "A deterministic Diffusers scheduler by its class, to sample with.", metavar="NAME"
    )
    scheduler_args: dict[str, Any] = option_like(SampleOptions, "scheduler_args")
    num_inference_steps: tuple[int, ...] = option(
        (5, 10, 20), "Numbers of steps, each fitted on its own.", low=1, high=MAX_STEPS, metavar="K"
    )
    num_trajectories: int = option(
        64, "Samples whose distance to those of many steps is measured.", low=1, high=MAX_TRAJECTORIES
    )
    reference_steps: int | None = option(None, "The many steps.", low=2, metavar="K", unset="200, or all of fewer")
    seed: int = option(0, "Random seed of the starting noise.", low=0)
    batch_size: int | None = option_like(SampleOptions, "batch_size")
    class_labels: tuple[str, ...] | None = option_like(SampleOptions, "class_labels")
    concat_inputs: Path | None = option_like(SampleOptions, "concat_inputs")
    concat: Path | None = option_like(SampleOptions, "concat")
    image: Path | None = option_like(SampleOptions, "image")
    prompt: tuple[str, ...] | None = option_like(SampleOptions, "prompt")
    negative_prompt: tuple[str, ...] | None = option_like(SampleOptions, "negative_prompt")
    prompts: Path | None = option_like(SampleOptions, "prompts")
    input_ids: Path | None = option_like(SampleOptions, "input_ids")
    negative_input_ids: Path | None = option_like(SampleOptions, "negative_input_ids")
    text_encoder: str | None = option_like(SampleOptions, "text_encoder")
    tokenizer: str | None = option_like(SampleOptions, "tokenizer")
    encoder_hidden_states: Path | None = option_like(SampleOptions, "encoder_hidden_states")
    guidance_scale: float = option_like(SampleOptions, "guidance_scale")
    guidance_interval: tuple[float, float] | None = option_like(SampleOptions, "guidance_interval")
    undo: bool = option(False, "Remove all steps that were fitted to samples.")
    device: str | None = option(None, DEVICE_HELP, metavar="NAME", unset="the fastest available")
    dtype: Dtype = option("float32", "Precision of the network.")


def fit_steps_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    return fit_steps(parse_fit_steps_args(argv))


def parse_fit_steps_args(argv: Sequence[str]) -> FitStepsOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(FitStepsOptions, argv, "fit-steps", FIT_STEPS_EXAMPLES)
    counts = options.num_inference_steps
    if len(set(counts)) < len(counts):
        raise ConfigError(f"--num_inference_steps {' '.join(map(str, counts))} names one twice: leave one out")
    check_scheduler_folder(options.folder)
    return options


def fit_steps(options: FitStepsOptions) -> str:
    """Search for the steps, write them, and return the lines to print.

    Raises:
        ConfigError: the pipeline cannot be loaded or sampled so, or there is nothing to undo.
        RunError: the folder cannot be written.
    """
    with open_scheduler_folder(options.folder) as folder:
        return _undo(folder) if options.undo else _fit(folder, options)


def _fit(folder: Path, options: FitStepsOptions) -> str:
    facts = read_pipeline_facts(options.folder)
    assert facts is not None, "parse_fit_steps_args has checked that it is a folder"
    reference_steps = _reference_steps(options, facts.num_train_timesteps)
    _check_memory(options, facts)
    config, record = _read_config(folder), _read_record(folder)
    sample_options = _as_sample_options(options)
    read = check_sample(sample_options, facts)
    from diffusers_ddpm_ext.cli.sample import load_encoders, set_scheduler

    pipeline = load_pipeline(
        options.folder, None, select_device(options.device), options.dtype, "", load_encoders(sample_options)
    )
    set_scheduler(pipeline, options.scheduler, options.scheduler_args)
    accelerate_network(pipeline, None, compiled=False)
    name, started = type(pipeline.scheduler).__name__, time.monotonic()
    try:
        with quiet_diffusers():
            fits = _search(pipeline, options, sample_options, facts, read, reference_steps)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None
    seconds = time.monotonic() - started
    steps = {str(count): list(fit.steps) for count, fit in fits.items()}
    fitted = {**(config.content.get(SAMPLE_TIMESTEPS) or {})}
    fitted[name] = {**fitted.get(name, {}), **steps}
    fits_of_class = {**record.get(name, {}), **_record(options, fits, reference_steps)}
    _write(folder, {**config.content, SAMPLE_TIMESTEPS: fitted}, {**record, name: fits_of_class})
    return _summary(folder, name, fits, reference_steps, seconds)


def _reference_steps(options: FitStepsOptions, total: int) -> int:
    """The many steps; ConfigError unless there are more of them than of the few, and no more than T."""
    many = min(200, total) if options.reference_steps is None else options.reference_steps
    if many > total:
        raise ConfigError(f"--reference_steps {many}: {options.folder} was trained with {total} steps")
    largest = max(options.num_inference_steps)
    if largest >= many:
        raise ConfigError(f"--num_inference_steps {largest} must be below --reference_steps, {many}")
    return many


def _check_memory(options: FitStepsOptions, facts: PipelineFacts) -> None:
    """Refuse trajectories whose noises and samples exceed the machine's memory."""
    height, width = facts.image_size or (1, 1)
    needed, limit = 8 * options.num_trajectories * facts.channels * height * width, memory_bytes()
    if limit is not None and needed > limit:
        raise ConfigError(
            f"--num_trajectories {options.num_trajectories} of {height}x{width} take {needed / 1e9:.0f} GB of memory, "
            f"and this machine has {limit / 1e9:.0f}: use fewer"
        )


def _as_sample_options(options: FitStepsOptions) -> SampleOptions:
    """The same conditions for `sample`, as many as there are trajectories; latents are compared as they are."""
    return SampleOptions(
        folder=options.folder,
        num_images=options.num_trajectories,
        out=Path("samples.npy"),
        batch_size=options.batch_size,
        seed=options.seed,
        scheduler=options.scheduler,
        dtype=options.dtype,
        device=options.device,
        **{name: getattr(options, name) for name in CONDITIONS},
    )


def _search(
    pipeline: Any,
    options: FitStepsOptions,
    sample_options: SampleOptions,
    facts: PipelineFacts,
    read: SampleConditions,
    reference_steps: int,
) -> dict[int, StepFit]:
    """The best steps by their number, in ascending order: each search begins at the last one's result."""
    from tqdm import tqdm

    from diffusers_ddpm_ext.cli.sample import call_conditions
    from diffusers_ddpm_ext.diffusion import step_fit
    from diffusers_ddpm_ext.pipelines.sample_error import SampleError

    conditions = call_conditions(pipeline, sample_options, facts, read)
    guidance = {name: getattr(options, name) for name in ("guidance_scale", "guidance_interval")}

    def arguments(indices: Sequence[int]) -> dict[str, Any]:
        chosen = {name: value[[index % len(value) for index in indices]] for name, value in conditions.items()}
        return {**chosen, **guidance}

    count, fits = options.num_trajectories, {}
    batch_size = options.batch_size or images_per_pass(pipeline, count, options.guidance_scale != 1)
    batches = -(-count // batch_size)
    with tqdm(total=batches * reference_steps + NOISE_CHECK, desc="many steps", unit="step", leave=False) as bar:
        error = SampleError(
            pipeline, count, options.seed, reference_steps, batch_size, arguments, on_step=lambda: bar.update()
        )
        start = None
        for steps in sorted(options.num_inference_steps):
            bar.reset(batches * step_fit.most_calls(steps, start is not None))
            bar.set_description(f"{steps} steps")
            fits[steps] = step_fit.fit_steps(error, steps, facts.num_train_timesteps, start)
            start = fits[steps].steps
    return fits


def _read_config(folder: Path) -> JsonObject:
    """The scheduler's config; ConfigError if it has fitted steps that are damaged."""
    from diffusers_ddpm_ext.cli.pipeline_facts import DEFAULT_TIMESTEPS
    from diffusers_ddpm_ext.schedulers.named_timesteps import checked_sample_timesteps

    config = read_json_object(folder / SCHEDULER_CONFIG, allow_infinity=True)
    total = config.integer("num_train_timesteps", 1, default=DEFAULT_TIMESTEPS)
    with as_config_error(config.name):
        checked_sample_timesteps(config.content.get(SAMPLE_TIMESTEPS), total)
    return config


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """The facts of earlier fits: class -> K -> facts; empty without any."""
    if not os.path.lexists(folder / STEPS_RECORD):
        return {}
    record = read_json_object(folder / STEPS_RECORD)
    fits = record.object("fits").content
    if not all(isinstance(value, dict) for value in fits.values()):
        raise ConfigError(f"{record.name}: fits must map classes of schedulers to objects: delete the file")
    return fits


def _record(options: FitStepsOptions, fits: Mapping[int, StepFit], reference_steps: int) -> dict[str, Any]:
    """What each result depends on, by K."""
    names = ("num_trajectories", "seed", "scheduler_args", *CONDITIONS)
    settings = {
        name: str(value) if isinstance(value := getattr(options, name), Path) else value
        for name in names
        if getattr(options, name) is not None
    }
    return {
        str(count): {**settings, "reference_steps": reference_steps, "error": fit.error, "error_even": fit.error_even}
        for count, fit in fits.items()
    }


def _write(folder: Path, config: Mapping[str, Any], fits: Mapping[str, Any]) -> None:
    with as_run_error(folder):
        if fits:
            write_text_atomically(folder / STEPS_RECORD, json.dumps({"format": 1, "fits": fits}, indent=1) + "\n")
        write_text_atomically(folder / SCHEDULER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _undo(folder: Path) -> str:
    config = read_json_object(folder / SCHEDULER_CONFIG, allow_infinity=True).content
    if SAMPLE_TIMESTEPS not in config:
        raise ConfigError(f"--undo: {folder / SCHEDULER_CONFIG} has no {SAMPLE_TIMESTEPS} of a fit")
    _read_record(folder)  # only a record of ours is deleted
    _write(folder, {name: value for name, value in config.items() if name != SAMPLE_TIMESTEPS}, {})
    with as_run_error(folder):
        (folder / STEPS_RECORD).unlink(missing_ok=True)
    return f"{folder / SCHEDULER_CONFIG} has no {SAMPLE_TIMESTEPS} any more"


def _summary(folder: Path, name: str, fits: Mapping[int, StepFit], reference_steps: int, seconds: float) -> str:
    lines = [f"distance of the samples to those of {reference_steps} steps, {name}:"]
    for count, fit in fits.items():
        shown = [str(step) for step in fit.steps]
        text = " ".join(shown if count <= 20 else [*shown[:8], "...", *shown[-8:]])
        lines.append(f"{count:>4} steps  {fit.error:.4f}, evenly spaced {fit.error_even:.4f}: {text}")
    return "\n".join([*lines, f"{seconds:.0f} s; written to {folder / SCHEDULER_CONFIG}"])
