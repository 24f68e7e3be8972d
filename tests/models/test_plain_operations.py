"""Operations of the first stage: formulas in float64 and PyTorch's kernels are the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusers_ddpm_ext.models import plain_operations
from diffusers_ddpm_ext.models.plain_operations import PlainOperations


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_operations_are_the_same_functions():
    q, k, v = (tokens(2, 3, 7, 5, seed=seed) for seed in range(3))
    x, weight, bias = tokens(2, 9, 4), tokens(6, 4, seed=1), tokens(6, seed=2)
    with PlainOperations():
        attention = [F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, scale=0.3)]
        linear = [F.linear(x, weight, bias), F.linear(x, weight), nn.functional.linear(x[0], weight, bias=bias)]
        silu, in_place = nn.SiLU()(x), F.silu(x.clone(), inplace=True)
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) / 5**0.5).softmax(-1)
    torch.testing.assert_close(attention[0], torch.einsum("bhij,bhjd->bhid", weights, v))
    torch.testing.assert_close(attention[1], F.scaled_dot_product_attention(q, k, v, scale=0.3))
    product = torch.einsum("btc,dc->btd", x, weight)
    for result, expected in zip(linear, [product + bias, product, product[0] + bias], strict=True):
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(silu, x / (1 + (-x).exp()))
    torch.testing.assert_close(in_place, silu)


@pytest.mark.parametrize("extra", [{"attn_mask": torch.eye(3).bool()}, {"is_causal": True}])
def test_masks_are_not_lost(extra):
    q, k, v = (tokens(1, 1, 3, 4, seed=seed) for seed in range(3))
    with PlainOperations():
        result = F.scaled_dot_product_attention(q, k, v, **extra)
    torch.testing.assert_close(result, F.scaled_dot_product_attention(q, k, v, **extra))
    assert not torch.allclose(result, F.scaled_dot_product_attention(q, k, v))


def test_long_sequences_store_no_attention_weights(monkeypatch):
    monkeypatch.setattr(plain_operations, "MAX_TOKENS", 4)
    shapes = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: shapes.append(self.shape) or softmax(self, dim))
    for count in (4, 5):
        q = tokens(1, 1, count, 2)
        with PlainOperations():
            result = F.scaled_dot_product_attention(q, q, q)
        torch.testing.assert_close(result, F.scaled_dot_product_attention(q, q, q))
    assert shapes == [(1, 1, 4, 4)]


def test_gradients_flow():
    x = tokens(1, 5, 3).requires_grad_()
    weight = tokens(3, 3, seed=1)
    with PlainOperations():
        assert torch.autograd.gradcheck(lambda x: F.silu(F.linear(x, weight)), x)
        assert torch.autograd.gradcheck(lambda x: F.scaled_dot_product_attention(x, x, x), x)


def test_rounding_is_that_of_the_formulas():
    """The projection is a convolution to the bit, attention two products."""
    x, weight, bias = tokens(1, 64, 96).float(), tokens(96, 96, seed=1).float(), tokens(96, seed=2).float()
    image = x.transpose(1, 2).reshape(1, 96, 8, 8).contiguous()
    with PlainOperations():
        assert torch.equal(F.silu(x), x * torch.sigmoid(x))
        result = F.linear(x, weight, bias)
    expected = F.conv2d(image, weight[:, :, None, None], bias).flatten(2).transpose(1, 2)
    assert torch.equal(result, expected)
