"""`ddpm-ext sample`: pictures from a saved pipeline. Runs on the base install."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.sample_options import SampleOptions, parse_sample_args
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, quiet_diffusers, select_device

if TYPE_CHECKING:
    from diffusers_ddpm_ext.cli.sample_output import OneFile, PngFolder


def sample_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    return sample(parse_sample_args(argv))


def sample(options: SampleOptions) -> str:
    """Load the pipeline, draw, and write.

    Args:
        options: what was asked for.

    Returns:
        One line that says what was written where; nothing in other processes than the first.

    Raises:
        ConfigError: the pipeline cannot be opened, or does not take these options.
    """
    rank, world, device, wait, leave = _workers(options)
    asked = f"--variant {options.variant}"
    pipeline = load_pipeline(options.folder, options.variant, device, options.dtype, asked)
    _set_scheduler(pipeline, options)
    conditions = _conditions(pipeline, options)
    store = _store(pipeline, options)
    try:
        calls = _check_sampler(pipeline, options)
        if rank == 0:
            store.open()
        wait()
        missing = [index for index in range(options.num_images) if not store.has(index)]
        if rank == 0 and len(missing) < options.num_images:
            there = options.num_images - len(missing)
            sys.stderr.write(f"{there} of {options.num_images} images are there already; going on\n")
        wait()
        _draw(pipeline, options, conditions, store, missing[rank::world], calls, rank == 0)
        wait()
        leave()
        if rank:
            return ""
        store.finish(options.num_images)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{options.folder}: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or options.output_path}: {error.strerror or error}") from None
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    beside = f" and, one by one, to {options.individual}" if options.individual else ""
    return (
        f"{options.num_images} images of {height}x{width}x{pipeline.channels} written to {options.output_path}{beside}"
        f" ({calls} calls of the network each)"
    )


def _workers(options: SampleOptions) -> tuple[int, int, Any, Callable[[], None], Callable[[], None]]:
    """Number of this process, number of all, its device, how it waits for the others, and how it leaves them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, select_device(options.device), lambda: None, lambda: None
    from accelerate import PartialState

    state = PartialState(cpu=options.device == "cpu")
    device = state.device if options.device is None else select_device(options.device)
    return state.process_index, state.num_processes, device, state.wait_for_everyone, state.destroy_process_group


def _is_scheduler(kind: Any) -> bool:
    """Whether it is a class of schedulers, or what stands for one whose packages are missing."""
    from diffusers import SchedulerMixin

    backends = getattr(kind, "_backends", None)
    return isinstance(kind, type) and (issubclass(kind, SchedulerMixin) or backends is not None)


def _set_scheduler(pipeline: Any, options: SampleOptions) -> None:
    """Swap the scheduler, by the name of its class."""
    import diffusers

    name = options.scheduler
    if name is None and not options.scheduler_args:
        return
    kind: Any = type(pipeline.scheduler) if name is None else getattr(diffusers, name, None)
    if not _is_scheduler(kind):
        known = sorted({each.__name__ for each in pipeline.trained_scheduler.compatibles} | {"DDPMExtScheduler"})
        near = difflib.get_close_matches(name or "", known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(known)}"
        raise ConfigError(f"--scheduler {name} is no scheduler of Diffusers: {hint}")
    takes = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "args", "kwargs")]
    for key in options.scheduler_args:
        if key not in takes and takes:
            raise ConfigError(f"--scheduler_args {key}: {kind.__name__} takes {', '.join(takes)}")
    try:
        with quiet_diffusers():
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options.scheduler_args)
    except ImportError:
        needed = " and ".join(module for module in kind._backends if find_spec(module) is None)
        raise ConfigError(f"--scheduler {name} needs {needed}: pip install {needed}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--scheduler {kind.__name__}: {error}") from None


def _check_sampler(pipeline: Any, options: SampleOptions) -> int:
    """Refuse before anything is written what the pipeline would refuse at its first step.

    Returns:
        Number of calls of the network for an image.
    """
    from diffusers_ddpm_ext.schedulers.adapter import adapt_scheduler

    step_args = options.step_args | ({} if options.eta is None else {"eta": options.eta})
    with quiet_diffusers():
        sampler = adapt_scheduler(pipeline.scheduler, pipeline.trained_scheduler, step_args)
    known = {"optimal": True} if options.optimal_timesteps else {}
    if known and not sampler.is_ours:
        raise ConfigError(f"--optimal_timesteps needs DDPMExtScheduler; this is a {type(pipeline.scheduler).__name__}")
    steps = options.num_inference_steps or pipeline.scheduler.config.num_train_timesteps
    sampler.scheduler.set_timesteps(steps, **known)
    return len(sampler.scheduler.timesteps)


