"""Folding of the scale: the same function with a scaling_factor alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.tiny import tiny_autoencoder

from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.models.fold_scale import fold_scale, reason_not_to_fold

MEAN, STD = [0.25, -1.5, 0.0, 0.75], [0.5, 2.0, 1.25, 0.125]
SCALES = {
    "mean and std": {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.7},
    "std": {"latents_std": STD},
    "shift": {"shift_factor": 0.3, "scaling_factor": 0.7},
    "mean": {"latents_mean": MEAN, "latents_std": [0.5] * 4, "scaling_factor": 3.0},
    "one std": {"latents_std": [0.5] * 4, "scaling_factor": 3.0},
    "scaling_factor": {"scaling_factor": 0.13025},
}
CASES = [
    *(("kl", scale, convolutions) for scale in SCALES for convolutions in (True, False)),
    *(("vq", scale, True) for scale in ("shift", "mean", "one std", "scaling_factor")),
    *((kind, scale, True) for kind in ("tiny", "dc") for scale in ("one std", "scaling_factor")),
]


def autoencoder(kind: str, scale: str, convolutions: bool = True, **config: Any) -> Any:
    config |= {"use_quant_conv": False, "use_post_quant_conv": False} if not convolutions else {}
    model = tiny_autoencoder(kind, **config)
    model.register_to_config(scaling_factor=1.0)
    model.register_to_config(**SCALES[scale])
    return model


@pytest.mark.parametrize(("kind", "scale", "convolutions"), CASES)
def test_the_folded_autoencoder_is_the_same_function(kind, scale, convolutions):
    model = autoencoder(kind, scale, convolutions)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = dict(model.config)
    assert reason_not_to_fold(model) == ""
    folded = fold_scale(model)
    assert not any(folded.config.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    old, new = FirstStage(model), FirstStage(folded)
    torch.testing.assert_close(new.decode(x), old.decode(x), rtol=1e-5, atol=1e-5)
    # Diffusers' LDMPipeline decodes like this, for want of a mean.
    stock = folded.decode(x / folded.config.scaling_factor).sample
    torch.testing.assert_close(stock, old.decode(x), rtol=1e-5, atol=1e-5)
    encoded = (stage.encode(pixels, torch.Generator().manual_seed(3)) for stage in (new, old))
    torch.testing.assert_close(*encoded, rtol=1e-5, atol=1e-5)
    assert dict(model.config) == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(folded).from_config(folded.config).state_dict().keys() == folded.state_dict().keys()


def test_a_folded_quantizer_chooses_the_same_codes():
    model = autoencoder("vq", "mean", num_vq_embeddings=512)
    folded = fold_scale(model)
    x = 6 * torch.randn(4, 4, 64, 64, generator=torch.Generator().manual_seed(2))

    def codes(stage: FirstStage) -> torch.Tensor:
        return stage.autoencoder.quantize(stage.denormalize(x))[2][2]

    assert len(codes(FirstStage(model)).unique()) > 256
    assert torch.equal(codes(FirstStage(folded)), codes(FirstStage(model)))


def test_distances_that_a_scale_per_channel_would_change_are_not_folded():
    """The nearest code by ``z / std`` is another one, so no codebook gives the same codes."""
    spatial = {"norm_type": "spatial", "block_out_channels": (32, 32)}
    assert "before quantization" in reason_not_to_fold(autoencoder("vq", "std"))
    assert "before quantization" in reason_not_to_fold(autoencoder("vq", "mean and std"))
    assert "shifted latents" in reason_not_to_fold(autoencoder("vq", "mean", **spatial))
    assert reason_not_to_fold(autoencoder("vq", "one std", **spatial)) == ""


@pytest.mark.parametrize("kind", ["tiny", "dc"])
@pytest.mark.parametrize("scale", ["mean and std", "std", "shift", "mean"])
def test_autoencoders_without_1x1_convolutions_are_not_folded(kind, scale):
    assert type(autoencoder(kind, scale)).__name__ in reason_not_to_fold(autoencoder(kind, scale))


def test_a_plain_scale_changes_no_weight():
    model = autoencoder("kl", "one std")
    folded = fold_scale(model)
    assert folded.config.scaling_factor == 6.0
    assert all(one is other for one, other in zip(folded.parameters(), model.parameters(), strict=True))
    assert fold_scale(copy.deepcopy(folded)).config == folded.config
