"""Key map between a Diffusers network's tensors and UNetModel's, with the transformation of each.

time_embed.{0,2}                 time_embedding.linear_{1,2}
label_emb                        class_embedding
input_blocks.N.0                 conv_in, down_blocks.i.resnets.j, down_blocks.i.downsamplers.0
input_blocks.N.1                 down_blocks.i.attentions.j
middle_block.{0,1,2}             mid_block.resnets.0, attentions.0, resnets.1
output_blocks.N.{0,1,2}          up_blocks.i.resnets.j, attentions.j, upsamplers.0
out.{0,2}                        conv_norm_out, conv_out
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from diffusers_ddpm_ext.compvis.architecture import attention_levels, complete_unet_params, head_counts, translate_unet

Transform = Literal["same", "q", "k", "v", "squeeze", "transpose", "pool", "pool_unpadded", "nearest"]
BlockKind = Literal["same", "resnet", "attention", "pool", "nearest"]

RESNET_KEYS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION_KEYS = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
ATTENTION_TRANSFORMS: dict[str, Transform] = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "squeeze"}


@dataclass(frozen=True)
class TensorMapping:
    """Source of one tensor of a Diffusers network.

    Attributes:
        target: key in the Diffusers network.
        source: key in UNetModel; empty if it has none (resampling without weights).
        transform: ``same``; a third of a ``qkv`` (``q``, ``k``, ``v``); ``squeeze``: without the last axes;
            ``transpose``: rows and columns swapped; ``pool`` (padding 1), ``pool_unpadded`` and ``nearest``: the
            convolution that averages 2x2 pixels, and the identity convolution.
        heads: number of attention heads.
        shape: of the target.
    """

    target: str
    source: str
    transform: Transform
    heads: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Block:
    """A pair of corresponding modules: one of the Diffusers network, one of UNetModel."""

    target: str
    source: str
    kind: BlockKind
    heads: int = 1


def map_keys(unet_params: Mapping[str, Any]) -> tuple[TensorMapping, ...]:
    """Map every tensor of the Diffusers network, in its order, to its source in the UNetModel of these arguments.

    Raises:
        ValueError: no Diffusers network can express this UNetModel.
    """
    return _map_keys(json.dumps(complete_unet_params(unet_params), sort_keys=True))


@lru_cache(maxsize=16)
def _map_keys(text: str) -> tuple[TensorMapping, ...]:
    options = json.loads(text)
    with torch.device("meta"):
        network = translate_unet(options).build()
    blocks = sorted(_blocks(options), key=lambda block: -len(block.target))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return tuple(_map_key(name, shape, blocks) for name, shape in shapes.items())


def _map_key(target: str, shape: tuple[int, ...], blocks: list[_Block]) -> TensorMapping:
    block = next(block for block in blocks if target.startswith(f"{block.target}."))
    inner, _, leaf = target[len(block.target) + 1 :].rpartition(".")
    if block.kind == "resnet":
        return TensorMapping(target, f"{block.source}.{RESNET_KEYS[inner]}.{leaf}", "same", 1, shape)
    if block.kind == "attention":
        transform = ATTENTION_TRANSFORMS.get(inner, "same")
        if transform == "squeeze" and leaf == "bias":
            transform = "same"
        return TensorMapping(target, f"{block.source}.{ATTENTION_KEYS[inner]}.{leaf}", transform, block.heads, shape)
    if block.kind in ("pool", "nearest"):
        return TensorMapping(target, "", block.kind, 1, shape)
    rest = f"{inner}.{leaf}" if inner else leaf
    return TensorMapping(target, f"{block.source}.{rest}", "same", 1, shape)


def _blocks(options: Mapping[str, Any]) -> Iterator[_Block]:
    """All pairs of modules that hold weights."""
    yield _Block("conv_in", "input_blocks.0.0", "same")
    for number, source in ((1, 0), (2, 2)):
        yield _Block(f"time_embedding.linear_{number}", f"time_embed.{source}", "same")
    if options["num_classes"] == "sequential":
        yield _Block("class_embedding.linear_1", "label_emb.0.0", "same")
        yield _Block("class_embedding.linear_2", "label_emb.0.2", "same")
    elif options["num_classes"] is not None:
        yield _Block("class_embedding", "label_emb", "same")
    yield from _down_blocks(options)
    middle = head_counts(options)[1]
    for number, target in ((0, "resnets.0"), (2, "resnets.1")):
        yield _Block(f"mid_block.{target}", f"middle_block.{number}", "resnet")
    yield _Block("mid_block.attentions.0", "middle_block.1", _attention_kind(options), middle)
    yield from _up_blocks(options)
    yield _Block("conv_norm_out", "out.0", "same")
    yield _Block("conv_out", "out.2", "same")


def _attention_kind(options: Mapping[str, Any]) -> BlockKind:
    return "same" if options["use_spatial_transformer"] else "attention"


def _down_blocks(options: Mapping[str, Any]) -> Iterator[_Block]:
    attends, heads, number = attention_levels(options), head_counts(options)[0], 0
    attention = _attention_kind(options)
    for level, has in enumerate(attends):
        for layer in range(options["num_res_blocks"]):
            number += 1
            yield _Block(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0", "resnet")
            if has:
                target = f"down_blocks.{level}.attentions.{layer}"
                yield _Block(target, f"input_blocks.{number}.1", attention, heads[level])
        if level < len(attends) - 1:
            number += 1
            target, source = f"down_blocks.{level}.downsamplers.0", f"input_blocks.{number}.0"
            yield _resampler(options, target, source, "op", "pool")


def _up_blocks(options: Mapping[str, Any]) -> Iterator[_Block]:
    attends, heads, number = attention_levels(options), head_counts(options)[2], -1
    attention = _attention_kind(options)
    for block, level in enumerate(reversed(range(len(attends)))):
        for layer in range(options["num_res_blocks"] + 1):
            number += 1
            yield _Block(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{number}.0", "resnet")
            if attends[level]:
                target = f"up_blocks.{block}.attentions.{layer}"
                yield _Block(target, f"output_blocks.{number}.1", attention, heads[level])
        if level > 0:  # after the attention, if there is one
            source = f"output_blocks.{number}.{2 if attends[level] else 1}"
            yield _resampler(options, f"up_blocks.{block}.upsamplers.0", source, "conv", "nearest")


def _resampler(
    options: Mapping[str, Any], target: str, source: str, leaf: str, without: Literal["pool", "nearest"]
) -> _Block:
    if options["resblock_updown"]:
        return _Block(target, source, "resnet")
    if options["conv_resample"]:
        return _Block(f"{target}.conv", f"{source}.{leaf}", "same")
    return _Block(f"{target}.conv", "", without)
