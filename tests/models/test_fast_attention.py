"""Attention on a CPU: Diffusers' own processor and torch's formulas are the oracles, for values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SpatialNorm
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext.models import fast_attention
from diffusers_ddpm_ext.models.fast_attention import (
    BlockwiseAttention,
    FastAttnProcessor,
    OneDnnLinear,
    fast_attention_layers,
    use_fast_attention,
)

needs_onednn = pytest.mark.skipif(not fast_attention.has_onednn(), reason="no x86 CPU with oneDNN")


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch):
    monkeypatch.setattr(fast_attention, "LARGE", 1)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).requires_grad_()


def direct(query, key, value):
    """softmax(Q K^T / sqrt(D)) V in float64, (B, N, H, D)."""
    q, k, v = (each.double().transpose(1, 2) for each in (query, key, value))
    return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2)


def with_gradients(function, *inputs):
    output = function(*inputs)
    weights = torch.linspace(-1, 2, output.numel()).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad((output.double() * weights).sum(), inputs)]


@pytest.mark.parametrize("limit", [1, 2000, 2**18])
@pytest.mark.parametrize("shape", [(2, 16, 16, 3, 8), (1, 5, 9, 1, 8), (3, 64, 7, 2, 1), (2, 1, 1, 4, 40)])
def test_blockwise_attention_is_the_formula(shape, limit, monkeypatch):
    monkeypatch.setattr(fast_attention, "SCORES", limit)
    batch, queries, keys, heads, width = shape
    inputs = [random(batch, tokens, heads, width) for tokens in (queries, keys, keys)]
    for ours, theirs in zip(
        with_gradients(BlockwiseAttention.apply, *inputs), with_gradients(direct, *inputs), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=2e-5)


def test_large_scores_do_not_overflow():
    inputs = [100 * random(1, 4, 2, 8) for _ in range(3)]
    torch.testing.assert_close(BlockwiseAttention.apply(*inputs).double(), direct(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1.0, 5.0, 10.8, 10.9, 30.0])
def test_scores_of_any_size_are_those_of_the_formula(length):
    """Opposite and equal directions of this length, so that the largest power is on either side of the limit."""
    direction = torch.full((1, 4, 1, 8), 8**-0.5)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    query, key, value = length * direction * signs, length * direction * signs, random(1, 4, 1, 8)
    inputs = [each.detach().requires_grad_() for each in (query, key, value)]
    assert fast_attention._powers(*(each.detach()[:, :, 0] for each in inputs[:2])) is (length**2 * 8**-0.5 <= 41.58)
    for ours, theirs in zip(
        with_gradients(BlockwiseAttention.apply, *inputs), with_gradients(direct, *inputs), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-4)


def test_one_query_far_from_all_keys():
    """Its weights are powers of about -50: tiny, but their sum is a normal number."""
    key, value = random(1, 64, 1, 8).detach() * 0.1 + 3.5, random(1, 64, 1, 8).detach()
    query = torch.full((1, 2, 1, 8), 3.5) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    assert fast_attention._powers(query[:, :, 0], key[:, :, 0])
    torch.testing.assert_close(
        BlockwiseAttention.apply(query, key, value).double(), direct(query, key, value), rtol=1e-4, atol=1e-4
    )


def test_large_values_times_large_powers_do_not_overflow():
    query = key = torch.full((1, 4, 1, 8), 3.8)
    value = random(1, 4, 1, 8).detach() * 1e15
    assert fast_attention._powers(query[:, :, 0], key[:, :, 0])
    torch.testing.assert_close(
        BlockwiseAttention.apply(query, key, value).double(), direct(query, key, value), rtol=1e-4, atol=1e10
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    query, key, value = (random(1, 4, 2, 8).detach() for _ in range(3))
    query[0, 1, 0, 3] = bad
    result = BlockwiseAttention.apply(query, key, value)
    assert result[0, 1, 0].isnan().all()
    assert result[0, [0, 2, 3]].isfinite().all()


def test_bfloat16_is_computed_in_float32():
    """Rounding of the result is all that is left, which torch's own kernel does not reach."""
    inputs = [3 * random(2, 64, 4, 8, dtype=torch.bfloat16).detach() for _ in range(3)]
    output = BlockwiseAttention.apply(*inputs)
    assert output.dtype == torch.bfloat16
    exact = direct(*inputs)
    assert bool(((output.double() - exact).abs() <= exact.abs() / 256 + 1e-4).all())


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (1, 1, 6)])
def test_linear_layers_are_torchs(shape, bias):
    layer = torch.nn.Linear(6, 4, bias=bias)
    inputs = random(*shape)
    parameters = [inputs, layer.weight, *([layer.bias] if bias else [])]
    ours = with_gradients(lambda x, w, b=None: OneDnnLinear.apply(x, w, b), *parameters)
    theirs = with_gradients(torch.nn.functional.linear, *parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_frozen_parameters_get_no_gradient():
    weight = torch.ones(4, 6)
    output = OneDnnLinear.apply(random(2, 6), weight, None)
    output.sum().backward()
    assert weight.grad is None


pays = fast_attention._pays


def layer_of(**options):
    torch.manual_seed(0)
    settings = {"query_dim": 16, "heads": 2, "dim_head": 8, "bias": True} | options
    layer = Attention(**settings)
    for parameter in layer.parameters():  # norms of ones and biases of zeros would hide a mistake
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


CASES = {
    "tokens": ({}, (2, 140, 16), {}),
    "few tokens": ({}, (2, 9, 16), {}),
    "picture": ({}, (2, 16, 12, 13), {}),
    "group norm": ({"norm_num_groups": 4, "eps": 1e-3}, (2, 16, 12, 12), {}),
    "residual and factor": ({"residual_connection": True, "rescale_output_factor": 1.7}, (2, 16, 12, 12), {}),
    "cross": ({"cross_attention_dim": 12}, (2, 140, 16), {"encoder_hidden_states": (2, 130, 12)}),
    "cross, norm": (
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
        (2, 140, 16),
        {"encoder_hidden_states": (2, 130, 12)},
    ),
    "wide heads": ({"heads": 1, "dim_head": 40}, (2, 140, 16), {}),
    "no bias": ({"bias": False, "out_bias": False}, (2, 140, 16), {}),
    "query norm": ({"qk_norm": "layer_norm"}, (2, 140, 16), {}),
    "mask": ({}, (2, 140, 16), {"attention_mask": (2, 1, 140)}),
    "temb": ({"query_dim": 32, "spatial_norm_dim": 5}, (2, 32, 12, 12), {"temb": (2, 5, 4, 4)}),
}


@needs_onednn
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_as_with_diffusers_processor(name):
    options, shape, more = CASES[name]
    layer = layer_of(**options)
    assert isinstance(layer.spatial_norm, SpatialNorm) == (name == "temb")
    if name == "mask":
        layer.set_processor(AttnProcessor2_0())
    inputs = [random(*shape), *(random(*each) for each in more.values())]

    def call(*tensors):
        return layer(tensors[0], **dict(zip(more, tensors[1:], strict=True)))

    results = []
    for processor in (AttnProcessor2_0(), FastAttnProcessor()):
        layer.set_processor(processor)
        results.append(with_gradients(call, *inputs))
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        layer.zero_grad()
        call(*inputs).square().sum().backward()
        results[-1] += [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    largest = max(float(each.abs().max()) for each in results[0])  # the key's bias has a gradient of rounding alone
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=2e-5, atol=1e-6 * largest)


@needs_onednn
def test_only_the_default_processor_is_replaced():
    network = tiny_unet()
    layers = [module for module in network.modules() if isinstance(module, Attention)]
    layers[0].set_processor(AttnProcessor())
    assert use_fast_attention(network) == fast_attention_layers(network) == len(layers) - 1 > 0
    assert type(layers[0].processor) is AttnProcessor
    assert use_fast_attention(network) == len(layers) - 1  # a second time
    assert use_fast_attention(torch.nn.Linear(2, 2)) == 0


def test_another_machine_is_left_alone(monkeypatch):
    monkeypatch.setattr(fast_attention.platform, "machine", lambda: "arm64")
    network = tiny_unet()
    assert use_fast_attention(network) == fast_attention_layers(network) == 0


@needs_onednn
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_network_and_its_saved_files_are_the_same(precision, tmp_path):
    torch.manual_seed(0)
    network = UNet2DModel(
        16, 3, 3, layers_per_block=1, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    ).to(precision)  # fmt: skip
    faster = copy.deepcopy(network)
    assert use_fast_attention(faster) == 4
    images, steps = random(2, 3, 16, 16, dtype=precision), torch.tensor([3, 700])
    stock, ours = network(images, steps).sample, faster(images, steps).sample
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5 if precision == torch.float32 else 0.1)
    for name, each in (("stock", network), ("ours", faster)):
        each.save_pretrained(tmp_path / name)
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()


