"""Checks of options about several sources of images: their names, weights and columns, and the balance of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.training.config.data_options import as_names


def check_mixture(flat: Mapping[str, Any]) -> None:
    """Check how sources are mixed and drawn, by options of the section ``data``; see `checks.check_options`."""
    source = "train_data_dir" if flat["train_data_dir"] is not None else "dataset_name"
    names = as_names(flat[source])
    _check_different(source, names, as_names(flat["dataset_config_name"]) if source == "dataset_name" else ())
    _check_different("validation_data_dir", as_names(flat["validation_data_dir"]), ())
    for option in ("dataset_config_name", "image_column"):
        count = len(as_names(flat[option]))
        if count > 1 and count != len(names):
            raise ConfigError(
                f"--{option} has {count} names for {_count(names)} of --dataset_name: give one for all, or one each"
            )
    weights = flat["dataset_weights"]
    if weights is not None and len(names) < 2:
        raise ConfigError(
            "--dataset_weights has no effect without several folders of --train_data_dir or datasets of"
            " --dataset_name: name them all, or leave it out"
        )
    if weights is not None and len(weights) != len(names):
        raise ConfigError(
            f"--dataset_weights has {len(weights)} number{'s' if len(weights) > 1 else ''} for {_count(names)} of"
            f" --{source}: give one for each"
        )
    if weights is not None and flat.get("class_balance"):
        raise ConfigError(
            "--class_balance and --dataset_weights both say how often images are drawn: leave one of them out"
        )


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} name{'s' if len(names) != 1 else ''}"


def _check_different(option: str, names: Sequence[str], configs: Sequence[str]) -> None:
    """Refuse images that would be read twice: held out of one source, they would be trained on in the other."""
    places = [str(Path(name).resolve()) if Path(name).exists() else name for name in names]
    for i, place in enumerate(places):
        for j, other in enumerate(places):
            same = place == other and (len(configs) < 2 or configs[i] == configs[j])
            if i < j and same:
                raise ConfigError(
                    f"--{option} names {printable(names[j], 200)} twice: name it once; --dataset_weights says how"
                    " often its images are drawn"
                )
            if i != j and option.endswith("data_dir") and place != other and Path(place).is_relative_to(other):
                raise ConfigError(
                    f"--{option} {printable(names[i], 200)} is inside {printable(names[j], 200)}: its images would be"
                    " read twice; name only one of the two"
                )
