"""Options and images that `evaluate` and `fit-variance` share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ddpm_ext.cli.arguments import DEVICE_HELP
from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts
from diffusers_ddpm_ext.errors import ConfigError, as_config_error, printable
from diffusers_ddpm_ext.pipelines.loading import select_device
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.utils.files import CONFIG
from diffusers_ddpm_ext.utils.option import embedded, option, options_of
from diffusers_ddpm_ext.utils.vocabulary import Decoder

if TYPE_CHECKING:
    from torch import Tensor

    from diffusers_ddpm_ext.models.conditioning import Conditions
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler
    from diffusers_ddpm_ext.training.data.caption_encoder import CaptionEncoder
    from diffusers_ddpm_ext.training.data.conditions import ConditionColumns
    from diffusers_ddpm_ext.training.data.dataset import ImageData
    from diffusers_ddpm_ext.training.data.image_set import ImageSet
    from diffusers_ddpm_ext.training.evaluation.processes import Processes

DATA_HELP = """Images, by default those of the run: the default of each option is its value in FOLDER/config.yaml. They
are prepared as in validation: center crop, never flipped."""


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """Options of a measurement on images."""

    seed: int = option(0, "Random seed.", low=0)
    batch_size: int = option(256, "Network inputs per forward pass; one is an image at a step.", low=1)
    decoder: Decoder | None = option(
        None,
        "exact: probability of a level's bin; improved_diffusion: its tanh approximation; continuous: density, for"
        " data without levels.",
        unset="exact, or continuous for floats and for a model of latents",
    )
    bin_width: float | None = option(
        None, "Distance of two levels, data units; 2/255 for 8 bits.", above=0, high=2, unset="from the data"
    )
    device: str | None = option(None, DEVICE_HELP, metavar="NAME", unset="the fastest available")
    data: dict[str, Any] = embedded(DataOptions, DATA_HELP)


def check_bin_width(options: MeasuringOptions) -> None:
    """Raise ConfigError if a bin width is given for a decoder without bins."""
    if options.bin_width is not None and options.decoder == "continuous":
        raise ConfigError(
            f"--bin_width {options.bin_width} has no effect with --decoder continuous: leave one of them out"
        )


def choose_decoder(options: MeasuringOptions, facts: PipelineFacts) -> Decoder | None:
    """The decoder of a measurement: ``--decoder``, None for the one that fits the data, or that of latents.

    Raises:
        ConfigError: bins for latents, which have no levels; or a model of latents without its first stage.
    """
    if facts.lacks_first_stage:
        raise ConfigError(
            f"{facts.source} generates latents of an autoencoder that is not in its folder: it cannot be measured on "
            "images"
        )
    if facts.first_stage is None:
        return options.decoder
    for name, value in (("decoder", options.decoder), ("bin_width", options.bin_width)):
        if value not in (None, "continuous"):
            raise ConfigError(
                f"--{name} {value}: the samples of {facts.source} are latents, without levels and bins: leave "
                "it out for their density"
            )
    return "continuous"


def data_inputs(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Files and folders that options on the command line read, by flag."""
    return {
        f"--{name}": typed[name] for name in options_of(DataOptions) if name.endswith("data_dir") and name in typed
    }


def ddpm_scheduler(pipeline: Any, folder: str, missing: str) -> DDPMExtScheduler:
    """The scheduler of a pipeline; ConfigError if it is of another class, which has no ``missing``."""
    from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

    if not isinstance(pipeline.scheduler, DDPMExtScheduler):
        raise ConfigError(f"{folder}: a {type(pipeline.scheduler).__name__} has no {missing}; it must be DDPM's")
    return pipeline.scheduler


def join_processes(device: str | None) -> Processes:
    """This process alone, or all processes of the launcher; ``device`` is ``--device``."""
    from diffusers_ddpm_ext.training.evaluation.processes import Processes

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, select_device(device), lambda tensor: tensor)
    from diffusers_ddpm_ext.training.distributed import make_accelerator, sum_over_ranks

    accelerator = make_accelerator(None, 1, [])
    if device is not None and select_device(device).type != accelerator.device.type:
        raise ConfigError(f"--device {device}: the launcher assigns a device to each process: leave it out")
    return Processes(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        lambda tensor: sum_over_ranks(accelerator, tensor),
    )


def image_options(facts: PipelineFacts, typed: Mapping[str, Any]) -> DataOptions:
    """The data options of a measurement: those of the run, changed by those of the command line. Loads no torch.

    Args:
        facts: of the pipeline; without a resolution anywhere, its image size is taken.
        typed: data options of the command line.

    Raises:
        ConfigError: the images are not specified, or an option is invalid.
    """
    from diffusers_ddpm_ext.training.config.train_config import data_options

    file, size = Path(facts.source) / CONFIG, facts.picture_size
    is_specified = any(typed.get(name) is not None for name in ("train_data_dir", "dataset_name"))
    if not file.is_file() and not is_specified and (size, facts.picture_channels) != ((8, 8), 1):
        raise ConfigError(
            f"{facts.source} does not name the images that it was trained on (no {CONFIG}): give --train_data_dir or"
            " --dataset_name"
        )
    defaults: dict[str, Any] = {} if size is None else {"resolution": size}
    pixels = facts.pixel_format
    if not pixels.is_8_bit and not file.is_file():
        defaults["data_range"] = (pixels.low, pixels.high)
    return data_options(file if file.is_file() else None, typed, defaults)


