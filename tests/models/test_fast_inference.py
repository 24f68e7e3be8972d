"""Convolutions and group normalization without gradients: torch's own layers in float64 are the oracle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.tiny import tiny_unet
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from diffusers_ddpm_ext.models import fast_inference
from diffusers_ddpm_ext.models.fast_attention import has_onednn
from diffusers_ddpm_ext.models.fast_inference import PackedConv2d, RowGroupNorm, use_fast_inference

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="no x86 CPU with oneDNN")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
KINDS = [
    nn.Conv2d(8, 12, 3, padding=1),
    nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(8, 12, 1),
    nn.Conv2d(8, 12, (3, 1), padding=(2, 0), dilation=(2, 1)),
    nn.Conv2d(8, 12, 3, groups=2),
    nn.GroupNorm(4, 8),
    nn.GroupNorm(1, 8, eps=1e-3),
    nn.GroupNorm(8, 8, affine=False),
]


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch):
    """And group normalization, which needs no oneDNN, is replaced on every machine."""
    monkeypatch.setattr(fast_inference, "has_onednn", lambda: True)
    monkeypatch.setattr(fast_inference, "LARGE", 1)
    monkeypatch.setattr(fast_inference, "VALUES", dict.fromkeys(fast_inference.VALUES, 1))


def random(*shape, dtype=torch.float32, offset=0.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) + offset
    return values.to(dtype).to(memory_format=torch.channels_last)


def calls_of(monkeypatch, name):
    """Names of the operations that oneDNN gets through its pointwise calls, from now on."""
    seen = []
    function = getattr(torch.ops.mkldnn, name)
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda *arguments: seen.append(name) or function(*arguments))
    return seen


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "layer", [pytest.param(kind, id=str(kind), marks=needs_onednn if "Conv" in str(kind) else ()) for kind in KINDS]
)
def test_a_layer_computes_what_torch_does(layer, dtype):
    layer = copy.deepcopy(layer)
    if getattr(layer, "weight", None) is not None and isinstance(layer, nn.GroupNorm):
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    inputs = random(3, 8, 9, 7, dtype=dtype, offset=2.0)
    layer = layer.to(dtype).to(memory_format=torch.channels_last)
    expected = copy.deepcopy(layer).double()(inputs.double())
    assert use_fast_inference(layer) == 1
    with torch.no_grad():
        for _ in range(2):
            result = layer(inputs)
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_group_far_from_zero_keeps_its_digits():
    """The variance is that of centered values: the mean square less the squared mean would be rounding only."""
    layer, inputs = nn.GroupNorm(2, 8), random(2, 8, 4, 4, offset=1000.0)
    expected = copy.deepcopy(layer).double()(inputs.double())
    use_fast_inference(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs).double(), expected, rtol=0, atol=1e-3)


def test_bfloat16_is_rounded_once():
    layer, inputs = nn.GroupNorm(2, 8).bfloat16(), random(2, 8, 4, 4, dtype=torch.bfloat16)
    expected = copy.deepcopy(layer).double()(inputs.double())
    use_fast_inference(layer)
    with torch.no_grad():
        error = (layer(inputs).double() - expected).abs()
    assert (error <= 2**-8 * expected.abs()).all()


@needs_onednn
def test_weights_are_packed_once_and_again_when_they_change(monkeypatch):
    packing = calls_of(monkeypatch, "_reorder_convolution_weight")
    layer = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    use_fast_inference(layer)
    small, other = random(2, 8, 4, 4), random(3, 8, 4, 4)
    with torch.no_grad():
        first = layer(small), layer(small)
        assert len(packing) == 1
        assert torch.equal(*first)
        layer(other)
        assert len(packing) == 2
        layer.weight.mul_(2)
        layer.bias.zero_()
        doubled = layer(other)
        assert len(packing) == 3
        torch.testing.assert_close(doubled, nn.functional.conv2d(other, layer.weight, padding=1))
        layer.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in layer.state_dict().items()})
        assert not layer(other).any()
        layer.bfloat16()
        assert not layer(other.bfloat16()).any()


@needs_onednn
def test_no_other_weights_get_the_address_of_packed_ones():
    """Weights are known by their address, so their memory is kept until others are packed."""
    layer = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    use_fast_inference(layer)
    inputs, other = random(2, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1).weight
    with torch.no_grad():
        layer(inputs)
        first = StorageWeakRef(layer.weight.untyped_storage())
        layer.weight = other
        assert not first.expired()
        torch.testing.assert_close(layer(inputs), nn.functional.conv2d(inputs, other, layer.bias, padding=1))
    assert first.expired()


@needs_onednn
def test_a_copy_packs_its_own_weights():
    layer = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    use_fast_inference(layer)
    with torch.no_grad():
        expected = layer(random(2, 8, 4, 4))
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert not any(name.startswith("_packed") for name in vars(again))
            assert torch.equal(again(random(2, 8, 4, 4)), expected)


@needs_onednn
@pytest.mark.parametrize("case", ["gradients", "contiguous", "large", "autocast", "unbatched", "float64", "empty"])
def test_other_calls_are_left_to_torch(case, monkeypatch):
    packing = calls_of(monkeypatch, "_reorder_convolution_weight")
    if case == "large":
        monkeypatch.setattr(fast_inference, "MOST_PIXELS", 31)
    layer = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)).to(memory_format=torch.channels_last)
    inputs = random(2, 8, 4, 4)
    if case == "contiguous":
        layer, inputs = layer.to(memory_format=torch.contiguous_format), inputs.contiguous()
    elif case == "unbatched":
        layer, inputs = layer[0], inputs[0]
    elif case == "float64":
        layer, inputs = layer.double(), inputs.double()
    elif case == "empty":
        layer, inputs = layer[0], inputs[:0]
    plain = copy.deepcopy(layer)
    use_fast_inference(layer)
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        assert torch.equal(layer(inputs), plain(inputs)) or case == "large"
    assert not packing


@needs_onednn
def test_a_network_keeps_names_weights_and_configuration(tmp_path):
    network = tiny_unet().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(network)
    layers = sum(type(layer) in (nn.Conv2d, nn.GroupNorm) for layer in network.modules())
    assert use_fast_inference(network) == layers
    inputs, time = random(2, network.config.in_channels, 8, 8), torch.tensor(5)
    with torch.no_grad():
        torch.testing.assert_close(network(inputs, time).sample, plain(inputs, time).sample, rtol=0, atol=1e-5)
    assert list(network.state_dict()) == list(plain.state_dict())
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))
    copy.deepcopy(network)


@needs_onednn
def test_inference_mode(monkeypatch):
    with torch.inference_mode():
        layer = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
        plain = copy.deepcopy(layer)
        use_fast_inference(layer)
        inputs = random(2, 8, 4, 4)
        torch.testing.assert_close(layer(inputs), plain(inputs))


def test_layers_with_other_paddings_and_classes_stay():
    class Own(nn.Conv2d):
        pass

    layers = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), Own(2, 2, 3),
                            nn.Conv2d(2, 2, 3, padding="same"), nn.Conv1d(2, 2, 3)])  # fmt: skip
    kinds = [type(layer) for layer in layers]
    assert use_fast_inference(layers) == 0
    assert [type(layer) for layer in layers] == kinds
    assert not {PackedConv2d, RowGroupNorm} & set(kinds)
