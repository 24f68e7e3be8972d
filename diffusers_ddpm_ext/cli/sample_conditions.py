"""Conditions of `ddpm-ext sample`: class labels, arrays and pictures, checked against the pipeline's configuration.

Everything here runs before torch is imported where the pipeline is a folder: a wrong label, file or option is told at
once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.concat_pictures import (
    PictureFolder,
    check_channels,
    check_turns,
    find_pictures,
    resizing_of_run,
)
from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts
from diffusers_ddpm_ext.cli.sample_options import DEFAULT_IMAGES, SampleOptions
from diffusers_ddpm_ext.cli.text_conditions import TEXT_SOURCES, TextConditions, check_text, token_options
from diffusers_ddpm_ext.errors import ConfigError, as_config_error, printable
from diffusers_ddpm_ext.pipelines.class_names import label_of_name
from diffusers_ddpm_ext.utils.array_files import read_array
from diffusers_ddpm_ext.utils.input_files import read_text
from diffusers_ddpm_ext.utils.memory import memory_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diffusers_ddpm_ext.cli.sample_files import SampleFormat

MAX_DIGITS = 18
LARGEST = {"float32": 3.4028234e38, "bfloat16": 3.3895313e38, "float16": 65504.0}
"""The largest finite number of each precision."""


@dataclass(frozen=True)
class SampleConditions:
    """What the images are conditioned on, used in turn over them.

    Attributes:
        labels: class numbers, as typed; None without ``--class_labels``.
        arrays: concat_inputs (N, C, height, width) and encoder_hidden_states (N, tokens, width), float32, by name.
        pictures: of ``--concat``; None without it.
        image: pictures of ``--image``; None without it.
        text: prompts or token ids.
        num_images: to draw: ``--num_images``, or one for each picture or prompt of a file, or 16.
    """

    labels: tuple[int, ...] | None
    arrays: dict[str, NDArray[Any]]
    pictures: PictureFolder | None
    image: PictureFolder | None
    text: TextConditions
    num_images: int


def check_sample(options: SampleOptions, facts: PipelineFacts) -> SampleConditions:
    """Check options against a pipeline's configuration, and read the conditions.

    Raises:
        ConfigError: a condition is missing, unknown, not finite, or not of the network's shape; or an option does not
            fit the model.
    """
    _check_scheduler_name(options.scheduler)
    plain_array = options.writes_array and options.individual is None and options.bit_depth != 16
    if facts.lacks_first_stage and not plain_array:
        raise ConfigError(
            f"--out {options.output_path}: the samples of {facts.source} are latents of an autoencoder that is not in "
            "its folder, not images: use --out FILE.npy or FILE.npz (without --individual or --bit_depth), and decode "
            "them"
        )
    _check_presence(options, facts)
    text = check_text(options, facts)
    if options.concat is not None:
        check_channels(facts)
    pictures = None
    if options.concat is not None:
        resizing = resizing_of_run(Path(facts.source), options.concat_resize)
        pictures = replace(find_pictures(options.concat), resizing=resizing)
    image = None if options.image is None else find_pictures(options.image, "--image")
    num_images = _num_images(options, text, pictures, image)
    labels = None if options.class_labels is None else read_labels(options.class_labels, facts)
    arrays = {
        name: read_condition(f"--{name}", path, _expected_shape(name, facts), options.dtype)
        for name in ("concat_inputs", "encoder_hidden_states")
        if (path := getattr(options, name)) is not None
    }
    steps, trained = options.num_inference_steps, facts.num_train_timesteps
    if steps is not None and options.scheduler is None and not options.scheduler_args and steps > trained:
        raise ConfigError(f"--num_inference_steps {steps}: {facts.source} was trained with {trained} steps")
    sample_format(options, facts)
    _check_memory(options, facts, num_images)
    return SampleConditions(labels, arrays, pictures, image, text, num_images)


def sample_format(options: SampleOptions, facts: PipelineFacts) -> SampleFormat:
    """The values of the samples and the files of single ones.

    Raises:
        ConfigError: a file type cannot hold them, needs a package that is missing, or a channel does not exist.
    """
    from diffusers_ddpm_ext.cli.sample_files import SampleFormat, check_format, require_tifffile

    pixels, channels = facts.pixel_format, facts.picture_channels
    is_own = options.bit_depth is None and not facts.lacks_first_stage
    is_own &= not pixels.is_8_bit or pixels.suffix != ".png"
    suffix = pixels.suffix if options.format is None and is_own else f".{options.format or 'png'}"
    preview = pixels
    if options.preview_channels is not None:
        with as_config_error("--preview_channels"):
            preview = replace(pixels, preview_channels=options.preview_channels)
            preview.check_channels(channels)
    form = SampleFormat(channels, pixels if is_own else None, options.bit_depth or 8, suffix, preview)
    if options.is_folder or options.individual is not None:
        check_format(
            f"--out {options.output_path}" if options.is_folder else f"--individual {options.individual}", form
        )
    if options.output_path.suffix.lower() in (".tif", ".tiff"):
        require_tifffile()
    return form


def _num_images(
    options: SampleOptions, text: TextConditions, pictures: PictureFolder | None, image: PictureFolder | None
) -> int:
    """Images to draw: as many as were asked for, or one for each picture or prompt of a file.

    Raises:
        ConfigError: there are more or fewer pictures than prompts, or two images would have one name.
    """
    counts = {
        "--concat": len(pictures.names) if pictures is not None else 0,
        "--image": len(image.names) if image is not None else 0,
        "--prompts": len(text.rows) if options.prompts is not None else 0,
    }
    several = {name: count for name, count in counts.items() if count > 1}
    if len(set(several.values())) > 1:
        (one, first), (other, second) = list(several.items())[:2]
        if first == second:
            other, second = list(several.items())[2]
        raise ConfigError(
            f"{one} has {first} and {other} has {second}: give as many of both, which belong together in their order, "
            "or one for all"
        )
    count = options.num_images or max(counts.values()) or DEFAULT_IMAGES
    if pictures is not None:
        check_turns(pictures, count)
    elif image is not None:
        check_turns(image, count, "--image")
    return count


def read_labels(texts: Sequence[str], facts: PipelineFacts) -> tuple[int, ...]:
    """Class numbers of names and numbers, several to a text if commas are between them.

    A text that is the name of a class is that class, even if it is made of digits.

    Raises:
        ConfigError: a name is unknown, or a number is not a class.
    """
    labels = [label for text in texts for label in _labels_of(text.strip(), facts.class_names)]
    for label in labels:
        if facts.num_classes is not None and label >= facts.num_classes:
            raise ConfigError(
                f"--class_labels {label}: the classes of {facts.source} are 0 to {facts.num_classes - 1}"
            )
    return tuple(labels)


def _labels_of(text: str, names: dict[int, str]) -> list[int]:
    parts = [text] if text in names.values() else text.replace(",", " ").split()
    if parts != [text] and all(_is_number(part) for part in parts):
        return [int(part) for part in parts]
    if _is_number(text) and text not in names.values():
        return [int(text)]
    try:
        return [label_of_name(text, names)]
    except ConfigError as error:
        parts = [part.strip() for part in text.split(",")]
        if len(parts) > 1 and all(parts):
            return [label for part in parts for label in _labels_of(part, names)]
        raise ConfigError(f"--{error}") from None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS


def read_condition(option: str, path: Path, shape: tuple[int | None, ...], dtype: str) -> NDArray[Any]:
    """An array of conditions as float32, one per row.

    Args:
        option: for messages.
        path: a .npy file.
        shape: of a row; None where any length is allowed.
        dtype: precision of the network, which every value must fit.

    Raises:
        ConfigError: it cannot be read, has another shape or no row, or a value that is not finite in that precision;
            the message names the row.
    """
    import numpy as np

    array = read_array(path, option)
    label = f"{option} {path}"
    right = array.ndim == len(shape) + 1 and all(map(_matches, shape, array.shape[1:]))
    if not right or 0 in array.shape:
        expected = ", ".join("any" if length is None else str(length) for length in shape)
        raise ConfigError(f"{label} has shape {array.shape}; the network takes (N, {expected}), with N at least 1")
    if array.dtype.kind not in "iuf":
        raise ConfigError(f"{label} holds values of type {array.dtype}, not numbers: save it as float32")
    rows = array.reshape(len(array), -1)
    fits = (np.abs(rows) <= LARGEST[dtype]).all(axis=1)  # false for NaN
    if not fits.all():
        row = int(np.argmin(fits))
        fault = f"is too large for {dtype}" if np.isfinite(rows[row]).all() else "is NaN or infinite"
        raise ConfigError(f"{label}: a value of row {row} {fault}; every value must be a finite number")
    converted: NDArray[Any] = array.astype(np.float32)
    return converted


def _matches(wanted: int | None, length: int) -> bool:
    return wanted is None or wanted == length


def _expected_shape(name: str, facts: PipelineFacts) -> tuple[int | None, ...]:
    if name == "encoder_hidden_states":
        return None, facts.token_width
    return facts.concat_channels, *(facts.image_size or (None, None))


def _check_scheduler_name(name: str | None) -> None:
    """Refuse a misspelled scheduler, by the names in Diffusers' sources: importing them takes seconds."""
    spec = find_spec("diffusers")
    if name is None or spec is None or spec.origin is None:
        return
    source = Path(spec.origin).with_name("schedulers") / "__init__.py"
    known = {"DDPMExtScheduler", *re.findall(r'"(\w+Scheduler)"', read_text(source))} if source.is_file() else {name}
    near = [] if name in known else difflib.get_close_matches(name, sorted(known), n=1)
    if near:
        raise ConfigError(f"--scheduler {name} is not a scheduler of Diffusers: did you mean {near[0]}?")


