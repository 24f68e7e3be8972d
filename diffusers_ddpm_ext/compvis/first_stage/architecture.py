"""Arguments of CompVis' autoencoders, translated to Diffusers' `AutoencoderKL` and `VQModel`.

    attn_resolutions    AttnDownEncoderBlock2D, AttnUpDecoderBlock2D: by the configuration's resolution, which the
                        encoder halves from the top and the decoder doubles from the bottom
    attn_type none      mid_block_add_attention=False
    embed_dim (VQ)      vq_embed_dim

The inverse is in `diffusers_ddpm_ext.compvis.first_stage.arguments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import AutoencoderKL, VQModel

from diffusers_ddpm_ext.compvis.architecture import NORM_GROUPS
from diffusers_ddpm_ext.compvis.config.ddpm import suggestion
from diffusers_ddpm_ext.compvis.config.run_keys import as_mapping
from diffusers_ddpm_ext.compvis.config.targets import AUTOENCODERS, IDENTITY_FIRST_STAGE
from diffusers_ddpm_ext.compvis.schema import (
    BOOLEAN,
    LAYERS,
    NULL,
    POSITIVE_INT,
    TEXT,
    WIDTH,
    ConfigRow,
    ValueType,
    check_values,
    list_of,
    number,
    one_line,
    whole,
    wholes,
)
from diffusers_ddpm_ext.utils.network_budget import MAX_CLASSES, MAX_LEVELS, MAX_WIDTH, check_network_config

Kind = Literal["kl", "vq"]
KINDS: dict[str, Kind] = {"AutoencoderKL": "kl", "VQModel": "vq", "VQModelInterface": "vq"}
_MULTIPLES = wholes(MAX_WIDTH)
DDCONFIG_TYPES = {
    "double_z": BOOLEAN,
    "z_channels": WIDTH,
    "resolution": WIDTH,
    "in_channels": WIDTH,
    "out_ch": WIDTH,
    "ch": WIDTH,
    "ch_mult": ValueType(f"a list of up to {MAX_LEVELS} whole numbers from 1", _MULTIPLES.allows),
    "num_res_blocks": LAYERS,
    "attn_resolutions": list_of(POSITIVE_INT, "whole numbers", allow_empty=True),
    "dropout": number(0, 1),
    "resamp_with_conv": BOOLEAN,
    "give_pre_end": BOOLEAN,
    "tanh_out": BOOLEAN,
    "use_linear_attn": BOOLEAN,
    "attn_type": TEXT,
}
DDCONFIG_DEFAULTS: dict[str, Any] = {
    "double_z": True, "ch_mult": (1, 2, 4, 8), "dropout": 0.0, "resamp_with_conv": True, "give_pre_end": False,
    "tanh_out": False, "use_linear_attn": False, "attn_type": "vanilla",
}  # fmt: skip
PARAM_TYPES = {"embed_dim": WIDTH, "n_embed": whole(MAX_CLASSES) | NULL}
PARAMS_WITHOUT_EFFECT = {
    "lossconfig": "only used in training",
    "ckpt_path": "the weights come from the checkpoint",
    "ignore_keys": "the weights come from the checkpoint",
    "image_key": "only used in training",
    "colorize_nlabels": "shows segmentations in logged images",
    "monitor": "only used in training",
    "batch_resize_range": "only used in training",
    "scheduler_config": "only used in training",
    "lr_g_factor": "only used in training",
    "ema_decay": "a diffusion model takes the raw weights of its first stage",
    "use_ema": "a diffusion model takes the raw weights of its first stage",
    "learn_logvar": "only used in training",
    "remap": "renumbers the codes, which are not part of a latent",
    "sane_index_shape": "shape of the codes, which are not part of a latent",
}
ATTENTION_TYPES = {"vanilla": True, "vanilla-xformers": True, "none": False}


@dataclass(frozen=True)
class FirstStageConfig:
    """An original autoencoder, checked and translated.

    Attributes:
        target: its class, the last part of its path.
        ddconfig: arguments of its encoder and decoder, with their defaults.
        embed_dim: channels of a latent.
        n_embed: number of codes; None without a codebook.
        rows: one per key of the configuration.
    """

    target: str
    ddconfig: dict[str, Any]
    embed_dim: int
    n_embed: int | None = None
    rows: tuple[ConfigRow, ...] = ()

    @property
    def kind(self) -> Kind:
        """Whether a latent is a draw of a Gaussian, or a code."""
        return KINDS[self.target]

    @property
    def section(self) -> dict[str, Any]:
        """The ``first_stage_config`` of an original configuration."""
        codes = {} if self.n_embed is None else {"n_embed": self.n_embed}
        params = {"embed_dim": self.embed_dim, **codes, "ddconfig": dict(self.ddconfig)}
        return {
            "target": f"ldm.models.autoencoder.{self.target}",
            "params": {**params, "lossconfig": {"target": "torch.nn.Identity"}},
        }

    def build(self, scaling_factor: float = 1.0) -> AutoencoderKL | VQModel:
        """Build Diffusers' autoencoder with random weights; inside ``torch.device("meta")`` without any.

        Args:
            scaling_factor: by which latents are multiplied. Always written: Diffusers' own default is Stable
                Diffusion's, for a codebook too.
        """
        config = self.diffusers_config | {"scaling_factor": scaling_factor}
        return AutoencoderKL(**config) if self.kind == "kl" else VQModel(**config)

    @property
    def diffusers_config(self) -> dict[str, Any]:
        """Keyword arguments of Diffusers' class, without the scale."""
        options = self.ddconfig
        attends = ATTENTION_TYPES[options["attn_type"]]
        down, up = attention_levels(options)
        codes = {} if self.kind == "kl" else {"vq_embed_dim": self.embed_dim, "num_vq_embeddings": self.n_embed}
        return {
            "in_channels": options["in_channels"],
            "out_channels": options["out_ch"],
            "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in down],
            "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in up],
            "block_out_channels": [options["ch"] * factor for factor in options["ch_mult"]],
            "layers_per_block": options["num_res_blocks"],
            "latent_channels": options["z_channels"],
            "sample_size": options["resolution"],
            "norm_num_groups": NORM_GROUPS,
            "mid_block_add_attention": attends,
            **codes,
        }


