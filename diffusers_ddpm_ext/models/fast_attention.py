"""Attention of Diffusers' networks on x86 CPUs, faster than PyTorch's kernels where heads are narrow.

`UNet2DModel` has heads of 8 channels unless told otherwise. PyTorch's attention kernel multiplies matrices of which
one side is then 8, and its backward pass in bfloat16 is slower than in float32. Here the scores of a few heads at a
time, which fit into a core's cache, are multiplied in the order in which the long side comes first. The backward pass
computes them again, as PyTorch's does, so the memory is about the same. The projections go to oneDNN, which uses
AVX-512 on every processor that has it.

Results differ from PyTorch's by rounding only: bfloat16 is computed in float32 inside.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from diffusers_ddpm_ext.utils.dtensor import is_sharded

SCORES = 2**18
"""Scores that are computed at a time: 1 MiB, about a core's second cache."""
LARGEST_POWER = 60
"""Scores, as powers of two, up to which their sums and products with values are far from float32's limits."""
NARROW = 8
"""Channels of a head up to which it pays in float32, and without gradients."""
FEWEST_SCORES = 2**16
"""Scores of a layer from which it pays there in float32."""
LARGE = 2**21
"""Products in a linear layer, below which calling oneDNN costs more than it saves."""
WIDEST, MOST_TOKENS = 32, 600
"""Channels and tokens up to which it pays in bfloat16 with gradients."""


def _heads_first(tensor: Tensor) -> Tensor:
    """(B, N, H, D) of any dtype as contiguous float32 (B H, N, D)."""
    heads = tensor.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return heads.reshape(-1, *heads.shape[2:])


def _heads_last(tensor: Tensor, like: Tensor) -> Tensor:
    """(B H, D, N) in the shape and dtype of ``like``, (B, N, H, D)."""
    batch, _, heads, _ = like.shape
    result = torch.empty(like.shape, dtype=like.dtype)
    result.permute(0, 2, 3, 1).copy_(tensor.view(batch, heads, *tensor.shape[1:]))
    return result


