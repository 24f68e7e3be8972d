"""Loading of an autoencoder from a folder or a repository, its own or a pipeline's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.models.component_folder import as_hub_error, find_component
from diffusers_ddpm_ext.models.latent_scale import CLASS_NAMES, KINDS, SLOTS, compression_factor, latent_rule
from diffusers_ddpm_ext.utils.generations import read_one_generation
from diffusers_ddpm_ext.utils.input_files import file_name
from diffusers_ddpm_ext.utils.network_folder import (
    as_folder_error,
    check_all_used,
    check_complete,
    check_network_folder,
)
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX


def load_first_stage(path_or_id: str | os.PathLike[str], subfolder: str | None = None) -> Any:
    """Load an autoencoder: frozen, in evaluation mode, in float32.

    Args:
        path_or_id: a folder or Hub id, of the autoencoder itself or of a pipeline, whose ``vae`` or ``vqvae`` is
            taken. Without a network, a repository is read from the cache.
        subfolder: where in it the autoencoder is.

    Returns:
        The autoencoder, for `FirstStage`.

    Raises:
        ConfigError: it does not exist, cannot be read, or is no first stage; one sentence.
    """
    source = os.fspath(path_or_id)
    if os.path.isdir(source):
        autoencoder: Any = read_one_generation(source, lambda folder: _load(_find(folder, subfolder)))
        return autoencoder
    with as_hub_error(source):
        places = (subfolder,) if subfolder else (".", *SLOTS)
        patterns = [MODEL_INDEX, *(os.path.normpath(f"{place}/config.json") for place in places)]
        folder = Path(snapshot_download(source, allow_patterns=patterns))
        place = _find(folder, subfolder).relative_to(folder).as_posix()
        weights = [f"{place}/*.{kind}".removeprefix("./") for kind in ("safetensors", "bin", "index.json")]
        folder = Path(snapshot_download(source, revision=folder.name, allow_patterns=[*patterns, *weights]))
    return _load(_find(folder, subfolder))


def _find(folder: Path, subfolder: str | None) -> Path:
    """The folder of the autoencoder inside another one."""
    if subfolder is None and not any((folder / name).is_file() for name in (MODEL_INDEX, "config.json")):
        raise ConfigError(
            f"{file_name(folder)} has neither config.json nor {MODEL_INDEX}: give the folder of a Diffusers "
            "autoencoder, or of a pipeline with one"
        )
    return find_component(folder, subfolder, SLOTS, "first stage")


def _load(folder: Path) -> Any:
    config = check_network_folder(folder)
    name = config.string("_class_name")
    cls: Any = next((cls for cls in KINDS if cls.__name__ == name), None)
    if cls is None:
        raise ConfigError(f"{config.name} is of a {printable(name, 80)}; a first stage is an {CLASS_NAMES}")
    with as_folder_error(folder):
        autoencoder = cls.from_pretrained(os.fspath(folder), torch_dtype=torch.float32, local_files_only=True)
        check_complete(autoencoder, folder)
        check_all_used(autoencoder, folder)
    if not all(bool(torch.isfinite(weight).all()) for weight in autoencoder.parameters()):
        raise ConfigError(f"{file_name(folder)}: the autoencoder's weights are not finite (NaN or infinity)")
    with as_folder_error(folder):
        try:
            latent_rule(autoencoder)
            compression_factor(autoencoder)
        except ValueError as error:
            raise ConfigError(f"{config.name}: {error}") from None
    return autoencoder.eval().requires_grad_(False)
