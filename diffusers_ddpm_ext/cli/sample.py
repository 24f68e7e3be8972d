"""`ddpm-ext sample`: draw images from a saved pipeline. Runs on the base install."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.concat_pictures import ConcatInputs
from diffusers_ddpm_ext.cli.encoder_pictures import ImageConditions, concat_images
from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts, facts_of_pipeline, read_pipeline_facts
from diffusers_ddpm_ext.cli.sample_conditions import SampleConditions, check_sample, sample_format
from diffusers_ddpm_ext.cli.sample_options import ARRAYS, SampleOptions, parse_sample_args
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.pipelines.acceleration import accelerate_network, images_per_pass
from diffusers_ddpm_ext.pipelines.loading import load_pipeline, quiet_diffusers, select_device
from diffusers_ddpm_ext.utils.vocabulary import SAMPLE_TIMESTEPS

if TYPE_CHECKING:
    from diffusers_ddpm_ext.cli.sample_drawing import Processes
    from diffusers_ddpm_ext.cli.sample_output import OneFile, SampleFolder

# options that change neither the images nor how they are drawn, or whose content is recorded in their place
NOT_IN_SETTINGS = (
    *("out", "individual", "num_images", "bit_depth", "format", "preview_channels"),
    *("batch_size", "device", "memory_format", "compile", "fast_attention"),  # of rounding alone
    *("concat", "concat_resize", "image"),
    *("prompt", "negative_prompt", "prompts", "input_ids", "negative_input_ids", "text_encoder", "tokenizer"),
)


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
    pipeline = load_pipeline(
        options.folder, options.variant, processes.device, options.dtype, variant, load_encoders(options)
    )
    if facts is None or conditions is None:
        facts = facts_of_pipeline(options.folder, pipeline)
        conditions = check_sample(options, facts)
    set_scheduler(pipeline, options.scheduler, options.scheduler_args)
    accelerate_network(pipeline, options.memory_format, options.compile, options.fast_attention == "auto")
    try:
        return _sample(pipeline, options, facts, conditions, processes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{options.folder}: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or options.output_path}: {error.strerror or error}") from None


def _sample(
    pipeline: Any, options: SampleOptions, facts: PipelineFacts, read: SampleConditions, processes: Processes
) -> str:
    """Draw and write the images; the line that says so."""
    from diffusers_ddpm_ext.cli.sample_drawing import Drawing, draw_missing

    conditions = call_conditions(pipeline, options, facts, read)
    calls = _count_network_calls(pipeline, options)
    output = _make_output(pipeline, options, facts, read, conditions.get("class_labels"), calls)
    is_main = processes.rank == 0
    if is_main:
        output.check_room(read.num_images)
    with output.locked() if is_main else nullcontext():
        if is_main:
            output.check()
        batch_size = options.batch_size or images_per_pass(pipeline, read.num_images, options.guidance_scale != 1)
        drawing = Drawing(pipeline, options, read, conditions, calls, batch_size, output.form)
        draw_missing(drawing, output, processes)
        if not is_main:
            return ""
        output.finish(read.num_images)
    height, width, channels = output.shape
    what = "latents" if facts.lacks_first_stage else "images"
    dtype = "" if output.form.own is None else f" {output.form.dtype}"
    individual = f" and, one by one, to {options.individual}" if options.individual else ""
    note = "; they are latents of an autoencoder that is not in the folder, not images" if what == "latents" else ""
    if facts.has_safety_checker:
        note += "; its safety checker was not run"
    is_chosen = options.batch_size is None and batch_size < read.num_images
    at_a_time = f", {batch_size} at a time" if is_chosen else ""
    return (
        f"{read.num_images} {what} of {height}x{width}x{channels}{dtype} written to {options.output_path}"
        f"{individual} ({calls} calls of the network each){at_a_time}{note}"
    )


def call_conditions(
    pipeline: Any, options: SampleOptions, facts: PipelineFacts, read: SampleConditions
) -> dict[str, Any]:
    """Conditions by the name of the pipeline's argument, each a sequence that is used in turn over the images."""
    conditions = _condition_tensors(pipeline, read) | read.text.arguments(options.guidance_scale != 1)
    if read.image is not None:
        conditions["image"] = ImageConditions(read.image)
    if read.pictures is not None and facts.concat_encoder is not None:
        conditions["concat_images"] = concat_images(read.pictures, facts)
    elif read.pictures is not None and facts.image_size is not None:
        conditions["concat_inputs"] = ConcatInputs(
            read.pictures, pipeline, facts.concat_channels, facts.image_size, options.seed
        )
    return conditions


def load_encoders(options: SampleOptions) -> dict[str, Any]:
    """The components of ``--text_encoder`` and ``--tokenizer``; ConfigError if one cannot be loaded."""
    places = {"text_encoder": options.text_encoder, "tokenizer": options.tokenizer}
    if options.text_encoder is not None and options.tokenizer is None and options.input_ids is None:
        places["tokenizer"] = options.text_encoder
    if not any(places.values()):
        return {}
    from diffusers_ddpm_ext.models.text_encoder import load_text_encoder, load_tokenizer

    components = {}
    for (name, place), load in zip(places.items(), (load_text_encoder, load_tokenizer), strict=True):
        if place is not None:
            try:
                components[name] = load(place)
            except ConfigError as error:
                raise ConfigError(f"--{name}: {error}") from None
    return components


def _join_processes(device_name: str | None) -> Processes:
    from diffusers_ddpm_ext.cli.sample_drawing import Processes

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, select_device(device_name), lambda: None, lambda: None)
    from accelerate import PartialState

    state = PartialState(cpu=device_name == "cpu")
    device = state.device if device_name is None else select_device(device_name)
    return Processes(
        state.process_index, state.num_processes, device, state.wait_for_everyone, state.destroy_process_group
    )


