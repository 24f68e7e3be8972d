"""Weights of CompVis' (and OpenAI's) ``UNetModel``, converted to a Diffusers network and back, bit-exact.

Two conversions are more than a new key. The rows of ``qkv`` are ordered [head][q, k, v][channel] by default and
[q, k, v][head][channel] under ``use_new_attention_order``; confusing the two is wrong unless there is a single head.
And resampling without weights (``conv_resample: false``) becomes the convolution that computes the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.architecture import complete_unet_params, translate_unet
from diffusers_ddpm_ext.compvis.key_map import TensorMapping, Transform, map_keys
from diffusers_ddpm_ext.compvis.schema import listed
from diffusers_ddpm_ext.compvis.unet_params import unet_params_of
from diffusers_ddpm_ext.compvis.wrapper_names import plain_keys
from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.utils.wrappers import plain_state_dict

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
NETWORK_PREFIXES = (*UNET_PREFIXES, "model.", "unet.")  # the last two: of a class with nothing but the network
EMA_PREFIX = "model_ema."
LITEMA_WRAPPER = "diffusion_model."  # LitEma's names start with this, before it removes their dots
QKV = ("q", "k", "v")
# Rows (and columns) of a 3x3 window of stride 2 that are the 2x2 pixels: with padding 1 around, or 1 at the end only.
POOLED_ROWS: dict[Transform, tuple[int, int]] = {"pool": (1, 2), "pool_unpadded": (0, 1)}


@dataclass(frozen=True)
class ConvertedTensor:
    """One row of a conversion report.

    Attributes:
        source: key in UNetModel; empty if it has no such weights.
        target: key in the Diffusers network.
        shape: of the target.
        sha256: of the target's bytes, hexadecimal.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    sha256: str


def convert_unet(state_dict: Mapping[str, Tensor], unet_params: Mapping[str, Any]) -> nn.Module:
    """Build the Diffusers network that computes the same function as a UNetModel.

    Args:
        state_dict: its weights, floating, under UNetModel's keys, with or without the prefix ``diffusion_model.`` or
            ``model.diffusion_model.``.
        unet_params: its keyword arguments.

    Returns:
        A UNet2DModel, UNet2DConditionModel or UNet2DExtModel, float32, in eval mode.

    Raises:
        ValueError: keys are missing or unexpected, shapes differ, or no Diffusers network can express it.
    """
    return build_network(strip_prefixes(state_dict), unet_params)[0]


def build_network(
    tensors: Mapping[str, Tensor],
    unet_params: Mapping[str, Any],
    conditioning_key: str | None = None,
    reinitialized: Iterable[str] = (),
    timestep_scale: float = 1.0,
) -> tuple[nn.Module, list[ConvertedTensor]]:
    """Build a Diffusers network from tensors under UNetModel's keys.

    Args:
        tensors: floating, any dtype.
        unet_params: keyword arguments of UNetModel.
        conditioning_key: how conditions are joined to the network's input.
        reinitialized: keys that may be missing; their weights are initialized with a fixed seed.
        timestep_scale: factor applied to the timestep before the network gets it.

    Returns:
        The network, float32, in eval mode, and one row per tensor.

    Raises:
        ValueError: keys are missing or unexpected, shapes differ, values are not finite, or no Diffusers network can
            express it.
    """
    check_weights(tensors)
    spec = translate_unet(unet_params, conditioning_key=conditioning_key, timestep_scale=timestep_scale)
    if set(reinitialized) - set(tensors):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            initial = export_unet(spec.build(), unet_params)
        tensors = {**{name: initial[name] for name in reinitialized if name in initial}, **tensors}
    converted, rows = convert_tensors(tensors, unet_params)
    with torch.device("meta"):
        network = spec.build()
    network.load_state_dict(converted, strict=True, assign=True)
    return network.eval(), rows


