"""Text encoders of the original's classes, three shapes each, with weights that are a function of their keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.compvis.conditioner.kinds import ConditionerConfig
from helpers.paths import GOLDEN
from helpers.published_models import BATCH, SEED, seeded_tensor

FILE = GOLDEN / "text_stages.json"
LDM = "ldm.modules.encoders.modules"


@dataclass(frozen=True)
class TextShape:
    """A text encoder of an original class.

    Attributes:
        name: of the class.
        params: its arguments.
        network: sizes of the network that it loads; empty if its arguments say them.
        heads: of the network, where ``text_heads`` must say them.
        quick_gelu: of open_clip's network.
        first_stages: kinds of first stages of whole models with it.
    """

    name: str
    params: dict[str, Any]
    network: dict[str, Any] = field(default_factory=dict)
    heads: int | None = None
    quick_gelu: bool = False
    first_stages: tuple[str, ...] = ()

    @property
    def section(self) -> dict[str, Any]:
        """Its ``cond_stage_config``."""
        return {"target": f"{LDM}.{self.name}", "params": dict(self.params)}

    @property
    def width(self) -> int:
        """Of its tokens."""
        sizes = self.network | self.params
        return int(next(sizes[key] for key in ("hidden_size", "width", "d_model", "n_embed") if key in sizes))

    def with_heads(self, config: ConditionerConfig) -> ConditionerConfig:
        """A configuration with the number of heads that the caller gives."""
        return replace(config, params={**config.params, "text_heads": self.heads})


def _clip(width: int, heads: int, layers: int, vocabulary: int, positions: int = 77, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "max_position_embeddings": positions, "intermediate_size": 4 * width, "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    } | more  # fmt: skip


def _t5(width: int, heads: int, layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "d_model": width, "d_kv": 8, "d_ff": 3 * width, "num_layers": layers, "num_heads": heads,
        "vocab_size": vocabulary, "feed_forward_proj": "gated-gelu",
    } | more  # fmt: skip


def _open_clip(width: int, heads: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {"context_length": 77, "width": width, "heads": heads, "layers": layers, "vocab_size": vocabulary}


SHAPES: dict[str, TextShape] = {
    "clip 1": TextShape("FrozenCLIPEmbedder", {}, _clip(64, 1, 2, 99), first_stages=("kl",)),
    "clip 2": TextShape("FrozenCLIPEmbedder", {"max_length": 16}, _clip(48, 3, 3, 50, 16), heads=3),
    "clip 3": TextShape(
        "FrozenCLIPEmbedder",
        {"version": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "freeze": True},
        _clip(128, 8, 1, 1000, hidden_act="gelu"),
        heads=8,
    ),
    "open_clip 1": TextShape(
        "FrozenOpenCLIPEmbedder", {"freeze": True, "layer": "penultimate"}, _open_clip(64, 1, 3, 99),
        first_stages=("kl",),
    ),
    "open_clip 2": TextShape("FrozenOpenCLIPEmbedder", {}, _open_clip(96, 4, 2, 300), heads=4),
    "open_clip 3": TextShape(
        "FrozenOpenCLIPEmbedder", {"arch": "ViT-B-32-quickgelu", "layer": "penultimate"}, _open_clip(128, 2, 4, 50),
        quick_gelu=True,
    ),
    "t5 1": TextShape("FrozenT5Embedder", {}, _t5(32, 4, 2, 40), first_stages=("kl",)),
    "t5 2": TextShape("FrozenT5Embedder", {"max_length": 20}, _t5(48, 3, 1, 99, feed_forward_proj="relu")),
    "t5 3": TextShape("FrozenT5Embedder", {}, _t5(64, 2, 3, 200, d_kv=24, relative_attention_num_buckets=16)),
    "bert 1": TextShape(
        "BERTEmbedder", {"n_embed": 32, "n_layer": 2, "vocab_size": 99}, first_stages=("kl", "vq")
    ),
    "bert 2": TextShape(
        "BERTEmbedder",
        {"n_embed": 48, "n_layer": 1, "vocab_size": 300, "max_seq_len": 12, "use_tokenizer": False},
    ),
    "bert 3": TextShape(
        "BERTEmbedder", {"n_embed": 64, "n_layer": 3, "vocab_size": 50, "embedding_dropout": 0.1}
    ),
    "transformer 1": TextShape(
        "TransformerEmbedder", {"n_embed": 32, "n_layer": 1, "vocab_size": 64, "max_seq_len": 92},
        first_stages=("vq",),
    ),
    "transformer 2": TextShape("TransformerEmbedder", {"n_embed": 16, "n_layer": 2, "vocab_size": 30}),
    "transformer 3": TextShape(
        "TransformerEmbedder", {"n_embed": 40, "n_layer": 3, "vocab_size": 100, "max_seq_len": 5}
    ),
}  # fmt: skip


def token_ids(shape: TextShape) -> Tensor:
    """Token ids for an encoder, (BATCH, T)."""
    sizes = shape.params | shape.network
    length = sizes.get("max_length", sizes.get("max_seq_len", 77))
    return torch.randint(sizes["vocab_size"], (BATCH, length), generator=torch.Generator().manual_seed(SEED))


def whole_model(shape: TextShape, first: str) -> dict[str, Any]:
    """A configuration of LatentDiffusion with this encoder and a first stage, ``kl`` or ``vq``."""
    ddconfig = {"double_z": first == "kl", "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
                "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    codes = {} if first == "kl" else {"n_embed": 32}
    target = "AutoencoderKL" if first == "kl" else "VQModelInterface"
    unet = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1],
            "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 4, "use_spatial_transformer": True,
            "transformer_depth": 1, "context_dim": shape.width, "use_checkpoint": False, "legacy": False}  # fmt: skip
    params = {
        "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 5, "cond_stage_key": "caption", "image_size": 8,
        "channels": 4, "conditioning_key": "crossattn", "scale_factor": 0.5, "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {
            "target": f"ldm.models.autoencoder.{target}",
            "params": {"embed_dim": 4, **codes, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}},
        },
        "cond_stage_config": shape.section,
    }  # fmt: skip
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def recorded() -> dict[str, Any]:
    """Recorded keys and numbers, by name of a shape."""
    loaded: dict[str, Any] = json.loads(FILE.read_text())
    return loaded


def seeded_stage(shapes: Mapping[str, list[int]], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a stage, as a function of their keys, which start with ``prefix``."""
    state = {key: seeded_tensor(key, tuple(shape)) for key, shape in shapes.items() if "position_ids" not in key}
    again, table = (f"{prefix}transformer.{name}.weight" for name in ("encoder.embed_tokens", "shared"))
    return state | ({again: state[table]} if again in state else {})
