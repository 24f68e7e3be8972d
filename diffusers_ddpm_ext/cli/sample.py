"""`ddpm-ext sample`: draw images from a saved pipeline. Runs on the base install."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusers_ddpm_ext.cli.concat_pictures import ConcatInputs
from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts, facts_of_pipeline, read_pipeline_facts
from diffusers_ddpm_ext.cli.sample_conditions import SampleConditions, check_sample
from diffusers_ddpm_ext.cli.sample_options import SampleOptions, parse_sample_args
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, quiet_diffusers, select_device

if TYPE_CHECKING:
    from diffusers_ddpm_ext.cli.sample_output import OneFile, PngFolder

# options that change neither the images nor how they are drawn
NOT_IN_SETTINGS = ("out", "individual", "num_images", "batch_size", "device", "bit_depth", "concat")


class _Processes(NamedTuple):
    """This process among those that a launcher started."""

    rank: int
    world_size: int
    device: Any
    wait: Callable[[], None]
    leave: Callable[[], None]


def sample_command(argv: Sequence[str]) -> str:
    """Run `ddpm-ext sample`: load the pipeline, draw, and write. Collective call: every process must make it.

    Returns:
        One line that says what was written where; nothing outside the main process.

    Raises:
        ConfigError: an option is wrong, or the pipeline cannot be opened or does not accept the options.
    """
    options = parse_sample_args(argv)
    variant = f"--variant {options.variant}"
    facts = read_pipeline_facts(options.folder, options.variant, variant)
    if options.is_folder:
        from diffusers_ddpm_ext.cli.sample_output import check_unused

        check_unused(options.output_path)
    conditions = None if facts is None else check_sample(options, facts)  # before torch is imported
    processes = _join_processes(options.device)
    pipeline = load_pipeline(options.folder, options.variant, processes.device, options.dtype, variant)
    if facts is None or conditions is None:
        facts = facts_of_pipeline(options.folder, pipeline)
        conditions = check_sample(options, facts)
    _set_scheduler(pipeline, options.scheduler, options.scheduler_args)
    try:
        return _sample(pipeline, options, facts, conditions, processes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{options.folder}: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or options.output_path}: {error.strerror or error}") from None


def _sample(
    pipeline: Any, options: SampleOptions, facts: PipelineFacts, read: SampleConditions, processes: _Processes
) -> str:
    """Draw and write the images; the line that says so."""
    conditions = _condition_tensors(pipeline, read)
    if read.pictures is not None and facts.image_size is not None:
        conditions["concat_inputs"] = ConcatInputs(
            read.pictures, pipeline, facts.concat_channels, facts.image_size, options.seed
        )
    calls = _count_network_calls(pipeline, options)
    output = _make_output(pipeline, options, facts, read, conditions.get("class_labels"), calls)
    is_main = processes.rank == 0
    if is_main:
        output.check_room(read.num_images)
    with output.locked() if is_main else nullcontext():
        if is_main:
            output.check()
        _draw_missing(pipeline, options, conditions, output, read.num_images, calls, processes)
        if not is_main:
            return ""
        output.finish(read.num_images)
    height, width, channels = output.shape
    what = "latents" if facts.lacks_first_stage else "images"
    individual = f" and, one by one, to {options.individual}" if options.individual else ""
    note = "; they are latents of an autoencoder that is not in the folder, not images" if what == "latents" else ""
    return (
        f"{read.num_images} {what} of {height}x{width}x{channels} written to {options.output_path}"
        f"{individual} ({calls} calls of the network each){note}"
    )


def _join_processes(device_name: str | None) -> _Processes:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _Processes(0, 1, select_device(device_name), lambda: None, lambda: None)
    from accelerate import PartialState

    state = PartialState(cpu=device_name == "cpu")
    device = state.device if device_name is None else select_device(device_name)
    return _Processes(
        state.process_index, state.num_processes, device, state.wait_for_everyone, state.destroy_process_group
    )


def _is_scheduler_class(value: Any) -> bool:
    """Whether it is a scheduler class of Diffusers, or the placeholder of one whose packages are missing."""
    from diffusers import SchedulerMixin

    has_backends = getattr(value, "_backends", None) is not None
    return isinstance(value, type) and (issubclass(value, SchedulerMixin) or has_backends)


def _set_scheduler(pipeline: Any, name: str | None, changes: Mapping[str, Any]) -> None:
    """Replace the pipeline's scheduler by the class of a name, or change its configuration."""
    import diffusers

    if name is None and not changes:
        return
    scheduler_class: Any = type(pipeline.scheduler) if name is None else getattr(diffusers, name, None)
    if not _is_scheduler_class(scheduler_class):
        known = sorted({each.__name__ for each in pipeline.trained_scheduler.compatibles} | {"DDPMExtScheduler"})
        near = difflib.get_close_matches(name or "", known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(known)}"
        raise ConfigError(f"--scheduler {name} is not a scheduler of Diffusers: {hint}")
    parameters = inspect.signature(scheduler_class.__init__).parameters
    allowed = [key for key in parameters if key not in ("self", "args", "kwargs")]
    for key in changes:
        if key not in allowed and allowed:
            raise ConfigError(f"--scheduler_args {key}: {scheduler_class.__name__} takes {', '.join(allowed)}")
    try:
        with quiet_diffusers():
            pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **changes)
    except ImportError:
        needed = " and ".join(module for module in scheduler_class._backends if find_spec(module) is None)
        raise ConfigError(f"--scheduler {name} needs {needed}: pip install {needed}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--scheduler {scheduler_class.__name__}: {error}") from None


