"""CompVis' and Stability's published first stages: keys and numbers that the original classes gave."""

from __future__ import annotations

import pytest
import torch
from helpers.published_models import digest, first_stage_inputs, first_stages, samples_of, seeded_tensor
from torch import nn

from diffusers_ddpm_ext.compvis.first_stage.architecture import read_first_stage
from diffusers_ddpm_ext.compvis.first_stage.arguments import first_stage_config_of
from diffusers_ddpm_ext.compvis.first_stage.weights import convert_first_stage, export_first_stage

RECORDED = first_stages()


@pytest.mark.parametrize("name", RECORDED)
def test_numbers_keys_and_the_way_back(name):
    """In float64, so that nothing hides behind rounding; the recorded numbers are rounded at 1e-12."""
    facts = RECORDED[name]
    config = read_first_stage(facts["section"], name)
    exported = export_first_stage(config.build())
    assert digest({key: tuple(tensor.shape) for key, tensor in exported.items()}) == facts["keys"]
    weights = {key: seeded_tensor(key, tuple(tensor.shape)) for key, tensor in exported.items()}
    autoencoder, rows = convert_first_stage(weights, config, 0.5)
    assert {row.source for row in rows} == weights.keys()
    assert autoencoder.config.scaling_factor == 0.5
    back = export_first_stage(autoencoder)
    assert back.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(back[key], weights[key])] == []
    same = first_stage_config_of(autoencoder)
    assert same.diffusers_config == config.diffusers_config
    double = nn.Module.to(autoencoder, torch.float64)
    with torch.no_grad():
        encoded = double.encode(first_stage_inputs(config).double())
        hidden = encoded.latents if config.kind == "vq" else encoded.latent_dist.parameters
        decoded = double.decode(hidden[:, : config.embed_dim]).sample
    assert samples_of(hidden) == pytest.approx(facts["encoded"], abs=1e-10)
    assert samples_of(decoded) == pytest.approx(facts["decoded"], abs=1e-10)
