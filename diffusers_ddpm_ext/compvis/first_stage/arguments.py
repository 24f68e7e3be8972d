"""Arguments of the original's autoencoder that computes the same as one of Diffusers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from diffusers_ddpm_ext.compvis.architecture import NORM_GROUPS, as_list
from diffusers_ddpm_ext.compvis.first_stage.architecture import DDCONFIG_DEFAULTS, FirstStageConfig, read_first_stage
from diffusers_ddpm_ext.compvis.schema import FIRST_STAGE_SECTION, REPORT_FILE
from diffusers_ddpm_ext.utils.wrappers import network_class, unwrap

TARGETS = {"AutoencoderKL": "AutoencoderKL", "VQModel": "VQModelInterface"}
# Setting of Diffusers' classes -> the only value that the original computes.
ONLY_SUPPORTED_VALUE: dict[str, Any] = {
    "act_fn": "silu",
    "norm_num_groups": NORM_GROUPS,
    "norm_type": "group",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
BLOCK_TYPES = {
    "down_block_types": {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True},
    "up_block_types": {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True},
}


def first_stage_config_of(autoencoder: nn.Module) -> FirstStageConfig:
    """Arguments of the original autoencoder that computes the same.

    Raises:
        ValueError: the original's classes cannot express it; the message names the setting.
    """
    name = network_class(autoencoder).__name__
    if name not in TARGETS:
        raise ValueError(
            f"The first stage is {name}, which cannot be exported: the original has AutoencoderKL and VQModel only."
        )
    module: Any = unwrap(autoencoder)
    config: Mapping[str, Any] = module.config
    for key, allowed in ONLY_SUPPORTED_VALUE.items():
        if key in config and config[key] != allowed:
            raise ValueError(
                f"The first stage's {key} is {config[key]}, which cannot be exported: the original has {allowed} only."
            )
    widths = list(config["block_out_channels"])
    if widths[0] % NORM_GROUPS or any(width % widths[0] for width in widths):
        raise ValueError(
            f"The first stage's block_out_channels {widths} cannot be exported: the original's are multiples of the "
            f"first, and that of {NORM_GROUPS}."
        )
    attention = {key: _attends(config, key) for key in BLOCK_TYPES}
    down, up = attention["down_block_types"], attention["up_block_types"][::-1]
    middle = bool(config.get("mid_block_add_attention", True))
    if down != up or (any(down) and not middle):
        raise ValueError(
            "The first stage's attention cannot be exported: the original has it at the same levels of encoder and "
            "decoder, and then in the middle too."
        )
    resolution = _resolution(config.get("sample_size"), len(widths))
    is_kl = name == "AutoencoderKL"
    ddconfig = DDCONFIG_DEFAULTS | {
        "double_z": is_kl,
        "z_channels": config["latent_channels"],
        "resolution": resolution,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [resolution // 2**level for level, has in enumerate(down) if has],
        "attn_type": "vanilla" if middle else "none",
    }
    if is_kl:
        return FirstStageConfig(TARGETS[name], ddconfig, config["latent_channels"])
    embed_dim = config["vq_embed_dim"] or config["latent_channels"]
    return FirstStageConfig(TARGETS[name], ddconfig, embed_dim, config["num_vq_embeddings"])


def original_config(autoencoder: nn.Module, recorded: Any) -> FirstStageConfig:
    """Arguments of the original autoencoder: those recorded when it was converted, if it is the same as then.

    Args:
        autoencoder: of Diffusers.
        recorded: a ``first_stage_config``, or None.

    Raises:
        ValueError: the original's classes cannot express it; the message names the setting.
    """
    if recorded is not None:
        config = read_first_stage(recorded, f"{REPORT_FILE} facts.{FIRST_STAGE_SECTION}")
        module: Any = unwrap(autoencoder)
        same = all(as_list(module.config.get(key)) == as_list(value) for key, value in config.diffusers_config.items())
        if same and all(module.config.get(key, value) == value for key, value in ONLY_SUPPORTED_VALUE.items()):
            return replace(config, ddconfig=config.ddconfig | {"resamp_with_conv": True})
    return first_stage_config_of(autoencoder)


def _attends(config: Mapping[str, Any], key: str) -> list[bool]:
    known = BLOCK_TYPES[key]
    for name in config[key]:
        if name not in known:
            raise ValueError(f"The first stage's {name} cannot be exported: the original has {', '.join(known)} only.")
    return [known[name] for name in config[key]]


def _resolution(sample_size: Any, levels: int) -> int:
    """A resolution that can be halved at every level; the original only selects levels with attention by it."""
    size = max(sample_size) if isinstance(sample_size, Sequence) else sample_size
    halvings = 2 ** (levels - 1)
    return int(size) if isinstance(size, int) and size >= halvings and size % halvings == 0 else 32 * halvings
