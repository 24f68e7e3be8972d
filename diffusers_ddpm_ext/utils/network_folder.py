"""Checks of one network's folder before and after Diffusers loads it: each fault one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject, file_name, open_input, read_json_object
from diffusers_ddpm_ext.utils.network_budget import check_network_config, check_network_types, least_parameters
from diffusers_ddpm_ext.utils.pipeline_files import is_weights, weights_variant

if TYPE_CHECKING:
    from torch import nn

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
    from safetensors import SafetensorError  # not at the top: `--help` does not wait for it

    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        text = printable(" ".join(str(error).split()))
        if isinstance(error, ValueError) or error.errno is None:
            raise (ConfigError if isinstance(error, ValueError) else OSError)(text) from error
        raise
    except (*UNREADABLE, SafetensorError) as error:
        text = printable(" ".join(str(error).split()), 300)
        raise ConfigError(f"{file_name(folder)} cannot be loaded: {type(error).__name__}: {text}") from error


def check_network_folder(folder: Path, variant: str | None = None) -> JsonObject:
    """Check a network's configuration, the indexes of its weights, and that these can be of such a network.

    Args:
        folder: with ``config.json`` and weights.
        variant: of the weights that will be loaded.

    Returns:
        The configuration.

    Raises:
        ConfigError: a file is missing or damaged, or describes something absurdly large.
    """
    config = read_json_object(folder / "config.json")
    check_network_types(config.content, config.name)
    check_network_config(config.content, config.name)
    check_weights_files(folder, variant, least_parameters(config.content), f"{config.name} describes a network")
    return config


def check_weights_files(folder: Path, variant: str | None, least: int, description: str) -> None:
    """Check the indexes of a network's weights, and that the files are large enough.

    Args:
        folder: of the network.
        variant: of the weights that will be loaded.
        least: parameters that the network has.
        description: beginning of a message: which file describes what.

    Raises:
        ConfigError: an index is damaged or names a file elsewhere, or the files are too small.
    """
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
    size = sum(path.stat().st_size for path in files if path.is_file())
    if files and least > size:
        raise ConfigError(
            f"{description} of over {least:,} parameters, but the files of its weights have {size:,} bytes: one of "
            "them is damaged, or of another model."
        )


def check_complete(network: nn.Module, folder: Path) -> None:
    """Raise ConfigError if the weights lack tensors of a loaded network: Diffusers leaves them without values."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        raise ConfigError(
            f"{file_name(folder)}: the weights lack {len(missing)} of the network's {len(tensors)} tensors, e.g. "
            f"{missing[0]}: they are damaged, or of another model."
        )


def check_all_used(network: nn.Module, folder: Path, variant: str | None = None) -> None:
    """Raise ConfigError if the weights have more tensors than a loaded network: Diffusers leaves the others out.

    Args:
        network: loaded from the folder.
        folder: with ``.safetensors`` files; others are not counted.
        variant: of the weights that were loaded, where the folder has it.
    """
    from safetensors import safe_open  # not at the top: it loads torch

    for part in dict.fromkeys((f".{variant}" if variant else "", "")):
        file = folder / f"diffusion_pytorch_model{part}.safetensors"
        index = folder / f"diffusion_pytorch_model.safetensors.index{part}.json"
        if file.is_file():
            with safe_open(file, "pt") as tensors:
                count = len(list(tensors.keys()))
        elif index.is_file():
            count = len(read_json_object(index).object("weight_map").content)
        else:
            continue
        if count > len(network.state_dict()):
            raise ConfigError(
                f"{file_name(folder)}: the weights have {count} tensors, but the network of config.json takes "
                f"{len(network.state_dict())}: they are damaged, or of another model."
            )
        return