def _blocks(heads: int, scores: int) -> Iterator[slice]:
    """Slices of heads whose scores are at most `SCORES`, or one head at a time."""
    size = max(1, SCORES // scores)
    return (slice(start, min(start + size, heads)) for start in range(0, heads, size))


def _powers(query: Tensor, key: Tensor) -> bool:
    """Whether exp2 of every score is a finite number, so that no row's maximum has to be subtracted first."""
    ones = query.new_ones(query.shape[2])
    longest = [float((each.flatten(0, 1).square() @ ones).amax()) for each in (query, key)]
    return longest[0] * longest[1] <= query.shape[2] * (LARGEST_POWER * math.log(2)) ** 2  # Cauchy-Schwarz; NaN: False


def _weights(query: Tensor, key: Tensor, out: Tensor, has_powers: bool) -> tuple[Tensor, Tensor | None]:
    """Weights of some heads' values in the first rows of ``out``, and what they sum to, (heads, N, 1); None: to 1.

    exp2 takes a third of softmax's time: torch's exp on a CPU is slower, and no maximum is searched.
    """
    out, scale = out[: len(query)], query.shape[2] ** -0.5
    if not has_powers:
        torch.baddbmm(out, query, key.transpose(1, 2), beta=0, alpha=scale, out=out)
        return torch.softmax(out, -1, out=out), None
    torch.baddbmm(out, query, key.transpose(1, 2), beta=0, alpha=scale / math.log(2), out=out)
    torch.exp2(out, out=out)
    return out, out.sum(-1, keepdim=True)


def _probabilities(query: Tensor, key: Tensor, out: Tensor, has_powers: bool) -> Tensor:
    """Softmax of the scaled scores of some heads, in the first rows of ``out``."""
    weights, sums = _weights(query, key, out, has_powers)
    return weights if sums is None else weights.mul_(sums.reciprocal_())


class BlockwiseAttention(torch.autograd.Function):
    """Attention of (B, N, H, D) queries to (B, M, H, D) keys and values, a few heads at a time; first derivatives."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return (B, N, H, D) in the dtype of the query."""
        ctx.save_for_backward(query, key, value)
        q, k, v = map(_heads_first, (query, key, value))
        heads, tokens, width = q.shape
        blocks, has_powers = list(_blocks(heads, tokens * k.shape[1])), _powers(q, k)
        scores = q.new_empty(blocks[0].stop, tokens, k.shape[1])
        result = q.new_empty(heads, width, tokens)
        for block in blocks:
            weights, sums = _weights(q[block], k[block], scores, has_powers)
            torch.bmm(v[block].transpose(1, 2), weights.transpose(1, 2), out=result[block])
            if sums is not None:
                result[block] /= sums.transpose(1, 2)
        ctx.has_powers = has_powers
        return _heads_last(result, query)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        saved = ctx.saved_tensors
        q, k, v = map(_heads_first, saved)
        g = _heads_first(gradient)
        heads, tokens, width = q.shape
        blocks = list(_blocks(heads, 2 * tokens * k.shape[1]))
        scores = q.new_empty(blocks[0].stop, tokens, k.shape[1])
        changes = torch.empty_like(scores)
        of_query, of_key, of_value = (torch.empty_like(each.transpose(1, 2)).contiguous() for each in (q, k, v))
        for block in blocks:
            probabilities = _probabilities(q[block], k[block], scores, ctx.has_powers)
            torch.bmm(g[block].transpose(1, 2), probabilities, out=of_value[block])
            change = changes[: len(probabilities)]
            torch.baddbmm(change, g[block], v[block].transpose(1, 2), beta=0, alpha=width**-0.5, out=change)
            torch.ops.aten._softmax_backward_data.out(change, probabilities, -1, torch.float32, grad_input=change)
            torch.bmm(k[block].transpose(1, 2), change.transpose(1, 2), out=of_query[block])
            torch.bmm(q[block].transpose(1, 2), change, out=of_key[block])
        of_query, of_key, of_value = map(_heads_last, (of_query, of_key, of_value), saved)
        return of_query, of_key, of_value


def _onednn_linear(matrix: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(matrix, weight, bias, "none", [], "")
    return product


class OneDnnLinear(torch.autograd.Function):
    """A linear layer in float32 by oneDNN; first derivatives."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``inputs @ weight.T + bias`` for (..., in), (out, in) and (out,)."""
        ctx.save_for_backward(inputs, weight)
        return _onednn_linear(inputs, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of inputs, weight and bias that are needed."""
        inputs, weight = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _onednn_linear(gradient, weight.t()) if needs_inputs else None,
            _onednn_linear(rows.t(), inputs.flatten(0, -2).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def has_onednn() -> bool:
    """Whether this is an x86 CPU, and PyTorch was built with oneDNN for it."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return is_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _project(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Apply a linear layer, by oneDNN in float32 if it is large, and nothing but its weight and bias is in it."""
    if type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks:
        is_large = inputs.numel() * layer.out_features >= LARGE
        in_float32 = (
            is_large and inputs.dtype == torch.float32 == layer.weight.dtype and not torch.is_autocast_enabled("cpu")
        )
        if in_float32 and not is_sharded(layer.weight):
            result: Tensor = OneDnnLinear.apply(inputs, layer.weight, layer.bias)
            return result
    projected: Tensor = layer(inputs)
    return projected


def _pays(query: Tensor, tokens: int) -> bool:
    """Whether blockwise attention of (B, N, H, D) queries to that many tokens is faster than PyTorch's."""
    width, halved = query.shape[-1], query.dtype == torch.bfloat16
    if query.dtype == torch.float64:  # computed in float32, it would lose its precision
        return False
    if width <= NARROW:
        return halved or query.shape[:-1].numel() * tokens >= FEWEST_SCORES
    return halved and query.requires_grad and width <= WIDEST and tokens <= MOST_TOKENS


class FastAttnProcessor(AttnProcessor2_0):
    """Diffusers' `AttnProcessor2_0`, faster on a CPU; the same elsewhere, with masks and in a compiler."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return the attention's output in the shape of ``hidden_states``: (B, N, C) or (B, C, height, width)."""
        if not self._applies(attn, hidden_states, attention_mask):
            result: Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return result
        states = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        if attn.group_norm is not None:
            states = attn.group_norm(states.transpose(1, 2)).transpose(1, 2)
        states = states.contiguous()  # once, not in each projection and its backward pass
        context = states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            _project(layer, inputs).unflatten(-1, (attn.heads, -1))
            for layer, inputs in ((attn.to_q, states), (attn.to_k, context), (attn.to_v, context))
        )
        if _pays(query, key.shape[1]):
            attended = BlockwiseAttention.apply(query, key, value)
        else:
            heads_first = (each.transpose(1, 2) for each in (query, key, value))
            attended = nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        output: Tensor = attn.to_out[1](_project(attn.to_out[0], attended.flatten(2)))
        if hidden_states.ndim == 4:
            output = output.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            output = output + hidden_states
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor

    @staticmethod
    def _applies(attn: Attention, hidden_states: Tensor, attention_mask: Tensor | None) -> bool:
        return (
            hidden_states.device.type == "cpu"
            and attention_mask is None
            and attn.spatial_norm is attn.norm_q is attn.norm_k is None
            and not torch.compiler.is_compiling()
        )


def use_fast_attention(network: nn.Module) -> int:
    """Give a network's attention layers `FastAttnProcessor`, in place.

    Weights, their names and the saved configuration stay. Layers with another processor than Diffusers' default keep
    theirs. On another machine than one of `has_onednn` nothing is changed.

    Args:
        network: of Diffusers, any device.

    Returns:
        Number of layers that have it now.
    """
    for layer in _attention_layers(network) if has_onednn() else ():
        if type(layer.processor) is AttnProcessor2_0:
            layer.set_processor(FastAttnProcessor())
    return fast_attention_layers(network)


def fast_attention_layers(network: nn.Module) -> int:
    """Number of a network's attention layers with a `FastAttnProcessor`."""
    return sum(type(layer.processor) is FastAttnProcessor for layer in _attention_layers(network))


def _attention_layers(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, Attention)]
