"""Posteriors are computed image by image, so that they depend on nothing but the image."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_ddpm_ext.training.data.posterior import encode_posterior, one_by_one


@pytest.fixture(scope="module")
def stage():
    """An autoencoder whose convolutions give other last bits for other batch sizes and numbers of threads."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        3,
        3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        norm_num_groups=8,
    ).eval()

    @torch.no_grad()
    def posterior(pixels):
        distribution = vae.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    return SimpleNamespace(posterior=posterior)


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_an_image_has_the_same_posterior_in_every_batch_and_for_any_number_of_threads(stage, pixels):
    """The batch as a whole differs in the last bits: without that the test could not fail."""
    threads = torch.get_num_threads()
    first = encode_posterior(stage, pixels)
    mean, std = stage.posterior(pixels)
    assert not torch.equal(first.mean, mean)
    torch.testing.assert_close(first.mean, mean)
    torch.testing.assert_close(first.std, std)
    try:
        torch.set_num_threads(2)
        parallel = encode_posterior(stage, pixels.flip(0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(parallel.mean.flip(0), first.mean)
    assert torch.equal(parallel.std.flip(0), first.std)
    alone = encode_posterior(stage, pixels[3:4])
    assert torch.equal(alone.mean, first.mean[3:4])


def test_a_deterministic_first_stage_has_no_standard_deviation(pixels):
    posterior = encode_posterior(SimpleNamespace(posterior=lambda image: (image[:, :1], None)), pixels)
    assert posterior.std is None
    assert torch.equal(posterior.mean, pixels[:, :1])


def test_results_of_threads_keep_the_order_of_the_images(pixels):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert one_by_one(lambda image: float(image.sum()), pixels) == [
            float(image.sum()) for image in pixels.split(1)
        ]
    finally:
        torch.set_num_threads(threads)
