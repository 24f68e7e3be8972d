"""Options of a run with ``--streaming``: defaults, and what contradicts a stream. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.config.data_options import as_names

EPOCH_OPTIONS = {
    "num_epochs": "--max_train_steps",
    "save_images_epochs": "--save_images_steps",
    "save_model_epochs": "--validation_steps, which keeps the best pipeline",
}
"""Options that count epochs, and what counts steps."""
NEEDS_ALL_IMAGES = {
    "validation_fraction": "hold out the first ones by --validation_examples",
    "cache_latents": "leave it out to encode the images each time",
    "caption_column": "leave --streaming out",
    "concat_column": "leave --streaming out",
}
"""Options that need all images before the run, and the way out."""
SOURCES = ("train_data_dir", "dataset_name")


def streaming_defaults(flat: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a run with ``--streaming`` or ``--validation_examples``, for options that are not set explicitly."""
    if not flat["streaming"]:
        replaced = flat["validation_examples"] is not None and "validation_fraction" not in explicit
        return {"validation_fraction": None} if replaced else {}
    return dict.fromkeys(name for name in (*EPOCH_OPTIONS, "validation_fraction") if name not in explicit)


def has_validation_images(flat: Mapping[str, Any]) -> bool:
    """Whether the options hold images out for validation."""
    return bool(flat["validation_fraction"] or flat["validation_examples"]) or (
        flat["validation_split"] is not None or flat["validation_data_dir"] is not None
    )


def check_streaming_data(flat: Mapping[str, Any]) -> None:
    """Check the options of section ``data`` against ``--streaming``; a ConfigError for the first contradiction."""
    if flat["validation_examples"] is not None and flat["validation_fraction"]:
        raise ConfigError("--validation_examples and --validation_fraction contradict: use one of them")
    if not flat["streaming"]:
        if flat.get("class_names") is not None:
            raise ConfigError("--class_names has no effect without --streaming: add that, or leave --class_names out")
        return
    if flat["train_data_dir"] is None and flat["dataset_name"] is None:
        raise ConfigError("--streaming needs --dataset_name or --train_data_dir: the digits are in memory")
    if flat["dataset_weights"] is None and max(len(as_names(flat[name])) for name in SOURCES) > 1:
        raise ConfigError(
            "--streaming needs --dataset_weights for several folders or datasets, since a stream has no size (a"
            " pattern of files in quotes is one dataset)"
        )
    if flat.get("class_balance"):
        raise ConfigError("--class_balance contradicts --streaming: it needs the classes of all images before the run")
    if flat["cache_images"] == "always":
        raise ConfigError("--cache_images always contradicts --streaming, which keeps no image: leave one of them out")
    names = flat.get("class_names")
    if names is not None and (len(set(names)) < len(names) or not all(name.strip() for name in names)):
        raise ConfigError(f"--class_names {printable(' '.join(names), 200)}: names must differ, and not be empty")
    if names is not None and flat["class_column"] is None:
        raise ConfigError("--class_names has no effect without --class_column: add that, or leave --class_names out")


def check_streaming_run(flat: Mapping[str, Any]) -> None:
    """Check the other options of a run against ``--streaming``; a ConfigError for the first contradiction."""
    if not flat["streaming"]:
        return
    if flat["max_train_steps"] is None:
        raise ConfigError("--streaming needs --max_train_steps: such a run has steps instead of epochs")
    for name, instead in EPOCH_OPTIONS.items():
        if flat[name] is not None:
            raise ConfigError(f"--{name} {flat[name]} contradicts --streaming, which has no epochs: use {instead}")
    for name, instead in NEEDS_ALL_IMAGES.items():
        if flat.get(name):
            raise ConfigError(f"--{name} {printable(str(flat[name]), 100)} contradicts --streaming: {instead}")
