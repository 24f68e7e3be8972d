"""Pictures as conditions of latent models, against Diffusers' autoencoder and the two conventions of inpainting."""

from __future__ import annotations

import pytest
import torch
from helpers.latent_cases import tiny_first_stage

from diffusers_ddpm_ext.models.concat_condition import concat_channels, concat_condition
from diffusers_ddpm_ext.models.first_stage import FirstStage


@pytest.fixture(scope="module")
def stage():
    return FirstStage(tiny_first_stage("kl"))


@pytest.fixture
def picture():
    """16 x 16, transparent in the top half."""
    picture = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture[:, 3, :8], picture[:, 3, 8:] = -0.7, 0.9
    return picture


def posterior(stage: FirstStage, pixels: torch.Tensor):
    with torch.no_grad():
        return stage.autoencoder.encode(pixels).latent_dist


def test_a_hole_is_black_and_its_mask_comes_last(stage, picture):
    """latent-diffusion's scripts/inpaint.py: [-1, 1] of ((1 - mask) * image) and of the mask."""
    mask = (picture[:, 3:] < 0).float()
    image = 2 * ((1 - mask) * (picture[:, :3] + 1) / 2) - 1
    made = concat_condition(stage, picture, "mode")
    assert torch.allclose(made[:, :4], posterior(stage, image).mode(), atol=1e-5)
    assert torch.equal(made[:, 4:], 2 * mask[:, :, ::2, ::2] - 1)
    assert made.shape[1] == concat_channels(stage, 4, "mode")


def test_a_hole_is_gray_and_its_mask_comes_first(stage, picture):
    """stablediffusion's LatentInpaintDiffusion: a scaled sample of image * (mask < 0.5), after the mask."""
    mask = (picture[:, 3:] < 0).float()
    made = concat_condition(stage, picture, "sample", torch.Generator().manual_seed(5))
    drawn = posterior(stage, picture[:, :3] * (mask < 0.5))
    noise = torch.randn(drawn.mean.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(made[:, :1], mask[:, :, ::2, ::2])
    assert torch.allclose(made[:, 1:], 0.7 * (drawn.mean + drawn.std * noise), atol=1e-5)


@pytest.mark.parametrize("through", ["mode", "sample"])
def test_colors_under_a_hole_change_nothing(stage, picture, through):
    other = picture.clone()
    other[:, :3, :8] = 1
    made = [concat_condition(stage, each, through, torch.Generator().manual_seed(0)) for each in (picture, other)]
    assert torch.equal(*made)


def test_pictures_without_a_hole_and_pictures_that_stay_pictures(stage, picture):
    color = picture[:, :3]
    assert torch.allclose(concat_condition(stage, color, "mode"), posterior(stage, color).mode(), atol=1e-5)
    averaged = concat_condition(stage, color, None)
    assert torch.allclose(averaged, torch.nn.functional.avg_pool2d(color, 2), atol=1e-6)
    with pytest.raises(ValueError, match="2 channels"):
        concat_condition(stage, picture[:, :2], "mode")
