"""The configuration of a network in a JSON file or a folder, read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.input_files import exists, read_json_object
from diffusers_ddpm_ext.utils.network_budget import check_network_config, check_network_types

MODEL_OPTION = "--model_config_name_or_path"


def read_model_file(source: str) -> dict[str, Any] | None:
    """Read a network's configuration from a JSON file, or the folder of a model or pipeline.

    Returns:
        The configuration; None if ``source`` is no path on this machine, but an id on the Hub.

    Raises:
        ConfigError: the file does not exist, is no JSON object, or describes a network beyond `network_budget`.
    """
    path = Path(source).expanduser()
    if not exists(path):
        if source.endswith(".json") or source.startswith((".", "/", "~")):
            raise ConfigError(f"{MODEL_OPTION} {source} does not exist: name the JSON file of a UNet2DModel")
        return None
    if path.is_dir():
        files = [file for file in (path / "config.json", path / "unet" / "config.json") if file.is_file()]
        if not files:
            raise ConfigError(f"{MODEL_OPTION} {path}: neither config.json nor unet/config.json is in that folder.")
        path = files[0]
    config = read_json_object(path, MODEL_OPTION).content
    if all(key.startswith("_") for key in config):
        raise ConfigError(
            f"{MODEL_OPTION} {source} describes no network: it has no key such as block_out_channels. Leave the "
            "option out to use sizes such as --block_out_channels."
        )
    check_network_types(config, f"{MODEL_OPTION} {source}")
    check_network_config(config, f"{MODEL_OPTION} {source}")
    return config
