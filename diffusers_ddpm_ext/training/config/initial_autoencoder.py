"""The autoencoder that a run of `ddpm-ext train-vae` starts from, whose folder decides the options of the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.first_stage_config import FirstStageConfig, read_first_stage_config
from diffusers_ddpm_ext.utils.input_files import read_json_object
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX

TYPES = {"AutoencoderKL": "kl", "VQModel": "vq"}
COMPRESSIONS = (2, 4, 8, 16, 32)
MAX_SIZE = 1_000_000


def architecture_of(path: str, explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the network of ``--ckpt_path``, and the channels of its images.

    Args:
        path: folder of an autoencoder, or of a pipeline with one.
        explicit: the options that are set, which must not contradict.

    Raises:
        ConfigError: there is no such autoencoder, it is of a kind that train-vae does not train, or an option is set
            to another value.
    """
    label = f"--ckpt_path {printable(path, 200)}"
    autoencoder = _read_config(Path(path), label)
    config, kind = autoencoder.config, TYPES.get(autoencoder.class_name)
    if kind is None:
        name = printable(autoencoder.class_name, 80)
        raise ConfigError(f"{label} is of class {name}, and train-vae trains AutoencoderKL and VQModel")
    if autoencoder.factor not in COMPRESSIONS:
        raise ConfigError(f"{label} compresses by {autoencoder.factor}; train-vae takes compressions from 2 to 32")
    options: dict[str, Any] = {
        "first_stage_type": kind,
        "compression": autoencoder.factor,
        "channels": autoencoder.pixel_channels,
        "latent_channels": config.integer("latent_channels", 1, MAX_SIZE, 4 if kind == "kl" else 3),
        "block_out_channels": tuple(map(int, config.numbers("block_out_channels"))),
        "layers_per_block": config.integer("layers_per_block", 1, MAX_SIZE, 1),
        "norm_num_groups": config.integer("norm_num_groups", 1, MAX_SIZE, 32),
        "mid_block_attention": config.boolean("mid_block_add_attention", True),
    }
    if kind == "vq":
        options["num_vq_embeddings"] = config.integer("num_vq_embeddings", 1, MAX_SIZE, 256)
    for name, value in options.items():
        if explicit.get(name) not in (None, value):
            raise ConfigError(f"--{name} {_text(explicit[name])}: {label} has {_text(value)}; leave --{name} out")
    return options


def _read_config(folder: Path, label: str) -> FirstStageConfig:
    index, own = folder / MODEL_INDEX, folder / "config.json"
    found = None
    if index.is_file():
        found = read_first_stage_config(folder, read_json_object(index))
    elif own.is_file():
        content = read_json_object(own)
        found = FirstStageConfig("vae", content.string("_class_name"), content)
    if found is None:
        raise ConfigError(
            f"{label} must be the folder of a Diffusers autoencoder, or of a pipeline with one; `ddpm-ext convert` "
            "makes one of a CompVis checkpoint"
        )
    return found


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
