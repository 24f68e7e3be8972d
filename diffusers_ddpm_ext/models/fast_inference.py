"""Convolutions and group normalization of Diffusers' networks on x86 CPUs, faster where no gradient is computed.

oneDNN reorders the weights of a convolution at every call. A network that draws samples has the same weights at every
step, so they are packed once, at the first step; only small layers gain by it (`MOST_PIXELS`). PyTorch normalizes
groups of small feature maps in channels_last a few channels at a time, in bfloat16 seven times slower than in float32.
Here the sums are over whole rows, in float32.

Results differ from PyTorch's by rounding only: bfloat16 is normalized in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.models.fast_attention import has_onednn

MOST_PIXELS = 4096
"""Of all images that a layer gets, up to which packing its weights saves more than 2 % of its time."""
LARGE = 2**17
"""Weights of a convolution below which packing saves less than it costs."""
FEW_PIXELS = 1024
"""Of one image, below which PyTorch normalizes groups of channels_last slowly."""
VALUES = {torch.float32: 2**18, torch.bfloat16: 2**14}
"""From so many values on the difference is more than the calls cost."""


def _applies(inputs: Tensor, weight: Tensor) -> bool:
    """Whether a layer's inputs are of a kind that the faster ways take."""
    return (
        inputs.device.type == "cpu"
        and inputs.ndim == 4
        and inputs.dtype in VALUES
        and inputs.dtype == weight.dtype
        and inputs.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class PackedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that keeps its weights in oneDNN's order, too, for as long as they stay the same.

    Autograd's counter tells of a change in place. It does not see one through ``weight.data``, and neither does this.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pixels = input.numel() // weight.shape[1]
        is_kind = weight.numel() >= LARGE and 0 < pixels <= MOST_PIXELS and not weight.is_inference()
        if not (is_kind and self.groups == 1 and _applies(input, weight)):
            return super()._conv_forward(input, weight, bias)
        geometry = [*map(list, (self.padding, self.stride, self.dilation)), self.groups]
        key = (weight.data_ptr(), weight._version, weight.dtype, tuple(input.shape))
        if self.__dict__.get("_packed_key") != key:
            order: Any = torch.ops.mkldnn._reorder_convolution_weight
            source = weight.detach()  # kept, so that no other weights get its address
            self.__dict__["_packed"] = order(source, *geometry, list(input.shape))
            self.__dict__ |= {"_packed_key": key, "_packed_source": source}
        packed = self.__dict__["_packed"]
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(input, packed, bias, *geometry, "none", [], "")
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be packed again: oneDNN's tensors can be neither copied nor stored."""
        return {name: value for name, value in super().__getstate__().items() if not name.startswith("_packed")}


class RowGroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` that sums whole rows of small feature maps."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, height, width)."""
        pixels = input[0, 0].numel() if input.ndim == 4 and len(input) else 0
        is_kind = self.affine and 0 < pixels < FEW_PIXELS and input.numel() >= VALUES.get(input.dtype, 0)
        if not (is_kind and _applies(input, self.weight)):
            return super().forward(input)
        batch, channels = input.shape[:2]
        rows = input.permute(0, 2, 3, 1).reshape(batch, pixels, channels).float()
        groups = (batch, self.num_groups, channels // self.num_groups)
        mean = self._average(rows, groups)
        centered = rows - mean
        scale = (self._average(centered.square(), groups) + self.eps).rsqrt() * self.weight.float()
        result = torch.addcmul(self.bias.float(), centered, scale).to(input.dtype)
        return result.view(batch, *input.shape[2:], channels).permute(0, 3, 1, 2)

    @staticmethod
    def _average(rows: Tensor, groups: tuple[int, int, int]) -> Tensor:
        """Mean of each group of (B, pixels, C), repeated for its channels, (B, 1, C)."""
        means = rows.mean(1).view(groups).mean(2, keepdim=True)
        return means.expand(groups).reshape(len(rows), 1, -1)


def use_fast_inference(network: nn.Module) -> int:
    """Give a network's convolutions and group normalizations the faster classes, in place.

    Weights, their names and the saved configuration stay. Training, other devices and layouts than channels_last run
    as before. On another machine than one of
    `has_onednn` nothing is changed.

    Args:
        network: of Diffusers, any device.

    Returns:
        Number of layers that have them now.
    """
    count = 0
    for layer in network.modules() if has_onednn() else ():
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            layer.__class__ = PackedConv2d
        elif type(layer) is nn.GroupNorm:
            layer.__class__ = RowGroupNorm
        count += type(layer) in (PackedConv2d, RowGroupNorm)
    return count