def check_weights(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite floating-point numbers.

    Raises:
        ValueError: some are not; the message names the first.
    """
    wrong = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if wrong:
        raise ValueError(
            f"The weights {printable(wrong[0], 100)} are {tensors[wrong[0]].dtype}, not floating-point numbers: the "
            "file is damaged or quantized. Take the original checkpoint."
        )
    damaged = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
    if damaged:
        raise ValueError(
            f"The weights hold NaN or infinity ({len(damaged)} tensors, the first is {printable(damaged[0], 100)}): "
            "the run that wrote them had diverged. Take an earlier checkpoint, or the file's other weights."
        )


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that CompVis' wrappers add to the network's keys; other keys stay as they are."""
    tensors = {}
    for name, key in plain_keys(state_dict).items():
        prefix = next((prefix for prefix in NETWORK_PREFIXES if name.startswith(prefix)), "")
        if name[len(prefix) :] in tensors:
            raise ValueError(f"The weights contain {name[len(prefix) :]} twice, under different prefixes.")
        tensors[name[len(prefix) :]] = state_dict[key]
    return tensors


def convert_tensors(
    tensors: Mapping[str, Tensor], unet_params: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[ConvertedTensor]]:
    """Convert UNetModel's floating tensors to the Diffusers network's keys and shapes, float32, with a row for each.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ; all of them are listed.
    """
    return convert_mapped(tensors, map_keys(unet_params), complete_unet_params(unet_params)["use_new_attention_order"])


def convert_mapped(
    tensors: Mapping[str, Tensor], mappings: Iterable[TensorMapping], new_order: bool = False
) -> tuple[dict[str, Tensor], list[ConvertedTensor]]:
    """Convert floating tensors by a map of their keys, to float32, with a row for each.

    Args:
        tensors: by their keys in the source.
        mappings: one per tensor of the target.
        new_order: whether rows of a ``qkv`` are ordered [q, k, v][head], not [head][q, k, v].

    Raises:
        ValueError: keys are missing or unexpected, shapes differ, or values are not finite.
    """
    mappings = tuple(mappings)
    expected = {mapping.source for mapping in mappings if mapping.source}
    _check_keys(expected - set(tensors), set(tensors) - expected)
    own = {m.target: _transformed(m, tensors[m.source], new_order) for m in mappings if m.source}
    wrong = [
        f"{m.source} {tuple(tensors[m.source].shape)}"
        for m in mappings
        if m.source and getattr(own[m.target], "shape", None) != m.shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} weights have a different shape in this configuration: {listed(wrong, 12)}.")
    converted, rows = {}, []
    for mapping in mappings:
        tensor = own.pop(mapping.target, None)
        if tensor is None:
            tensor = _resampling_weight(mapping.transform, mapping.shape)
        converted[mapping.target] = tensor.float().contiguous()
        rows.append(ConvertedTensor(mapping.source, mapping.target, mapping.shape, _digest(converted[mapping.target])))
    return converted, rows


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().data).hexdigest()


def is_unchanged(network: nn.Module, rows: Iterable[ConvertedTensor]) -> bool:
    """Whether a network has the weights that it was converted with.

    Compared by their digests: a network shares memory with the tensors that were read, so these change with it.
    """
    digests = {row.target: row.sha256 for row in rows}
    weights = {name: tensor.detach() for name, tensor in plain_state_dict(network).items()}
    return weights.keys() == digests.keys() and all(
        tensor.dtype == torch.float32 and _digest(tensor.cpu().contiguous()) == digests[name]
        for name, tensor in weights.items()
    )


def _check_keys(missing: set[str], unexpected: set[str]) -> None:
    if missing or unexpected:
        parts = [f"missing: {listed(sorted(missing), 12)}"] if missing else []
        parts += [f"unexpected: {listed(sorted(unexpected), 12)}"] if unexpected else []
        raise ValueError(f"The weights do not match the network that the configuration describes; {'; '.join(parts)}.")


