"""Weights of CompVis' (and OpenAI's) ``UNetModel`` in a Diffusers network, and back, to the bit.

Two things are more than other names. The rows of ``qkv`` are ordered [head][q, k, v][channel] in the published default
and [q, k, v][head][channel] under ``use_new_attention_order``; taking one for the other is wrong for every head but a
single one. And resampling without weights (``conv_resample: false``) becomes the convolution that computes the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.architecture import complete, translate_unet
from diffusers_ddpm_ext.compvis.key_map import Piece, name_map
from diffusers_ddpm_ext.compvis.unet_params import unet_params_of

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
EMA = "model_ema."
WRAPPER = "diffusion_model."  # what LitEma's names begin with, dots and all
THIRDS = ("q", "k", "v")


@dataclass(frozen=True)
class Moved:
    """One tensor's way.

    Attributes:
        source: UNetModel's own name; empty where the original has no weights.
        target: name in the Diffusers network.
        shape: of the target.
        sha256: of the target's bytes, hexadecimal.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    sha256: str


def convert_unet(state_dict: Mapping[str, Tensor], unet_params: Mapping[str, Any]) -> nn.Module:
    """Build the Diffusers network that computes what a UNetModel computes.

    Args:
        state_dict: its weights, floating, under its own names, or with ``diffusion_model.`` or
            ``model.diffusion_model.`` before them.
        unet_params: its keyword arguments.

    Returns:
        A UNet2DModel, UNet2DConditionModel or UNet2DExtModel, float32, in eval mode.

    Raises:
        ValueError: names are missing or left over, shapes differ, or no Diffusers network can express it.
    """
    plan = translate_unet(unet_params)
    converted, _ = convert_tensors(bare(state_dict), unet_params)
    with torch.device("meta"):
        network = plan.build()
    network.load_state_dict(converted, strict=True, assign=True)
    return network.eval()