def _is_scheduler_class(value: Any) -> bool:
    """Whether it is a scheduler class of Diffusers, or the placeholder of one whose packages are missing."""
    from diffusers import SchedulerMixin

    has_backends = getattr(value, "_backends", None) is not None
    return isinstance(value, type) and (issubclass(value, SchedulerMixin) or has_backends)


def set_scheduler(pipeline: Any, name: str | None, changes: Mapping[str, Any]) -> None:
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
    from diffusers_ddpm_ext.schedulers.custom_timesteps import with_timesteps

    step_args = options.step_args | ({} if options.eta is None else {"eta": options.eta})
    with quiet_diffusers():
        sampler = adapt_scheduler(pipeline.scheduler, pipeline.trained_scheduler, step_args)
    if options.optimal_timesteps and not sampler.is_ours:
        raise ConfigError(f"--optimal_timesteps needs DDPMExtScheduler; this is a {type(pipeline.scheduler).__name__}")
    count = options.num_inference_steps
    chosen = pipeline.chosen_timesteps(count, options.timesteps, options.optimal_timesteps)
    if chosen is not None:
        return len(with_timesteps(sampler, chosen).scheduler.timesteps)
    steps = count or pipeline.scheduler.config.num_train_timesteps
    if steps == pipeline.scheduler.config.num_train_timesteps and pipeline.is_moved(sampler):
        return int(steps)
    sampler.scheduler.set_timesteps(steps)
    return len(sampler.scheduler.timesteps)


def _make_output(
    pipeline: Any, options: SampleOptions, facts: PipelineFacts, read: SampleConditions, labels: Any, calls: int
) -> OneFile | SampleFolder:
    """Where the images are written, with the settings that they depend on."""
    from diffusers_ddpm_ext.cli.sample_drawing import frame_steps
    from diffusers_ddpm_ext.cli.sample_output import VIDEO_SUFFIX, OneFile, SampleFolder, number_of

    settings = _settings(pipeline, options, facts, read, labels)
    if facts.image_size is None:
        raise ConfigError(
            f"{options.folder}: sample_size of the network is not set, so the size of an image is unknown"
        )
    shape, form = _picture_shape(pipeline, facts.image_size), sample_format(options, facts)
    named_after = read.pictures or read.image
    stem = number_of if named_after is None else named_after.stem
    if options.is_folder:
        return SampleFolder(options.output_path, settings, shape, form, stem)
    captions: Sequence[str] = [row.prompt for row in read.text.rows]
    if not captions and labels is not None and facts.class_names:
        captions = [_class_name(facts, label) for label in labels.tolist()]
    is_video = options.output_path.suffix.lower() == VIDEO_SUFFIX
    num_frames = len(frame_steps(calls)) + 1 if is_video else None
    return OneFile(
        options.output_path,
        settings,
        shape,
        form,
        num_frames,
        options.individual,
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
    settings["timesteps"] = pipeline.chosen_timesteps(options.num_inference_steps, options.timesteps)
    settings |= {"concat_inputs": None, "encoder_hidden_states": None}
    for name in ARRAYS:
        path = getattr(options, name)
        if path is not None:
            settings[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for name, pictures in (("concat", read.pictures), ("image", read.image)):
        if pictures is not None:
            settings[name] = pictures.fingerprint()
    settings |= read.text.settings()
    settings["model"] = _model_fingerprint(pipeline)
    loaded: dict[str, Any] = json.loads(json.dumps(settings))
    return loaded


def _class_name(facts: PipelineFacts, label: int) -> str:
    return facts.class_names.get(label, str(label))


def _model_fingerprint(pipeline: Any) -> str:
    """Hash of both configurations and of a few values of every weight, and of a first stage as a whole.

    Timesteps that were fitted to samples are not part of it: where they are used, the settings have them.
    """
    scheduler = {name: value for name, value in pipeline.trained_scheduler.config.items() if name != SAMPLE_TIMESTEPS}
    digest = hashlib.sha256(repr([sorted(pipeline.unet.config.items()), sorted(scheduler.items())]).encode())
    for name, weight in pipeline.unet.state_dict().items():
        digest.update(f"{name}{weight.flatten()[:8].float().tolist()}".encode())
    first_stage = pipeline.first_stage
    if first_stage is not None:
        scaling = [first_stage.shift.flatten().tolist(), first_stage.scale.flatten().tolist()]
        digest.update(f"{first_stage.content_hash()}{scaling}".encode())
    if pipeline.text_encoder_stage is not None:
        digest.update(pipeline.text_encoder_stage.content_hash().encode())
    return digest.hexdigest()[:16]


def _condition_tensors(pipeline: Any, conditions: SampleConditions) -> dict[str, Any]:
    """Conditions by the name of the pipeline's argument, used in turn over the images; by default all classes."""
    import torch

    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in conditions.arrays.items()}
    classes, has_tokens = pipeline.num_classes, "encoder_hidden_states" in tensors
    if conditions.labels is not None:
        for label in conditions.labels:
            if classes is not None and label >= classes:
                raise ConfigError(f"--class_labels {label}: the classes of this model are 0 to {classes - 1}")
        tensors["class_labels"] = torch.tensor(conditions.labels)
    elif classes is not None and (pipeline.class_embedder is None or not has_tokens):
        null_class = pipeline.config.get("null_class_label")
        labels = [label for label in range(classes) if label != null_class]
        tensors["class_labels"] = torch.tensor(labels)
    return tensors
