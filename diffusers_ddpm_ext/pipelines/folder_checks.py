"""Checks of a pipeline's folder before Diffusers builds anything from it: each fault one sentence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from diffusers_ddpm_ext.diffusion.schedule import MAX_TRAIN_TIMESTEPS
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject, file_name, open_input, read_json_object
from diffusers_ddpm_ext.utils.network_budget import check_network_config, check_network_types, least_parameters
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX, is_weights, weights_variant

UNREADABLE = (
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    ArithmeticError,
    NameError,  # UnboundLocalError: an unknown name that a constructor has no branch for
    RecursionError,
    RuntimeError,
    AssertionError,
    NotImplementedError,
    MemoryError,
    ImportError,
)
"""Errors of Diffusers about configurations and weights that do not fit its classes."""


@contextmanager
def as_folder_error(folder: Path) -> Iterator[None]:
    """Re-raise what Diffusers raises about a folder's contents as a ConfigError of one line (an OSError stays one)."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        text = printable(" ".join(str(error).split()))
        if isinstance(error, ValueError) or error.errno is None:
            raise (ConfigError if isinstance(error, ValueError) else OSError)(text) from error
        raise
    except UNREADABLE as error:
        text = printable(" ".join(str(error).split()), 300)
        raise ConfigError(f"{file_name(folder)} cannot be loaded: {type(error).__name__}: {text}") from error


def check_pipeline_folder(folder: Path, variant: str | None, replaced: frozenset[str] = frozenset()) -> None:
    """Check the configurations of a pipeline's folder, and the indexes of its weights.

    Args:
        folder: a local one.
        variant: of the weights that will be loaded.
        replaced: components that the caller passes instead of the folder's.

    Raises:
        ConfigError: a file is damaged, or describes something that cannot be loaded or is absurdly large.
    """
    if not (folder / MODEL_INDEX).is_file():
        return  # Diffusers explains what such a folder is
    index = read_json_object(folder / MODEL_INDEX)
    index.string("_class_name")
    for name, base in (("unet", ModelMixin), ("scheduler", SchedulerMixin)):
        if name not in replaced:
            _check_component(index, name, base)
    config = folder / "unet" / "config.json"
    if "unet" not in replaced and config.is_file():
        content = read_json_object(config)
        check_network_types(content.content, content.name)
        check_network_config(content.content, content.name)
        _check_weights(folder / "unet", content, variant)
    settings = folder / "scheduler" / "scheduler_config.json"
    if settings.is_file():
        chain = read_json_object(settings, allow_infinity=True)  # DPMSolver's lambda_min_clipped is -Infinity
        if "scheduler" not in replaced:  # before stock Diffusers makes tables of this length
            chain.integer("num_train_timesteps", 1, MAX_TRAIN_TIMESTEPS, 1000)


def check_complete(network: nn.Module, folder: Path) -> None:
    """Raise ConfigError if the weights lack tensors of a loaded network: Diffusers leaves them without values."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise ConfigError(
            f"{file_name(folder)}: the weights lack {len(missing)} of the network's {len(tensors)} tensors, e.g. "
            f"{missing[0]}: they are damaged, or of another model."
        )


def _check_component(index: JsonObject, name: str, base: type) -> None:
    """Check that the index names a class that the component can be of."""
    entry = index.list(name)
    if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise ConfigError(f"{index.name}: {name} is not a list of a library and a class.")
    library, class_name = entry
    if library != "diffusers":
        return
    found: Any = getattr(diffusers, class_name, None)
    fits = isinstance(found, type) and issubclass(found, base)
    if fits and base is ModelMixin:
        fits = "timestep" in inspect.signature(found.forward).parameters
    if not fits:
        what = "a network that denoises" if base is ModelMixin else "a scheduler"
        raise ConfigError(f"{index.name}: {name} is a {printable(class_name, 80)}, which is not {what} in Diffusers.")


def _check_weights(folder: Path, config: JsonObject, variant: str | None) -> None:
    """Check the indexes of shards, and that the files can hold the network that the configuration describes."""
    files = [path for path in folder.iterdir() if is_weights(path.name)]
    for path in files:
        open_input(path).close()  # a named pipe would be waited for
        if path.name.endswith(".json") and weights_variant(path.name) in (None, variant):
            shards = read_json_object(path).object("weight_map")
            if not shards.content:
                raise ConfigError(f"{shards.name} is empty: it must map the tensors to the shards that hold them.")
            for tensor in shards.content:
                if shards.string(tensor) != Path(shards.string(tensor)).name:
                    raise ConfigError(f"{shards.name}: {printable(tensor, 80)} is in a file outside the folder.")
    size, least = sum(path.stat().st_size for path in files if path.is_file()), least_parameters(config.content)
    if files and least > size:
        raise ConfigError(
            f"{config.name} describes a network of over {least:,} parameters, but the files of its weights have "
            f"{size:,} bytes: one of them is damaged, or of another model."
        )