def _check_presence(options: SampleOptions, facts: PipelineFacts) -> None:
    """Refuse conditions that the model needs and are missing, or that it does not take."""
    key = facts.conditioning_key
    wanted = {
        "class_labels": facts.takes_labels,
        "concat": facts.takes_concat_inputs,
        "concat_inputs": facts.takes_concat_inputs,
        "image": facts.takes_image,
        **dict.fromkeys(
            ("encoder_hidden_states", *TEXT_SOURCES, "text_encoder", "tokenizer"), facts.takes_hidden_states
        ),
    }
    for name, takes in wanted.items():
        value = getattr(options, name)
        if value is not None and not takes:
            shown = printable(" ".join(value) if isinstance(value, tuple) else str(value), 120)
            raise ConfigError(
                f"--{name} {shown}: {facts.source} takes none (its conditioning_key is {key}); leave it out"
            )
    if facts.takes_concat_inputs and options.concat is None and options.concat_inputs is None:
        raise ConfigError(
            f"{facts.source} needs --concat DIR or --concat_inputs FILE.npy: its conditioning_key is {key}"
        )
    if facts.image_is_label and options.image is None and options.class_labels is None:
        raise ConfigError(f"{facts.source} needs --image DIR: its conditioning_key is {key}")
    if facts.takes_hidden_states and not facts.has_class_embedder and not token_options(options, facts):
        raise ConfigError(f"{facts.source} needs {_text_options(facts)}: its conditioning_key is {key}")
    if options.guidance_scale != 1 and not any(wanted.values()):
        raise ConfigError(
            f"--guidance_scale {options.guidance_scale:g}: {facts.source} is unconditional; leave it out"
        )