def bare(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip what the original's wrappers put before a network's names; other names stay."""
    tensors = {}
    for name, tensor in state_dict.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        if name[len(prefix) :] in tensors:
            raise ValueError(f"The weights hold {name[len(prefix) :]} twice, under different prefixes.")
        tensors[name[len(prefix) :]] = tensor
    return tensors


def convert_tensors(
    tensors: Mapping[str, Tensor], unet_params: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[Moved]]:
    """Give UNetModel's tensors the names and shapes of the Diffusers network.

    Args:
        tensors: under UNetModel's own names, floating.
        unet_params: its keyword arguments.

    Returns:
        Name to tensor, float32, and one row a tensor.

    Raises:
        ValueError: names are missing or left over, or a shape differs; all of them are listed.
    """
    pieces, new_order = name_map(unet_params), complete(unet_params)["use_new_attention_order"]
    wanted = {piece.source for piece in pieces if piece.source}
    _refuse_names(wanted - set(tensors), set(tensors) - wanted)
    converted, rows, wrong = {}, [], []
    for piece in pieces:
        tensor = _synthetic(piece) if not piece.source else _take(piece, tensors[piece.source], new_order)
        if tensor is None or tensor.shape != piece.shape:
            wrong.append(f"{piece.source} {tuple(tensors[piece.source].shape)}")
            continue
        converted[piece.target] = tensor.float().contiguous()
        digest = hashlib.sha256(converted[piece.target].numpy().data).hexdigest()
        rows.append(Moved(piece.source, piece.target, piece.shape, digest))
    if wrong:
        raise ValueError(f"{len(wrong)} weights have another shape than this configuration's: {_list(wrong)}.")
    return converted, rows


def _refuse_names(missing: set[str], surplus: set[str]) -> None:
    if missing or surplus:
        parts = [f"missing: {_list(sorted(missing))}"] if missing else []
        parts += [f"left over: {_list(sorted(surplus))}"] if surplus else []
        raise ValueError(
            f"The weights are not those of the network that the configuration describes; {'; '.join(parts)}."
        )


def _list(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _take(piece: Piece, source: Tensor, new_order: bool) -> Tensor | None:
    """The target's part of a source, None where their shapes cannot belong together."""
    if piece.take == "same":
        return source
    if piece.take == "squeeze":
        return source.squeeze(-1) if source.ndim == 3 and source.shape[-1] == 1 else None
    width = piece.shape[0]
    if source.shape[0] != 3 * width:
        return None
    third = THIRDS.index(piece.take)
    if new_order:
        part = source.reshape(3, width, *source.shape[1:])[third]
    else:
        part = source.reshape(piece.heads, 3, width // piece.heads, *source.shape[1:])[:, third]
    return part.reshape(piece.shape) if part.numel() == torch.Size(piece.shape).numel() else None


def _synthetic(piece: Piece) -> Tensor:
    """Weights of the convolution that resamples as the original does without weights."""
    weight = torch.zeros(piece.shape)
    if weight.ndim == 4:
        channels = torch.arange(weight.shape[0])
        if piece.take == "pool":  # stride 2, padding 1: the window's last two rows and columns are the 2x2 pixels
            for row in (1, 2):
                for column in (1, 2):
                    weight[channels, channels, row, column] = 0.25
        else:
            weight[channels, channels, 1, 1] = 1.0
    return weight


def is_synthetic(network: nn.Module) -> bool:
    """Whether a network resamples by the convolutions that stand for ``conv_resample: false``."""
    found = []
    for name, tensor in network.state_dict().items():
        take = {"downsamplers.0.conv.": "pool", "upsamplers.0.conv.": "nearest"}
        kind = next((take[inner] for inner in take if inner in name), None)
        if kind is None:
            continue
        expected = _synthetic(Piece(name, "", kind, 1, tuple(tensor.shape)))  # type: ignore[arg-type]
        found.append(not tensor.is_meta and torch.equal(tensor.detach().cpu().float(), expected))
    return bool(found) and all(found)


def export_unet(network: nn.Module, unet_params: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Give a Diffusers network's weights the names and shapes of UNetModel; the inverse of `convert_tensors`.

    Args:
        network: a UNet2DModel, UNet2DConditionModel or UNet2DExtModel.
        unet_params: keyword arguments of the UNetModel; found from the network where they are not given.

    Returns:
        UNetModel's own names to tensors, in the network's dtype, on its device.

    Raises:
        ValueError: UNetModel cannot express the network; the setting is named.
    """
    params = unet_params_of(network) if unet_params is None else unet_params
    new_order = complete(params)["use_new_attention_order"]
    own, tensors = network.state_dict(), {}
    parts: dict[str, dict[str, Tensor]] = {}
    for piece in name_map(params):
        tensor = own[piece.target].detach()
        if piece.take in THIRDS:
            parts.setdefault(piece.source, {})[piece.take] = tensor
            if len(parts[piece.source]) == 3:
                tensors[piece.source] = _join(parts.pop(piece.source), piece.heads, new_order)
        elif piece.source:
            tensors[piece.source] = tensor.unsqueeze(-1) if piece.take == "squeeze" else tensor
    return tensors


def _join(thirds: Mapping[str, Tensor], heads: int, new_order: bool) -> Tensor:
    """A ``qkv`` of its thirds: (3C, C, 1), or (3C,) of biases."""
    q, k, v = (thirds[name] for name in THIRDS)
    if new_order:
        joined = torch.cat([q, k, v])
    else:
        split = [third.reshape(heads, 1, -1, *third.shape[1:]) for third in (q, k, v)]
        joined = torch.cat(split, dim=1).reshape(3 * q.shape[0], *q.shape[1:])
    return joined.unsqueeze(-1) if joined.ndim == 2 else joined


def unet_keys(unet_params: Mapping[str, Any]) -> list[str]:
    """UNetModel's own names of all its tensors, each once."""
    return list(dict.fromkeys(piece.source for piece in name_map(unet_params) if piece.source))


def ema_names(unet_params: Mapping[str, Any]) -> dict[str, str]:
    """Names of the moving average's buffers in a checkpoint, to UNetModel's own.

    LitEma drops the dots of ``diffusion_model.<name>``, so that the way back leads through the names there are.

    Args:
        unet_params: keyword arguments of UNetModel.

    Returns:
        ``model_ema.<name without dots>`` to UNetModel's own name.

    Raises:
        ValueError: two names are one without their dots.
    """
    names: dict[str, str] = {}
    for name in unet_keys(unet_params):
        flat = EMA + (WRAPPER + name).replace(".", "")
        if flat in names:
            raise ValueError(
                f"{names[flat]} and {name} are the same without their dots: the average cannot be told apart."
            )
        names[flat] = name
    return names