def _count_network_calls(pipeline: Any, options: SampleOptions) -> int:
    """Calls of the network per image.

    Raises:
        ConfigError, ValueError: the pipeline would refuse the options at its first step; raised before any file is
            written.
    """
    from diffusers_ddpm_ext.schedulers.adapter import adapt_scheduler

    step_args = options.step_args | ({} if options.eta is None else {"eta": options.eta})
    with quiet_diffusers():
        sampler = adapt_scheduler(pipeline.scheduler, pipeline.trained_scheduler, step_args)
    optimal = {"optimal": True} if options.optimal_timesteps else {}
    if optimal and not sampler.is_ours:
        raise ConfigError(f"--optimal_timesteps needs DDPMExtScheduler; this is a {type(pipeline.scheduler).__name__}")
    steps = options.num_inference_steps or pipeline.scheduler.config.num_train_timesteps
    sampler.scheduler.set_timesteps(steps, **optimal)
    return len(sampler.scheduler.timesteps)


def _make_output(
    pipeline: Any, options: SampleOptions, facts: PipelineFacts, read: SampleConditions, labels: Any, calls: int
) -> OneFile | PngFolder:
    """Where the images are written, with the settings that they depend on."""
    from diffusers_ddpm_ext.cli.sample_output import VIDEO_SUFFIX, OneFile, PngFolder, number_of

    settings = _settings(pipeline, options, facts, read, labels)
    if facts.image_size is None:
        raise ConfigError(
            f"{options.folder}: sample_size of the network is not set, so the size of an image is unknown"
        )
    shape = _picture_shape(pipeline, facts.image_size)
    stem = number_of if read.pictures is None else read.pictures.stem
    if options.is_folder:
        return PngFolder(options.output_path, settings, shape, options.bit_depth, stem)
    captions: Sequence[str] = ()
    if labels is not None and facts.class_names:
        captions = [_class_name(facts, label) for label in labels.tolist()]
    is_video = options.output_path.suffix.lower() == VIDEO_SUFFIX
    num_frames = len(_frame_steps(calls)) + 1 if is_video else None
    return OneFile(
        options.output_path,
        settings,
        shape,
        num_frames,
        options.individual,
        options.bit_depth,
        captions,
        facts.lacks_first_stage,
        stem,
    )


def _picture_shape(pipeline: Any, size: tuple[int, int]) -> tuple[int, int, int]:
    """Height, width and channels of an image, decoded if there is a first stage."""
    first_stage = pipeline.first_stage
    if first_stage is None:
        return (*size, pipeline.channels)
    return size[0] * first_stage.factor, size[1] * first_stage.factor, first_stage.pixel_channels


def _settings(
    pipeline: Any, options: SampleOptions, facts: PipelineFacts, read: SampleConditions, labels: Any
) -> dict[str, Any]:
    """Everything that the images depend on, as JSON."""
    settings = {name: value for name, value in vars(options).items() if name not in NOT_IN_SETTINGS}
    if options.class_labels is not None:
        settings["class_labels"] = labels.tolist()
        if facts.class_names:
            settings["class_names"] = [_class_name(facts, label) for label in settings["class_labels"]]
    settings["scheduler"] = type(pipeline.scheduler).__name__
    for name in ("concat_inputs", "encoder_hidden_states"):
        path = getattr(options, name)
        settings[name] = None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    if read.pictures is not None:
        settings["concat"] = read.pictures.fingerprint()
    settings["model"] = _model_fingerprint(pipeline)
    loaded: dict[str, Any] = json.loads(json.dumps(settings))
    return loaded


def _class_name(facts: PipelineFacts, label: int) -> str:
    return facts.class_names.get(label, str(label))


