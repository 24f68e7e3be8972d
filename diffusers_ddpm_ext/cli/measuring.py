"""What `evaluate` and `fit-variance` look at: a saved pipeline, and the images that it is asked about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.flags import Parser
from diffusers_ddpm_ext.training.config.options import OPTIONS, DataOptions
from diffusers_ddpm_ext.utils.files import CONFIG
from diffusers_ddpm_ext.utils.option import options_of
from diffusers_ddpm_ext.utils.option_values import convert_value

if TYPE_CHECKING:
    from torch import Tensor

    from diffusers_ddpm_ext.models.conditioning import Conditions
    from diffusers_ddpm_ext.training.data.dataset import ImageData
    from diffusers_ddpm_ext.training.data.image_set import ImageSet

ABOUT = """Images, by default those of the run: the default of each option is what FOLDER/config.yaml says. They are
taken as in validation: their middle, never mirrored."""


def add_measuring_flags(parser: Parser, dtypes: tuple[str, ...]) -> None:
    """Give a parser the flags of a measurement, and the data flags of the trainer in a group of their own."""
    add = parser.add_argument
    add("--seed", type=int, default=0, metavar="N", help="Of all that is drawn (default: 0).")
    add("--batch_size", type=int, default=256, metavar="N", help="Rows of the network at a time (default: 256).")
    add(
        "--decoder",
        default="exact",
        metavar="NAME",
        help="exact: the mass of a level's bin; improved_diffusion: its tanh approximation; continuous: the density,"
        " for data that are no levels (default: exact).",
    )
    add("--bin_width", type=float, metavar="X", help="Distance of two levels, data units (default: that of the data).")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest there is).")
    add("--dtype", default="float32", metavar="NAME", help=f"Of the network: {', '.join(dtypes)} (default: float32).")
    parser.add_options(options_of(DataOptions).values(), "data", ABOUT, negatable=True)


def check_measuring(options: Any, least: Mapping[str, int], allowed: Mapping[str, Sequence[str | None]]) -> None:
    """Refuse what is out of range in a command that measures.

    Args:
        options: of the command; its fields are named as the flags.
        least: smallest values of numbers, beside those of `add_measuring_flags`.
        allowed: the words of choices, beside the decoder's.

    Raises:
        ConfigError: the first fault found.
    """
    for name, low in {**least, "batch_size": 1, "seed": 0}.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name} must be at least {low}, got {value}")
    for name, words in {**allowed, "decoder": OPTIONS["decoder"].choices}.items():
        if getattr(options, name) not in words:
            listed = ", ".join(word for word in words if word)
            raise ConfigError(f"--{name} {getattr(options, name)!r} is not one of {listed}")
    width = options.bin_width
    if width is not None and not 0 < width <= 2:
        raise ConfigError(f"--bin_width must be above 0 and at most 2, got {width}; 8 bits have 2/255")
    if width is not None and options.decoder == "continuous":
        raise ConfigError(f"--bin_width {width} has no effect with --decoder continuous: leave one out")


def take_data_flags(given: dict[str, Any]) -> dict[str, Any]:
    """Take what was said about data out of the parsed arguments, converted."""
    names = [name for name, option in OPTIONS.items() if option.section == "data" and name in given]
    pairs = {name: given.pop(name) for name in names}
    return {name: convert_value(OPTIONS[name], pair[1], pair[0]) for name, pair in pairs.items() if pair is not None}


def load_images(folder: str, pipeline: Any, typed: Mapping[str, Any], progress: bool) -> ImageData:
    """The images of the run that left the pipeline, or those that the command line names.

    Args:
        folder: of the pipeline.
        pipeline: opened.
        typed: from `take_data_flags`.
        progress: whether to show a bar.

    Returns:
        The images, of the shape that the network takes.

    Raises:
        ConfigError: nothing says which images, or they do not fit the network.
    """
    from diffusers_ddpm_ext.training.config.train_config import data_options
    from diffusers_ddpm_ext.training.data.dataset import load_data

    file = Path(folder) / CONFIG
    size = pipeline.unet.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size) if size else None
    channels = pipeline.channels
    named = any(typed.get(name) is not None for name in ("train_data_dir", "dataset_name"))
    if not file.is_file() and not named and (size, channels) != ((8, 8), 1):
        raise ConfigError(
            f"{folder} does not say which images it was trained on (no {CONFIG}): give --train_data_dir or"
            " --dataset_name"
        )
    defaults = {} if size is None else {"resolution": size}
    options = data_options(file if file.is_file() else None, typed, defaults)
    data = load_data(options, pipeline.config.get("conditioning_key"), progress=progress)
    if data.channels != channels:
        raise ConfigError(
            f"{folder} makes images of {channels} channel{'s' if channels > 1 else ''}, the data have {data.channels}:"
            f" see --channels"
        )
    return data


def held_out(data: ImageData, split: str) -> ImageSet:
    """The images of a split.

    Raises:
        ConfigError: no image is held out.
    """
    if split == "train":
        return data.train
    if data.validation is None:
        raise ConfigError(
            "no image is held out: give --validation_data_dir, --validation_split or --validation_fraction, or"
            " --split train"
        )
    return data.validation


@dataclass(frozen=True)
class Caller:
    """A pipeline's network, called with conditions as data sets hold them."""

    pipeline: Any

    def __call__(self, xt: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """From noisy samples (R, C, H, W), steps (R,) and conditions to the network's output."""
        inputs, named = self.pipeline.conditioning(xt, conditions)
        output: Tensor = self.pipeline.unet(inputs, t, **named).sample
        return output
