"""The perceptual distance with a small, randomly initialized backbone of transformers."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.runs import rows, tiny_run
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from diffusers_ddpm_ext.losses.distances import PerceptualDistance
from diffusers_ddpm_ext.training.trainer import train


def vit() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    return ViTModel(config, add_pooling_layer=False)


def resnet() -> ResNetModel:
    torch.manual_seed(0)
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))


@pytest.fixture(params=[vit, resnet], ids=["tokens", "maps"])
def folder(request, tmp_path):
    request.param().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_distance_of_images(folder, channels):
    distance = PerceptualDistance.from_pretrained(folder)
    source = torch.Generator().manual_seed(1)
    image = torch.rand(3, channels, 16, 16, generator=source) * 2 - 1
    near = (image + 0.05 * torch.randn(image.shape, generator=source)).requires_grad_()
    far = torch.rand(image.shape, generator=source) * 2 - 1
    assert distance(image, image).tolist() == [0, 0, 0]
    assert bool((distance(near, image) < distance(far, image)).all())
    distance(near, image).sum().backward()
    assert float(near.grad.abs().max()) > 0
    assert not any(p.requires_grad for p in distance.backbone.parameters())
    if channels == 4:
        other = image.clone()
        other[:, 3] = 0
        assert distance(other, image).tolist() == [0, 0, 0]


def test_images_of_another_size_are_resized(folder):
    distance = PerceptualDistance.from_pretrained(folder)
    image = torch.rand(2, 3, 24, 32) * 2 - 1
    assert distance(image, -image).shape == (2,)
    with pytest.raises(ValueError, match="need images"):
        distance(torch.zeros(2, 5, 8, 8), torch.zeros(2, 5, 8, 8))


def test_invalid_backbones_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"perceptual_model=.*cannot be loaded as a vision model"):
        PerceptualDistance.from_pretrained(tmp_path)


def test_a_run_with_a_perceptual_loss(tmp_path):
    vit().save_pretrained(tmp_path / "backbone")
    options = {"loss_type": "perceptual", "perceptual_model": str(tmp_path / "backbone"), "perceptual_weight": 0.9}
    folder = train(tiny_run(tmp_path / "run", **options))
    assert folder is not None
    losses = [row["train/loss"] for row in rows(folder) if "train/loss" in row]
    assert len(losses) == 6
    plain = train(tiny_run(tmp_path / "plain"))
    assert losses != [row["train/loss"] for row in rows(plain) if "train/loss" in row]
    assert not list((folder / "unet").glob("*backbone*"))


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"transformers.*pip install diffusers-ddpm-ext\[perceptual\]"):
        PerceptualDistance.from_pretrained(tmp_path)