@needs_onednn
def test_autocast_rounds_as_diffusers_does():
    layer, inputs = layer_of(), random(2, 140, 16)
    exact = layer(inputs)
    errors = []
    for processor in (AttnProcessor2_0(), FastAttnProcessor()):
        layer.set_processor(processor)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(inputs)
        assert output.dtype == torch.bfloat16
        output.float().sum().backward()
        errors.append(float((output - exact).detach().abs().max()))
    assert errors[1] <= 1.5 * errors[0]
    assert layer.to_q.weight.grad.dtype == torch.float32


@needs_onednn
def test_the_middle_of_an_autoencoder():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    images = random(2, 3, 16, 16)
    stock = vae(images).sample
    assert use_fast_attention(vae) == 2
    torch.testing.assert_close(vae(images).sample, stock, rtol=0, atol=1e-5)


@needs_onednn
def test_a_hook_of_a_projection_is_called():
    layer, calls = layer_of(), []
    layer.set_processor(FastAttnProcessor())
    layer.to_q.register_forward_hook(lambda *_: calls.append(1))
    layer(random(2, 140, 16))
    assert calls == [1]


def test_second_derivatives_are_refused():
    """Torch's own kernel has none either."""
    inputs = [random(1, 4, 2, 8) for _ in range(3)]
    (gradient,) = torch.autograd.grad(BlockwiseAttention.apply(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@needs_onednn
def test_the_cases_reach_blockwise_attention_but_for_wide_heads(monkeypatch):
    reached = []
    monkeypatch.setattr(fast_attention, "_pays", lambda *arguments: reached.append(pays(*arguments)) or False)
    for name, (options, shape, more) in CASES.items():
        if name in ("query norm", "mask", "temb"):
            continue
        layer = layer_of(**options)
        layer.set_processor(FastAttnProcessor())
        layer(random(*shape), **{key: random(*each) for key, each in more.items()})
        assert reached.pop() == (name not in ("few tokens", "wide heads")), name


def test_double_precision_stays_double():
    layer, inputs = layer_of().double(), random(2, 140, 16).double()
    layer.set_processor(AttnProcessor2_0())
    expected = layer(inputs)
    layer.set_processor(FastAttnProcessor())
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-12, atol=1e-12)
