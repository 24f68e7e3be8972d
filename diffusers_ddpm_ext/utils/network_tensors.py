"""Whether weights can be of a network with a configuration, without building it: its main tensors and their shapes.

Compared are the ends of the network, its tables of classes, and the convolutions and attentions of every level, which
follow from the configuration alone. That is less than loading says, which compares all of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import JsonObject
from diffusers_ddpm_ext.utils.tensor_files import StoredTensor

AUTOENCODERS = {"AutoencoderKL": 4, "VQModel": 3}
UNETS = {"UNet2DModel": 3, "UNet2DExtModel": 3, "UNet2DConditionModel": 4}
"""Classes that are compared, and the channels (of latents, of the input) that their configuration may leave out."""
DEFAULT_WIDTHS = {
    "UNet2DModel": (224, 448, 672, 896),
    "UNet2DExtModel": (224, 448, 672, 896),
    "UNet2DConditionModel": (320, 640, 1280, 1280),
    "AutoencoderKL": (64,),
    "VQModel": (64,),
}
DEFAULT_TOKEN_WIDTH = 1280
Wanted = tuple[str, tuple[int, ...], str]  # a tensor's name, the first lengths of its shape, the key that says so


@dataclass(frozen=True)
class _Level:
    """One level of one side: ``down_blocks.0`` and the like, with its width, layers, and whether it has attention."""

    prefix: str
    width: int
    layers: int
    attends: bool | None


def check_main_tensors(tensors: Mapping[str, StoredTensor], config: JsonObject, class_name: str) -> None:
    """Compare the weights of a network with its configuration; classes that are not known are not compared.

    Args:
        tensors: of the weights, by name.
        config: checked by `check_network_types`.
        class_name: of the network.

    Raises:
        ConfigError: a tensor is missing, has another shape, or is one too many.
    """
    if class_name not in DEFAULT_WIDTHS:
        return
    levels = list(_levels(config, class_name))
    ends = _autoencoder_ends if class_name in AUTOENCODERS else _unet_ends
    for name, shape, reason in (*ends(config.content, class_name, levels), *_convolutions(levels)):
        found = tensors.get(name)
        if found is None or found.shape[: len(shape)] != shape:
            state = "lack it" if found is None else f"have {_text(found.shape)}"
            raise _other_model(config, f"{reason} wants the tensor {name} of {_text(shape)}, and the weights {state}")
    for prefix, reason in _excluded(config.content, class_name, levels):
        extra = next((name for name in tensors if name.startswith(prefix)), None)
        if extra is not None:
            raise _other_model(config, f"{reason} has no place for the weights' tensor {printable(extra, 80)}")
    for level in levels:
        if level.attends and not any(name.startswith(f"{level.prefix}.attentions.0.") for name in tensors):
            raise _other_model(config, f"the block types want attention in {level.prefix}, and the weights lack it")
    width = config.content.get("cross_attention_dim", DEFAULT_TOKEN_WIDTH)
    key = next((name for name in tensors if name.endswith(".attn2.to_k.weight")), None)
    if class_name == "UNet2DConditionModel" and type(width) is int and key and tensors[key].shape[1:] != (width,):
        raise _other_model(config, f"cross_attention_dim is {width}, and the weights' {key} is for another width")


def _other_model(config: JsonObject, fault: str) -> ConfigError:
    return ConfigError(f"{config.name}: {fault}: they are damaged, or of another model")


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _levels(config: JsonObject, class_name: str) -> Iterator[_Level]:
    """The levels of the way down, then those of the way up.

    Raises:
        ConfigError: widths, layers and blocks do not belong together.
    """
    widths = [int(width) for width in config.numbers("block_out_channels", DEFAULT_WIDTHS[class_name])]
    is_unet = class_name in UNETS
    layers = config.content.get("layers_per_block", 2 if is_unet else 1)
    counts = layers if isinstance(layers, list) else [layers] * len(widths)
    sides = (("down", "encoder.", 0, 1), ("up", "decoder.", 1, -1))
    for side, part, more, order in sides:
        types = config.content.get(f"{side}_block_types", [None] * len(widths))
        if not len(widths) == len(counts) == len(types):
            raise ConfigError(
                f"{config.name}: block_out_channels, layers_per_block and {side}_block_types are of {len(widths)}, "
                f"{len(counts)} and {len(types)} levels: write one value for each level"
            )
        for level, (width, count, kind) in enumerate(zip(widths[::order], counts[::order], types, strict=True)):
            if str(kind).startswith("K"):  # of k-diffusion, whose layers are other ones
                continue
            prefix = f"{'' if is_unet else part}{side}_blocks.{level}"
            yield _Level(prefix, width, count + more, None if kind is None else "Attn" in kind)


def _convolutions(levels: list[_Level]) -> Iterator[Wanted]:
    for level in levels:
        for layer in range(level.layers):
            name = f"{level.prefix}.resnets.{layer}.conv1.weight"
            yield name, (level.width,), "block_out_channels or layers_per_block"


def _unet_ends(config: Mapping[str, Any], class_name: str, levels: list[_Level]) -> Iterator[Wanted]:
    first = config.get("block_out_channels", DEFAULT_WIDTHS[class_name])[0]
    time_width = config.get("time_embedding_dim") or 4 * first
    yield "conv_in.weight", (first, config.get("in_channels", UNETS[class_name])), "block_out_channels or in_channels"
    yield (
        "conv_out.weight",
        (config.get("out_channels", UNETS[class_name]), first),
        "block_out_channels or out_channels",
    )
    yield "time_embedding.linear_1.weight", (time_width,), "block_out_channels"
    if type(config.get("num_class_embeds")) is int and config.get("class_embed_type") is None:
        yield "class_embedding.weight", (config["num_class_embeds"], time_width), "num_class_embeds"


def _autoencoder_ends(config: Mapping[str, Any], class_name: str, levels: list[_Level]) -> Iterator[Wanted]:
    widths = config.get("block_out_channels", DEFAULT_WIDTHS[class_name])
    latents = config.get("latent_channels", AUTOENCODERS[class_name])
    yield "encoder.conv_in.weight", (widths[0], config.get("in_channels", 3)), "block_out_channels or in_channels"
    yield "decoder.conv_in.weight", (widths[-1], latents), "block_out_channels or latent_channels"
    yield "decoder.conv_out.weight", (config.get("out_channels", 3), widths[0]), "block_out_channels or out_channels"
    if class_name == "VQModel":
        width = config.get("vq_embed_dim") or latents
        yield "quantize.embedding.weight", (config.get("num_vq_embeddings", 256), width), "num_vq_embeddings"


def _excluded(config: Mapping[str, Any], class_name: str, levels: list[_Level]) -> Iterator[tuple[str, str]]:
    """Beginnings of names that no tensor may have, and the key of the configuration that says so."""
    count = len(config.get("block_out_channels", DEFAULT_WIDTHS[class_name]))
    for part in ("down_blocks", "up_blocks", "encoder.down_blocks", "decoder.up_blocks"):
        yield f"{part}.{count}.", "block_out_channels"
    for level in levels:
        yield f"{level.prefix}.resnets.{level.layers}.", "layers_per_block"
        if level.attends is False:
            yield f"{level.prefix}.attentions.", "its block types"
    if class_name in UNETS and config.get("num_class_embeds") is None and config.get("class_embed_type") is None:
        yield "class_embedding.", "num_class_embeds"