def _model_fingerprint(pipeline: Any) -> str:
    """Hash of both configurations and of a few values of every weight, and of a first stage as a whole."""
    digest = hashlib.sha256(
        repr([sorted(pipeline.unet.config.items()), sorted(pipeline.trained_scheduler.config.items())]).encode()
    )
    for name, weight in pipeline.unet.state_dict().items():
        digest.update(f"{name}{weight.flatten()[:8].float().tolist()}".encode())
    first_stage = pipeline.first_stage
    if first_stage is not None:
        scaling = [first_stage.shift.flatten().tolist(), first_stage.scale.flatten().tolist()]
        digest.update(f"{first_stage.content_hash()}{scaling}".encode())
    return digest.hexdigest()[:16]


def _draw_missing(
    pipeline: Any,
    options: SampleOptions,
    conditions: Mapping[str, Any],
    output: OneFile | PngFolder,
    num_images: int,
    calls: int,
    processes: _Processes,
) -> None:
    """Draw the images that the output does not have yet, this process' share of them."""
    from tqdm import tqdm

    is_main = processes.rank == 0
    processes.wait()
    existing = output.existing(num_images)
    if is_main and existing:
        sys.stderr.write(f"{len(existing)} of {num_images} images exist already; resuming\n")
    processes.wait()
    count = num_images - len(existing)
    missing = (index for index in range(num_images) if index not in existing)
    share = itertools.islice(missing, processes.rank, None, processes.world_size)
    num_batches = math.ceil(len(range(processes.rank, count, processes.world_size)) / options.batch_size)
    hidden = None if is_main else True
    started = False

    def start() -> None:
        """Write the record: only now, since the first batch shows what the network does not accept."""
        nonlocal started
        if not started:
            processes.wait()
            if is_main:
                output.start()
            processes.wait()
        started = True

    with tqdm(total=num_batches * calls, desc="sampling", unit="step", leave=False, disable=hidden) as bar:
        while batch := list(itertools.islice(share, options.batch_size)):
            chosen = {name: value[[index % len(value) for index in batch]] for name, value in conditions.items()}
            images, frames = _draw_batch(pipeline, options, chosen, batch, calls, bar.update)
            start()
            for position, index in enumerate(batch):
                output.put(index, images[position], None if frames is None else frames[position])
    start()
    processes.wait()
    processes.leave()


def _draw_batch(
    pipeline: Any,
    options: SampleOptions,
    conditions: Mapping[str, Any],
    indices: Sequence[int],
    calls: int,
    on_step: Callable[[], Any],
) -> tuple[Any, Any]:
    """Draw images by their indices, float32 (B, height, width, C) in [0, 1].

    For a video, also its frames, uint8 (B, F, height, width, C), else None.
    """
    import numpy as np

    from diffusers_ddpm_ext.cli.sample_output import VIDEO_SUFFIX
    from diffusers_ddpm_ext.utils.random_keys import generator

    is_video = options.output_path.suffix.lower() == VIDEO_SUFFIX
    frame_steps = _frame_steps(calls)
    frames: list[Any] = []

    def on_step_end(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        if is_video and i in frame_steps:
            sample = tensors["model_input"].float()
            pixels = sample if pipe.first_stage is None else pipe.decode_latents(sample)
            frames.append(pixels.cpu().permute(0, 2, 3, 1).numpy() / 2 + 0.5)
        return {}

    images = pipeline(
        batch_size=len(indices),
        generator=[generator("sample", options.seed, index) for index in indices],
        num_inference_steps=options.num_inference_steps,
        temperature=options.temperature,
        output_type="np",
        callback_on_step_end=on_step_end,
        callback_on_step_end_tensor_inputs=["model_input"] if is_video else [],
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
        eta=options.eta,
        step_kwargs=options.step_args,
        optimal_timesteps=options.optimal_timesteps,
        **conditions,
    ).images
    if not is_video:
        return images, None
    return images, (np.stack([*frames, images], axis=1).clip(0, 1) * 255).round().astype(np.uint8)


def _frame_steps(calls: int) -> set[int]:
    """The steps whose inputs are frames of a video."""
    from diffusers_ddpm_ext.cli.sample_output import NUM_FRAMES

    return {round(frame * (calls - 1) / max(NUM_FRAMES - 2, 1)) for frame in range(NUM_FRAMES - 1)}


def _condition_tensors(pipeline: Any, conditions: SampleConditions) -> dict[str, Any]:
    """Conditions by the name of the pipeline's argument, used in turn over the images; by default all classes."""
    import torch

    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in conditions.arrays.items()}
    classes = pipeline.num_classes
    if conditions.labels is not None:
        for label in conditions.labels:
            if classes is not None and label >= classes:
                raise ConfigError(f"--class_labels {label}: the classes of this model are 0 to {classes - 1}")
        tensors["class_labels"] = torch.tensor(conditions.labels)
    elif classes is not None and "encoder_hidden_states" not in tensors:
        null_class = pipeline.config.get("null_class_label")
        labels = [label for label in range(classes) if label != null_class]
        tensors["class_labels"] = torch.tensor(labels)
    return tensors
