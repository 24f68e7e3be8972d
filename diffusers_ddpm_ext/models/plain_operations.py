"""The operations of CompVis' autoencoders in place of the kernels that Diffusers' choose, which round more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MAX_TOKENS = 4096
"""Longest sequence whose attention weights are stored (64 MiB an image in float32); longer ones are fused."""


class PlainOperations(TorchFunctionMode):
    """While it is entered, an autoencoder of Diffusers computes on a CPU what CompVis' computes, to the bit.

    Attention without further arguments is two matrix products, its projections are convolutions of 1x1, and SiLU is
    ``x sigmoid(x)``. In float32 PyTorch's kernels for the same formulas are up to four times as far from the result in
    float64, and the layers after them amplify that.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or what replaces it."""
        kwargs = kwargs or {}
        replacement = REPLACEMENTS.get(func)
        if replacement is None or not args or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        return replacement(*args, **kwargs)


class ContiguousProducts(TorchFunctionMode):
    """While it is entered, Diffusers' `LDMBertModel` computes on a CPU what CompVis' encoders compute, to the bit.

    Their products of several prompts are of contiguous matrices; PyTorch's kernels for short transposed ones add in
    another order.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, batched products with contiguous matrices."""
        if func is torch.bmm and args[0].device.type == "cpu":
            args = [matrix.contiguous() for matrix in args]
        return func(*args, **(kwargs or {}))


def _silu(values: Tensor, inplace: bool = False) -> Tensor:
    gate = values.sigmoid()
    return values.mul_(gate) if inplace else values * gate


def _linear(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if tokens.ndim != 3:
        return F.linear(tokens, weight, bias)
    image = tokens.transpose(1, 2)[:, :, None].contiguous()
    return F.conv2d(image, weight[:, :, None, None], bias)[:, :, 0].transpose(1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    has_more = bool(args) or any(isinstance(setting, Tensor) or setting for setting in kwargs.values())
    if has_more or key.shape[-2] > MAX_TOKENS:
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return (value.transpose(-2, -1) @ weights.transpose(-2, -1)).transpose(-2, -1)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.silu: _silu,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
}