def _transformed(mapping: TensorMapping, source: Tensor, new_order: bool) -> Tensor | None:
    """The target tensor of a source tensor; None if their shapes are incompatible."""
    if mapping.transform == "same":
        return source
    if mapping.transform == "squeeze":
        fits = source.shape[:2] == mapping.shape and source.numel() == torch.Size(mapping.shape).numel()
        return source.reshape(mapping.shape) if fits else None
    if mapping.transform == "transpose":
        return source.T if source.ndim == 2 else None
    width = mapping.shape[0]
    if source.shape[:1] != (3 * width,):
        return None
    third = QKV.index(mapping.transform)
    if new_order:
        part = source.reshape(3, width, *source.shape[1:])[third]
    else:
        part = source.reshape(mapping.heads, 3, width // mapping.heads, *source.shape[1:])[:, third]
    return part.reshape(mapping.shape) if part.numel() == torch.Size(mapping.shape).numel() else None


def _resampling_weight(transform: Transform, shape: tuple[int, ...]) -> Tensor:
    """Weights of the convolution that computes what UNetModel computes without weights."""
    weight = torch.zeros(shape)
    if weight.ndim == 4:
        channels = torch.arange(weight.shape[0])
        if transform in POOLED_ROWS:
            for row in POOLED_ROWS[transform]:
                for column in POOLED_ROWS[transform]:
                    weight[channels, channels, row, column] = 0.25
        else:
            weight[channels, channels, 1, 1] = 1.0
    return weight


def resamples_without_weights(network: nn.Module, pool: Transform = "pool") -> bool:
    """Whether a network's resampling convolutions are those that replace resampling without weights.

    Args:
        network: a UNet, or an autoencoder.
        pool: ``pool`` for a UNet, ``pool_unpadded`` for an autoencoder, whose convolutions pad at the end only.
    """
    transforms: dict[str, Transform] = {"downsamplers.0.conv.": pool, "upsamplers.0.conv.": "nearest"}
    matches = [
        not tensor.is_meta
        and torch.equal(tensor.detach().cpu().float(), _resampling_weight(transform, tuple(tensor.shape)))
        for name, tensor in plain_state_dict(network).items()
        for part, transform in transforms.items()
        if part in name
    ]
    return bool(matches) and all(matches)


def export_unet(network: nn.Module, unet_params: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Convert a Diffusers network's weights to UNetModel's keys and shapes; the inverse of `convert_tensors`.

    Args:
        network: a UNet2DModel, UNet2DConditionModel or UNet2DExtModel.
        unet_params: keyword arguments of UNetModel; by default those of `unet_params_of`.

    Returns:
        UNetModel's keys to tensors, in the network's dtype, on its device.

    Raises:
        ValueError: UNetModel cannot express the network; the message names the setting.
    """
    params = unet_params_of(network) if unet_params is None else unet_params
    new_order = complete_unet_params(params)["use_new_attention_order"]
    weights, tensors = plain_state_dict(network), {}
    parts: dict[str, dict[str, Tensor]] = {}
    for mapping in map_keys(params):
        tensor = weights[mapping.target].detach()
        if mapping.transform in QKV:
            parts.setdefault(mapping.source, {})[mapping.transform] = tensor
            if len(parts[mapping.source]) == 3:
                tensors[mapping.source] = _join_qkv(parts.pop(mapping.source), mapping.heads, new_order)
        elif mapping.source:
            tensors[mapping.source] = tensor.unsqueeze(-1) if mapping.transform == "squeeze" else tensor
    return tensors


def _join_qkv(thirds: Mapping[str, Tensor], heads: int, new_order: bool) -> Tensor:
    """Join q, k and v into one ``qkv``: (3C, C, 1), or (3C,) for biases."""
    q, k, v = (thirds[name] for name in QKV)
    if new_order:
        joined = torch.cat([q, k, v])
    else:
        split = [third.reshape(heads, 1, -1, *third.shape[1:]) for third in (q, k, v)]
        joined = torch.cat(split, dim=1).reshape(3 * q.shape[0], *q.shape[1:])
    return joined.unsqueeze(-1) if joined.ndim == 2 else joined


def unet_keys(unet_params: Mapping[str, Any]) -> list[str]:
    """Keys of all tensors of a UNetModel, each once."""
    return list(dict.fromkeys(mapping.source for mapping in map_keys(unet_params) if mapping.source))


def ema_buffer_names(unet_params: Mapping[str, Any]) -> dict[str, str]:
    """Map the names of the EMA's buffers in a checkpoint, ``model_ema.<key without dots>``, to UNetModel's keys.

    Raises:
        ValueError: two keys are equal without their dots.
    """
    names: dict[str, str] = {}
    for key in unet_keys(unet_params):
        flat = EMA_PREFIX + (LITEMA_WRAPPER + key).replace(".", "")
        if flat in names:
            raise ValueError(f"{names[flat]} and {key} are equal without their dots, so their averages are ambiguous.")
        names[flat] = key
    return names
