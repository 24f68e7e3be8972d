"""Checks of a run's input files that need no torch: done before it is imported and before the images are decoded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.condition_checks import TEXT_FILES, select_columns
from diffusers_ddpm_ext.training.config.data_options import as_names
from diffusers_ddpm_ext.training.config.model_file import MODEL_OPTION, read_model_file
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.array_readers import is_plain_tiff
from diffusers_ddpm_ext.training.data.caption_text import find_caption_files
from diffusers_ddpm_ext.training.data.image_files import first_image, open_image
from diffusers_ddpm_ext.training.data.metadata import find_images, read_metadata_column, require_metadata

CHANNELS_OF_MODE = {
    "1": 1, "L": 1, "I;16": 1, "I;16B": 1, "I;16L": 1, "I": 1, "RGB": 3, "YCbCr": 3, "CMYK": 3, "LAB": 3, "HSV": 3,
    "LA": 4, "RGBA": 4, "PA": 4,
}  # fmt: skip
COORDINATES = 2
FOLDER_COLUMN = "folder"


def check_input_files(config: TrainConfig) -> None:
    """Find what would stop a run after its imports and its images: a wrong network file, metadata, missing weights.

    Raises:
        ConfigError: in one sentence, as the run itself would say it later.
    """
    ckpt_path = config.start.ckpt_path
    if ckpt_path is not None and not config.resumes and not Path(ckpt_path).exists():
        raise ConfigError(f"--ckpt_path {ckpt_path} does not exist: give a checkpoint, or the folder of a pipeline")
    model = config.model
    if model.model_config_name_or_path is not None:
        network, option = read_model_file(model.model_config_name_or_path), MODEL_OPTION
    else:
        network, option = model.model_config, "--model_config"
    if network is not None and config.latents.vae is None:
        _check_channels(config, network, option)
    data = config.data
    default = None if data.dataset_name is not None else FOLDER_COLUMN
    _check_columns(config, select_columns(model.conditioning_key, vars(data), default))


def _check_channels(config: TrainConfig, network: Mapping[str, Any], option: str) -> None:
    """Compare the channels of a network's file with ``--channels``, or else with one of the images."""
    inputs, key = network.get("in_channels"), config.model.conditioning_key or ""
    if not isinstance(inputs, int) or key.startswith(("concat", "hybrid")):
        return
    channels: int | None = config.data.channels
    whose = "--channels is"
    if channels is None and config.on_digits:
        channels, whose = 1, "the digits have"
    elif channels is None and config.data.train_data_dir is not None:
        image = first_image(Path(config.data.data_dirs[0]))
        channels, whose = (None if image is None else _channels_of(image)), "the images have"
    extra = COORDINATES if config.model.use_positional_encodings else 0
    if channels is not None and inputs != channels + extra:
        positions = f" and {extra} of positions" if extra else ""
        raise ConfigError(f"{option}: in_channels is {inputs}, {whose} {channels}{positions}; see --channels.")


def _channels_of(path: Path) -> int | None:
    """Channels of an image from its header; None if Pillow does not read all of it, or only its pixels show them."""
    with suppress(Exception), warnings.catch_warnings(action="ignore"), open_image(path) as (image, _):
        return None if image.format == "TIFF" and not is_plain_tiff(image) else CHANNELS_OF_MODE.get(image.mode)
    return None


def _check_columns(config: TrainConfig, columns: Mapping[str, str]) -> None:
    """Read the metadata columns of a folder of images; their values are checked with the images."""
    data = config.data
    in_files = columns.get("captions") == TEXT_FILES
    wanted = [
        column
        for condition, column in columns.items()
        if column != FOLDER_COLUMN and not (in_files and condition == "captions")
    ]
    folders = [("--train_data_dir", folder) for folder in data.data_dirs]
    folders += [("--validation_data_dir", folder) for folder in as_names(data.validation_data_dir)]
    for option, folder in folders if wanted or in_files else ():
        found = find_images(Path(folder))
        label = f"{option} {folder!r}"
        if in_files:
            find_caption_files(f"--caption_column {TEXT_FILES} of {label}", Path(folder), found.images)
        if wanted:
            require_metadata(label, found.metadata)
        for column in wanted:
            read_metadata_column(Path(folder), found.metadata, found.images, column)
