"""The loss of a first stage: against torch's distributions, the original's formula, and algebra on codes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny import tiny_autoencoder
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusers_ddpm_ext.training.config.autoencoder_options import AutoencoderOptions
from diffusers_ddpm_ext.training.factory.autoencoder import AutoencoderTask, psnr


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_task(kind: str = "kl", **options: object) -> AutoencoderTask:
    network = tiny_autoencoder(kind).requires_grad_(True)
    features = options.pop("features", None)
    return AutoencoderTask(network, AutoencoderOptions(first_stage_type=kind, **options), features)


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_the_loss_is_the_originals_per_value(name, power, images):
    """CompVis sums both over an image: ``(sum |d|^p + weight * KL) / N``, here with torch's own KL divergence."""
    task = make_task(reconstruction_loss=name, kl_weight=0.3)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    output = task(images, noise)
    posterior = task.autoencoder.encode(images).latent_dist
    decoded = task.autoencoder.decode(posterior.mean + posterior.std * noise).sample
    standard = Normal(torch.zeros(()), torch.ones(()))
    kl = kl_divergence(Normal(posterior.mean, posterior.std), standard).sum((1, 2, 3))
    error = (decoded - images).abs().pow(power).sum((1, 2, 3))
    expected = (error + 0.3 * kl) / images[0].numel()
    torch.testing.assert_close(output.per_sample_loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-5, atol=1e-6)
    assert output.terms["kl"].item() == pytest.approx(kl.mean().item(), rel=1e-5)
    assert output.loss_simple.item() == pytest.approx(error.mean().item() / images[0].numel(), rel=1e-5)


def test_without_noise_the_mean_is_decoded(images):
    task = make_task()
    mean = task.autoencoder.encode(images).latent_dist.mean
    expected = (task.autoencoder.decode(mean).sample - images).abs().mean()
    assert task(images).loss_simple.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_perceptual_distance_is_added(images):
    plain = make_task()(images)
    task = make_task(perceptual_weight=0.5, features=lambda a, b: (a - b).square().mean((1, 2, 3)) + 1)
    output = task(images)
    mean = output.terms["loss_perceptual"]
    assert mean > 1
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * mean)


def test_codes_are_those_of_diffusers(images):
    task = make_task("vq")
    expected = (task.autoencoder(images).sample - images).abs().mean()  # quantizes in its own way
    assert task(images).loss_simple.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_of_codes_and_encoder(images):
    """The distance reaches the encoder through the codes; the codebook learns from its own term alone."""
    task = make_task("vq", commitment_weight=0.0)
    network = task.autoencoder
    task(images).loss_simple  # noqa: B018
    output = task(images)
    output.loss.backward()
    latents = network.encode(images).latents
    indices = network.quantize(latents)[2][2]
    codes = network.quantize.embedding(indices).reshape(3, 8, 8, 4).permute(0, 3, 1, 2)
    (expected,) = torch.autograd.grad((codes - latents.detach()).square().mean(), network.quantize.embedding.weight)
    torch.testing.assert_close(network.quantize.embedding.weight.grad, expected)
    assert network.encoder.conv_in.weight.grad.abs().max() > 0


def test_the_commitment_weight_is_on_the_encoder(images):
    """Doubling it doubles what pulls the encoder's output to its codes, and leaves the codebook alone."""
    gradients = {}
    for weight in (0.0, 1.0, 2.0):
        task = make_task("vq", commitment_weight=weight)
        task(images).loss.backward()
        network = task.autoencoder
        gradients[weight] = (network.quant_conv.weight.grad, network.quantize.embedding.weight.grad)
    encoder = [gradients[weight][0] - gradients[0.0][0] for weight in (1.0, 2.0)]
    torch.testing.assert_close(encoder[1], 2 * encoder[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradients[2.0][1], gradients[0.0][1])


def test_psnr_in_decibels():
    images = torch.zeros(3, 1, 2, 2)
    wrong = torch.stack([images[0] + 0.2, images[1] + 9.0, images[2]])
    expected = [10 * math.log10(4 / 0.04), 10 * math.log10(4 / 1), 10 * math.log10(4 / 1e-10)]  # clipped to [-1, 1]
    assert psnr(wrong, images).tolist() == pytest.approx(expected, rel=1e-5)