def load_images(folder: str, pipeline: Any, options: DataOptions, progress: bool) -> ImageData:
    """The images of a measurement, in the shape of the network's input.

    Args:
        folder: of the pipeline, for messages.
        pipeline: the loaded pipeline.
        options: from `image_options`.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: the images cannot be read, or do not fit the network.
    """
    from diffusers_ddpm_ext.training.data.dataset import load_data

    stage = pipeline.first_stage
    if stage is not None:
        with as_config_error("--resolution"):
            stage.latent_size(*options.resolution)
    key, encoder = pipeline.config.get("conditioning_key"), pipeline.text_encoder_stage
    if encoder is None and options.caption_column is not None:
        raise ConfigError(
            f"--caption_column {printable(options.caption_column, 60)}: {folder} has no text encoder: leave it out"
        )
    if encoder is not None and options.caption_column is None and options.context_column is None:
        raise ConfigError(f"{folder} takes prompts: name the column with the captions by --caption_column")
    data = load_data(options, key, tokenizer=encoder, progress=progress)
    channels = pipeline.channels if stage is None else stage.pixel_channels
    if data.channels != channels:
        raise ConfigError(
            f"{folder} makes images of {channels} channel{'s' if channels > 1 else ''}, the data have {data.channels}:"
            f" see --channels"
        )
    trained, own = pipeline.pixel_format, data.pixel_format
    if trained.dtype == own.dtype and (trained.low, trained.high) != (own.low, own.high):
        raise ConfigError(
            f"{folder} was trained on {own.dtype} from {trained.low:g} to {trained.high:g}, and the data are from "
            f"{own.low:g} to {own.high:g}: give --data_range {trained.low:g} {trained.high:g}"
        )
    if data.train.columns is not None:
        _check_conditions(folder, pipeline, data.train.columns)
    return data


def _check_conditions(folder: str, pipeline: Any, columns: ConditionColumns) -> None:
    """Refuse conditions of other classes or shapes than the network was trained with."""
    labels, classes, read = columns.labels, pipeline.num_classes, columns.class_labels
    names = dict(enumerate(read.names)) if read is not None and read.are_named else {}
    for number, name in pipeline.class_names.items():
        if names and names.get(number, name) != name:
            raise ConfigError(
                f"class {number} of the data is {printable(names[number], 60)!r}, and that of {folder} is "
                f"{printable(name, 60)!r}: give images with the folders or names of all its classes"
            )
    is_number = labels is not None and not labels.is_floating_point()
    if labels is not None and is_number and classes is not None and int(labels.max()) >= classes:
        raise ConfigError(f"the data have a class {int(labels.max())}; the classes of {folder} are 0 to {classes - 1}")
    config = pipeline.unet.config
    if columns.concat is not None and pipeline.channels + _joined_channels(pipeline, columns) > config.in_channels:
        raise ConfigError(
            f"the images joined to the input have {columns.concat.channels} channels: with {pipeline.channels} of the "
            f"sample these are more than the {config.in_channels} that {folder} takes"
        )
    width = config.get("cross_attention_dim")
    if columns.contexts is not None and isinstance(width, int) and columns.contexts[0].shape[-1] != width:
        raise ConfigError(
            f"the embeddings are {columns.contexts[0].shape[-1]} wide, and the cross attention of {folder} {width}"
        )


def _joined_channels(pipeline: Any, columns: ConditionColumns) -> int:
    """Channels that images joined to the input have there: those of their latents if these are joined."""
    channels = 0 if columns.concat is None else columns.concat.channels
    if pipeline.first_stage is None:
        return channels
    from diffusers_ddpm_ext.models.concat_condition import concat_channels

    with as_config_error("--concat_column"):
        return concat_channels(pipeline.first_stage, channels, pipeline.config.get("concat_through_vae"))


IS_STREAM = "the training images are a stream, of which only a sample is in memory: --streaming false reads them all"


def images_of_split(data: ImageData, split: str) -> ImageSet:
    """The images of a split; ConfigError if none are held out, or if those to train on are a stream."""
    if split == "train":
        if data.stream is not None:
            raise ConfigError(IS_STREAM)
        return data.train
    if data.validation is None:
        fraction = "--validation_fraction" if data.stream is None else "--validation_examples"
        raise ConfigError(
            f"no images are held out: give --validation_data_dir, --validation_split or {fraction}, or --split train"
        )
    return data.validation


def caption_encoder(pipeline: Any, data: ImageData) -> CaptionEncoder | None:
    """The text encoder of a pipeline, with the captions of the data; None where these have none."""
    if data.captions is None or data.train.columns is None or data.train.columns.captions is None:
        return None
    from diffusers_ddpm_ext.training.data.caption_encoder import CaptionEncoder

    stage = pipeline.text_encoder_stage
    encoder = CaptionEncoder(stage, stage.content_hash())
    encoder.read(data.captions, use_cache=True)
    return encoder


@dataclass(frozen=True)
class ConditionedUNet:
    """A pipeline's network, called with the conditions of a dataset.

    Attributes:
        pipeline: whose network it is.
        captions: from `caption_encoder`.
    """

    pipeline: Any
    captions: CaptionEncoder | None = None

    def __call__(self, xt: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Map noisy samples (R, C, H, W), steps (R,) and conditions to the network's output."""
        if self.captions is not None:
            conditions = self.captions.encode_conditions(conditions)
        table = self.pipeline.class_embedder
        if table is not None and conditions.class_labels is not None:
            conditions = conditions.with_class_tokens(table)
        inputs, named = self.pipeline.conditioning(xt, conditions)
        output: Tensor = self.pipeline.unet(inputs, t, **named).sample
        return output
