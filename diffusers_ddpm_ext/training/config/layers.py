"""Layers of training options: YAML files, recipes, and options by name, converted and ready to be merged."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.config.autoencoder_options import TRAIN_VAE
from diffusers_ddpm_ext.training.config.checks import MODEL_SIZES
from diffusers_ddpm_ext.training.config.foreign_flags import RENAMED, explain_foreign_flag
from diffusers_ddpm_ext.training.config.option_table import TRAIN, OptionTable
from diffusers_ddpm_ext.utils.input_files import exists, read_text
from diffusers_ddpm_ext.utils.option_values import convert_value, unknown_option
from diffusers_ddpm_ext.utils.yaml_io import MAX_BYTES, load_options

# Alternative options: a layer may set one alternative, which replaces the others of earlier layers.
ALTERNATIVES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("num_epochs",), ("max_train_steps",)),
    (("train_data_dir",), ("dataset_name",)),
    (("validation_fraction",), ("validation_split",), ("validation_data_dir",)),
    (("text_encoder",), ("text_encoder_config",)),
    (("model_config_name_or_path",), ("model_config",), MODEL_SIZES),
    (("save_images_epochs",), ("save_images_steps",)),
    (("resume_from_checkpoint",), ("resume_from_hub",)),
)
# Options that are replaced together with the option that they belong to.
FOLLOWERS = {"dataset_name": ("dataset_config_name", "image_column", "dataset_weights")}


@dataclass(frozen=True)
class OptionLayer:
    """Converted options by name, and where they come from."""

    source: str
    options: dict[str, Any]


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("diffusers_ddpm_ext.training").joinpath("recipes")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str) -> OptionLayer:
    """Read the options of a recipe."""
    path = resources.files("diffusers_ddpm_ext.training").joinpath("recipes", f"{name}.yaml")
    return _read_text(path.read_text(encoding="utf-8"), name, TRAIN)


def read_config(name: str, table: OptionTable = TRAIN) -> OptionLayer:
    """Read the options of a YAML file, flat or by section; ``name`` is its path, or the name of a recipe of ``train``.

    Raises:
        ConfigError: the file is missing, is not YAML, or an option in it is wrong.
    """
    if table is TRAIN and name in recipes() and not Path(name).is_file():
        return read_recipe(name)
    if not exists(name):
        recipe = f" or a recipe{_nearest(name)}" if table is TRAIN else ""
        raise ConfigError(f"--config {printable(name, 200)} does not exist; name a YAML file{recipe}")
    return _read_text(read_text(name, "--config", MAX_BYTES), name, table)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(Path(name).stem, recipes(), n=1)
    return f": did you mean {near[0]}?" if near else ""


def replaced_options(layer: OptionLayer) -> dict[str, None]:
    """Options of earlier layers that a layer replaces by setting an alternative, each with the value None.

    The arguments of a learning-rate schedule belong to the layer that chooses it.
    """
    replaced: dict[str, None] = {"lr_scheduler_args": None} if layer.options.get("lr_scheduler") else {}
    for alternatives in ALTERNATIVES:
        chosen = [(names, name) for names in alternatives for name in names if layer.options.get(name) is not None]
        if not chosen:
            continue
        names, name = chosen[0]
        for other_names, other in chosen:
            if other_names is not names:
                raise ConfigError(f"--{name} and --{other} (both in {layer.source}) contradict: use one of them")
        for other in (other for rest in alternatives if rest is not names for other in rest):
            replaced |= dict.fromkeys((other, *FOLLOWERS.get(other, ())))
    return replaced


def _read_text(text: str, name: str, table: OptionTable) -> OptionLayer:
    try:
        options = load_options(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if not options:
        raise ConfigError(f"{name} has no options: write one a line, such as `seed: 1`, or leave --config out")
    return convert_options(options, name, table)


def convert_options(options: Mapping[str, Any], source: str = "", table: OptionTable = TRAIN) -> OptionLayer:
    """Convert options of a command from a YAML file, ``source``, or from Python.

    Raises:
        ConfigError: a name is unknown or repeated, or a value is not allowed.
    """
    converted: dict[str, Any] = {}
    for key, value in _flatten(options, source, table):
        name = table.canonical_names.get(key)
        label = f"{key} (in {source})" if source else key
        if name is None:
            error = unknown_option(
                key,
                [*table.canonical_names, *table.sections],
                dashes="",
                explain=lambda name: explain_unknown(name, table),
            )
            raise ConfigError(f"{error} (in {source})" if source else str(error))
        if name == "hub_token" and source:
            raise ConfigError(f"{label}: a token must not be in a file; set HF_TOKEN, or run `hf auth login`")
        if name in converted:
            raise ConfigError(f"{label} is set twice: leave one out")
        converted[name] = convert_value(table.options[name], value, label)
    return OptionLayer(source or "the options", converted)


def explain_unknown(name: str, table: OptionTable) -> str | None:
    """The error message for an option of another command or program (without dashes), or None if it is not known."""
    other = TRAIN_VAE if table is TRAIN else TRAIN
    here = f"not {'of' if name in other.canonical_names else 'to'} `ddpm-ext {table.command}`"
    if name in other.canonical_names:
        return f"--{name} is an option of `ddpm-ext {other.command}`, {here}"
    if name in other.sections:
        return f"{name} belongs to `ddpm-ext {other.command}`, {here}"
    if name in RENAMED and RENAMED[name].removeprefix("no_") not in table.options:
        return None
    return explain_foreign_flag(name)


def _flatten(options: Mapping[str, Any], source: str, table: OptionTable) -> Iterator[tuple[str, Any]]:
    where = f" (in {source})" if source else ""
    for key, value in options.items():
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r}{where} is not the name of an option")
        if key not in table.sections:
            yield key, value
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{key}{where} is a section: write its options below it, indented")
        for name, inner in value.items():
            option = table.options.get(table.canonical_names.get(name, ""))
            if option is not None and option.section != key:
                raise ConfigError(f"{name}{where} belongs to section {option.section}, not {key}")
            if not isinstance(name, str):
                raise ConfigError(f"key {name!r}{where} is not the name of an option")
            yield name, inner