def attention_levels(ddconfig: Mapping[str, Any]) -> tuple[list[bool], list[bool]]:
    """Whether each level of the encoder has attention, from the top, and each of the decoder, from the bottom."""
    levels, resolution = len(ddconfig["ch_mult"]), ddconfig["resolution"]
    lowest = resolution // 2 ** (levels - 1)
    if not ATTENTION_TYPES[ddconfig["attn_type"]]:
        return [False] * levels, [False] * levels
    down = [resolution // 2**level in ddconfig["attn_resolutions"] for level in range(levels)]
    up = [lowest * 2**level in ddconfig["attn_resolutions"] for level in range(levels)]
    return down, up


def read_first_stage(section: Any, prefix: str) -> FirstStageConfig:
    """Read and check the configuration of an original autoencoder.

    Args:
        section: ``target`` and ``params``, as in the file.
        prefix: of its keys, for messages and rows, such as ``model.params.first_stage_config``.

    Raises:
        ValueError: a value is missing or not allowed, or Diffusers' classes cannot express it.
    """
    section = as_mapping(section, prefix)
    target = str(section.get("target")).rpartition(".")[2]
    if target not in KINDS:
        raise ValueError(f"{prefix}.target {one_line(repr(section.get('target')))} is not supported: {_why(target)}.")
    path = f"{prefix}.params"
    params = check_values(as_mapping(section.get("params"), path), PARAM_TYPES, f"{path}.")
    kind = KINDS[target]
    required = ("embed_dim", "ddconfig") if kind == "kl" else ("embed_dim", "n_embed", "ddconfig")
    for name in required:
        if params.get(name) is None:
            raise ValueError(f"{path}.{name} is missing: give the configuration that belongs to the weights.")
    rows = [ConfigRow(f"{prefix}.target", section["target"], "translated", "the first stage, pipeline.vae")]
    for name, value in params.items():
        if name in PARAMS_WITHOUT_EFFECT or (name == "n_embed" and kind == "kl"):
            note = PARAMS_WITHOUT_EFFECT.get(name, "there is no codebook")
            rows.append(ConfigRow(f"{path}.{name}", value, "without effect", note))
        elif name not in required:
            known = (*required, *PARAMS_WITHOUT_EFFECT)
            why = suggestion(name, known, f"not an argument of {target}")
            raise ValueError(f"{path}.{one_line(name)} {one_line(value)} is not supported: {why}.")
    ddconfig = _read_ddconfig(as_mapping(params["ddconfig"], f"{path}.ddconfig"), f"{path}.ddconfig", rows)
    config = FirstStageConfig(
        target, ddconfig, params["embed_dim"], params["n_embed"] if kind == "vq" else None, tuple(rows)
    )
    _check_kind(config, path)
    check_network_config(config.diffusers_config, f"{path}.ddconfig")
    return config


def _why(target: str) -> str:
    if target == IDENTITY_FIRST_STAGE:
        return "it has no weights, and its latents are the images themselves"
    near = suggestion(target, tuple(KINDS), f"known are {', '.join(KINDS)}")
    return "no Diffusers class is like it" if target in AUTOENCODERS else near


def _read_ddconfig(given: Mapping[str, Any], path: str, rows: list[ConfigRow]) -> dict[str, Any]:
    """Check the arguments of encoder and decoder, add their rows, and fill in their defaults."""
    options = check_values(given, DDCONFIG_TYPES, f"{path}.")
    missing = [name for name in DDCONFIG_TYPES if name not in DDCONFIG_DEFAULTS and options.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: give the configuration that belongs to the weights.")
    for name, value in given.items():
        if name == "dropout":
            rows.append(ConfigRow(f"{path}.{name}", value, "without effect", "only used in training"))
        elif name in DDCONFIG_TYPES:
            rows.append(ConfigRow(f"{path}.{name}", value, "translated", "the autoencoder's configuration"))
        else:
            rows.append(ConfigRow(f"{path}.{name}", value, "without effect", "the original ignores it"))
    options = {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in (DDCONFIG_DEFAULTS | dict(options)).items()
        if name in DDCONFIG_TYPES
    }
    _check_ddconfig(options, path)
    return options


def _check_ddconfig(options: Mapping[str, Any], path: str) -> None:
    """Refuse what no autoencoder of Diffusers computes."""
    if options["give_pre_end"]:
        raise ValueError(
            f"{path}.give_pre_end true is not supported: the decoder then returns features, not images; set it to "
            "false for a decoder with its last layers."
        )
    if options["tanh_out"]:
        raise ValueError(
            f"{path}.tanh_out true is not supported: no decoder of Diffusers ends in a tanh; set it to false, and "
            "apply torch.tanh to the decoded images yourself."
        )
    attention = "linear" if options["use_linear_attn"] else options["attn_type"]
    if attention not in ATTENTION_TYPES:
        name = "use_linear_attn true" if options["use_linear_attn"] else f"attn_type {one_line(attention)}"
        raise ValueError(
            f"{path}.{name} is not supported: autoencoders of Diffusers have softmax attention (attn_type "
            f"{', '.join(ATTENTION_TYPES)})."
        )
    if options["ch_mult"][0] != 1:
        raise ValueError(
            f"{path}.ch_mult {one_line(options['ch_mult'])} is not supported: Diffusers' first block is "
            "as wide as its first convolution, so ch_mult must begin with 1."
        )
    if options["ch"] % NORM_GROUPS:
        raise ValueError(f"{path}.ch {options['ch']} is not possible: it must be a multiple of {NORM_GROUPS}.")
    if options["resolution"] < 2 ** (len(options["ch_mult"]) - 1):
        raise ValueError(
            f"{path}.resolution {options['resolution']} cannot be halved {len(options['ch_mult']) - 1} times, as "
            "ch_mult says: give the configuration that belongs to the weights."
        )


def _check_kind(config: FirstStageConfig, path: str) -> None:
    z_channels, double_z = config.ddconfig["z_channels"], bool(config.ddconfig["double_z"])
    if double_z != (config.kind == "kl"):
        raise ValueError(
            f"{path}.ddconfig.double_z {str(double_z).lower()} (default true) does not belong to {config.target}, "
            f"which takes {'twice' if config.kind == 'kl' else 'once'} z_channels from its encoder: set it to "
            f"{str(not double_z).lower()}."
        )
    if config.kind == "kl" and config.embed_dim != z_channels:
        raise ValueError(
            f"{path}.embed_dim {config.embed_dim} is not supported with z_channels {z_channels}: Diffusers' "
            "AutoencoderKL has as many channels of a latent as its encoder gives; decode with the original's class."
        )
