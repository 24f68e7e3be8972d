"""`ddpm-ext sample`: draw images from a saved pipeline. Runs on the base install."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusers_ddpm_ext.cli.sample_options import SampleOptions, parse_sample_args
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, quiet_diffusers, select_device

if TYPE_CHECKING:
    from diffusers_ddpm_ext.cli.sample_output import OneFile, PngFolder

# options that change neither the images nor how they are drawn
NOT_IN_SETTINGS = ("out", "individual", "num_images", "batch_size", "device", "bit_depth")


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
    processes = _join_processes(options.device)
    variant = f"--variant {options.variant}"
    pipeline = load_pipeline(options.folder, options.variant, processes.device, options.dtype, variant)
    _set_scheduler(pipeline, options.scheduler, options.scheduler_args)
    conditions = _load_conditions(pipeline, options)
    output = _make_output(pipeline, options)
    try:
        calls = _count_network_calls(pipeline, options)
        _draw_missing(pipeline, options, conditions, output, calls, processes)
        if processes.rank:
            return ""
        output.finish(options.num_images)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{options.folder}: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or options.output_path}: {error.strerror or error}") from None
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    individual = f" and, one by one, to {options.individual}" if options.individual else ""
    return (
        f"{options.num_images} images of {height}x{width}x{pipeline.channels} written to {options.output_path}"
        f"{individual} ({calls} calls of the network each)"
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


def _make_output(pipeline: Any, options: SampleOptions) -> OneFile | PngFolder:
    """Where the images are written, with the settings that they depend on."""
    from diffusers_ddpm_ext.cli.sample_output import OneFile, PngFolder

    bit_depth = options.bit_depth
    if bit_depth == 16 and pipeline.channels != 1 and (options.is_folder or options.individual is not None):
        raise ConfigError(
            f"--bit_depth 16 writes PNG files of one channel, and the images have {pipeline.channels}: "
            "use --out FILE.npz without --individual"
        )
    settings = {name: value for name, value in vars(options).items() if name not in NOT_IN_SETTINGS}
    settings["scheduler"] = type(pipeline.scheduler).__name__
    for name in ("concat_inputs", "encoder_hidden_states"):
        path = getattr(options, name)
        settings[name] = None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    settings["model"] = _model_fingerprint(pipeline)
    settings = json.loads(json.dumps(settings))
    if options.is_folder:
        return PngFolder(options.output_path, settings, bit_depth)
    return OneFile(options.output_path, settings, options.individual, bit_depth)


def _model_fingerprint(pipeline: Any) -> str:
    """Hash of both configurations and of a few values of every weight."""
    digest = hashlib.sha256(
        repr([sorted(pipeline.unet.config.items()), sorted(pipeline.trained_scheduler.config.items())]).encode()
    )
    for name, weight in pipeline.unet.state_dict().items():
        digest.update(f"{name}{weight.flatten()[:8].float().tolist()}".encode())
    return digest.hexdigest()[:16]


def _draw_missing(
    pipeline: Any,
    options: SampleOptions,
    conditions: Mapping[str, Any],
    output: OneFile | PngFolder,
    calls: int,
    processes: _Processes,
) -> None:
    """Draw the images that the output does not have yet, this process' share of them."""
    from tqdm import tqdm

    is_main = processes.rank == 0
    if is_main:
        output.open()
    processes.wait()
    missing = [index for index in range(options.num_images) if not output.has(index)]
    if is_main and len(missing) < options.num_images:
        existing = options.num_images - len(missing)
        sys.stderr.write(f"{existing} of {options.num_images} images exist already; resuming\n")
    processes.wait()
    share = missing[processes.rank :: processes.world_size]
    batches = [share[start : start + options.batch_size] for start in range(0, len(share), options.batch_size)]
    hidden = None if is_main else True
    with tqdm(total=len(batches) * calls, desc="sampling", unit="step", leave=False, disable=hidden) as bar:
        for batch in batches:
            chosen = {name: value[[index % len(value) for index in batch]] for name, value in conditions.items()}
            images, frames = _draw_batch(pipeline, options, chosen, batch, calls, bar.update)
            for position, index in enumerate(batch):
                output.put(index, images[position], None if frames is None else frames[position])
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

    from diffusers_ddpm_ext.cli.sample_output import NUM_FRAMES, VIDEO_SUFFIX
    from diffusers_ddpm_ext.utils.random_keys import generator

    is_video = options.output_path.suffix.lower() == VIDEO_SUFFIX
    frame_steps = {round(frame * (calls - 1) / max(NUM_FRAMES - 2, 1)) for frame in range(NUM_FRAMES - 1)}
    frames: list[Any] = []

    def on_step_end(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        if is_video and i in frame_steps:
            frames.append(tensors["model_input"].float().cpu().permute(0, 2, 3, 1).numpy() / 2 + 0.5)
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


def _load_conditions(pipeline: Any, options: SampleOptions) -> dict[str, Any]:
    """Conditions by the name of the pipeline's argument, used in turn over the images; by default all classes."""
    import numpy as np
    import torch

    conditions: dict[str, Any] = {}
    for name, dimensions in (("concat_inputs", 4), ("encoder_hidden_states", 3)):
        path = getattr(options, name)
        if path is None:
            continue
        try:
            conditions[name] = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--{name} {path} cannot be read: {error}") from None
        if conditions[name].ndim != dimensions or not len(conditions[name]):
            raise ConfigError(f"--{name} {path} has shape {tuple(conditions[name].shape)}; see --help")
    if options.class_labels is not None:
        conditions["class_labels"] = torch.tensor(options.class_labels)
    elif pipeline.num_classes is not None and "encoder_hidden_states" not in conditions:
        null_class = pipeline.config.get("null_class_label")
        labels = [label for label in range(pipeline.num_classes) if label != null_class]
        conditions["class_labels"] = torch.tensor(labels)
    return conditions