def _text_options(facts: PipelineFacts) -> str:
    """The options that give a model its tokens of cross attention, for a message."""
    if facts.takes_image and not facts.image_is_label:
        return "--image DIR"
    if facts.text_encoder is None:
        return "--encoder_hidden_states FILE.npy, or --prompt TEXT with --text_encoder FOLDER_OR_ID"
    if facts.text_encoder.has_tokenizer:
        return "--prompt TEXT or --prompts FILE"
    return "--prompt TEXT with --tokenizer FOLDER_OR_ID, or --input_ids FILE.npy"


def _check_memory(options: SampleOptions, facts: PipelineFacts, num_images: int) -> None:
    """Refuse a batch whose samples alone (on the CPU with the first layer's output) exceed the machine's memory."""
    if facts.image_size is None:
        return
    height, width = facts.image_size
    batch, limit = min(options.batch_size or 1, num_images), memory_bytes()
    values = 2 * facts.channels + (facts.first_width if options.device == "cpu" else 0)
    needed = 4 * batch * height * width * values
    if limit is not None and needed > limit:
        raise ConfigError(
            f"--batch_size {options.batch_size or 1}: a batch of {batch} images of {height}x{width} takes over "
            f"{needed / 1e9:.0f} GB of memory, and this machine has {limit / 1e9:.0f}: use a smaller one"
        )