def _store(pipeline: Any, options: SampleOptions) -> OneFile | PngFolder:
    """Where images go, and what they follow from."""
    from diffusers_ddpm_ext.cli.sample_output import OneFile, PngFolder

    bit_depth = options.bit_depth
    if bit_depth == 16 and pipeline.channels != 1 and (options.is_folder or options.individual is not None):
        raise ConfigError(
            f"--bit_depth 16 writes PNG files of one channel, and the images have {pipeline.channels}: "
            "--out FILE.npz takes them, without --individual"
        )
    places = ("out", "individual", "num_images", "batch_size", "device", "bit_depth")
    settings: dict[str, Any] = {name: value for name, value in vars(options).items() if name not in places}
    settings["scheduler"] = type(pipeline.scheduler).__name__
    for name in ("concat_inputs", "encoder_hidden_states"):
        path = getattr(options, name)
        settings[name] = None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    settings["model"] = _fingerprint(pipeline)
    settings = json.loads(json.dumps(settings))
    if options.is_folder:
        return PngFolder(options.output_path, settings, bit_depth)
    return OneFile(options.output_path, settings, options.individual, bit_depth)


def _fingerprint(pipeline: Any) -> str:
    """A few numbers of every weight, and the configurations: other images, other fingerprint."""
    known = hashlib.sha256(
        repr([sorted(pipeline.unet.config.items()), sorted(pipeline.trained_scheduler.config.items())]).encode()
    )
    for name, weight in pipeline.unet.state_dict().items():
        known.update(f"{name}{weight.flatten()[:8].float().tolist()}".encode())
    return known.hexdigest()[:16]


def _draw(
    pipeline: Any,
    options: SampleOptions,
    conditions: dict[str, Any],
    store: OneFile | PngFolder,
    indices: Sequence[int],
    steps: int,
    shows: bool,
) -> None:
    """Draw images and put them where they go.

    Args:
        pipeline: with its scheduler.
        options: of the command.
        conditions: to be taken in turn.
        store: that takes the images.
        indices: of this process's images.
        steps: number of calls of the network for each.
        shows: whether to show a bar.
    """
    import numpy as np
    from tqdm import tqdm

    from diffusers_ddpm_ext.cli.sample_output import FRAMES, VIDEO
    from diffusers_ddpm_ext.utils.random_keys import generator

    batches = [indices[start : start + options.batch_size] for start in range(0, len(indices), options.batch_size)]
    wanted = {round(place * (steps - 1) / max(FRAMES - 2, 1)) for place in range(FRAMES - 1)}
    films = options.output_path.suffix.lower() == VIDEO
    frames: list[Any] = []

    def advance(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        if films and i in wanted:
            frames.append(tensors["model_input"].float().cpu().permute(0, 2, 3, 1).numpy() / 2 + 0.5)
        return {}

    with tqdm(
        total=len(batches) * steps, desc="sampling", unit="step", leave=False, disable=None if shows else True
    ) as bar:
        for batch in batches:
            frames.clear()
            images = pipeline(
                batch_size=len(batch),
                generator=[generator("sample", options.seed, index) for index in batch],
                num_inference_steps=options.num_inference_steps,
                temperature=options.temperature,
                output_type="np",
                callback_on_step_end=advance,
                callback_on_step_end_tensor_inputs=["model_input"] if films else [],
                guidance_scale=options.guidance_scale,
                guidance_interval=options.guidance_interval,
                eta=options.eta,
                step_kwargs=options.step_args,
                optimal_timesteps=options.optimal_timesteps,
                **{name: value[[index % len(value) for index in batch]] for name, value in conditions.items()},
            ).images
            levels = (np.stack([*frames, images], axis=1).clip(0, 1) * 255).round().astype(np.uint8) if films else None
            for place, index in enumerate(batch):
                store.put(index, images[place], None if levels is None else levels[place])


def _conditions(pipeline: Any, options: SampleOptions) -> dict[str, Any]:
    """What the images are conditioned on, to be taken in turn: given, and else all classes."""
    import numpy as np
    import torch

    found: dict[str, Any] = {}
    for name in ("concat_inputs", "encoder_hidden_states"):
        path = getattr(options, name)
        if path is not None:
            try:
                found[name] = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
            except (OSError, ValueError) as error:
                raise ConfigError(f"--{name} {path} cannot be read: {error}") from None
            if found[name].ndim != (4 if name == "concat_inputs" else 3) or not len(found[name]):
                raise ConfigError(f"--{name} {path} has shape {tuple(found[name].shape)}; see --help")
    if options.class_labels is not None:
        found["class_labels"] = torch.tensor(options.class_labels)
    elif pipeline.num_classes is not None and "encoder_hidden_states" not in found:
        classes, null = range(pipeline.num_classes), pipeline.config.get("null_class_label")
        found["class_labels"] = torch.tensor([label for label in classes if label != null])
    return found
