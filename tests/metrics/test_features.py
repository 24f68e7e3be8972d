"""Features of images: one image at a time, resized as Pillow does, from models that are read safely."""

from __future__ import annotations

import json
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.metrics.digit_features import DIGITS_TRAINED, load_digit_classifier
from diffusers_ddpm_ext.metrics.feature_cache import cache_features, cached_features
from diffusers_ddpm_ext.metrics.features import load_feature_extractor
from diffusers_ddpm_ext.metrics.resizing import resize


def images(count: int = 5, channels: int = 3, size: int = 12) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_vit(folder, add_pooling_layer=True, **changes):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTModel(config, add_pooling_layer=add_pooling_layer).eval()
    model.save_pretrained(folder)
    return model


def test_pixels_are_themselves():
    extractor = load_feature_extractor("pixels")
    assert torch.equal(extractor(images()), images().flatten(1))


@pytest.mark.parametrize("name", ["digits", "model", "script", "pixels"])
def test_features_of_an_image_do_not_depend_on_the_others(name, tmp_path):
    """To the bit: alone, in a batch, in another place of another batch."""
    channels = 1 if name == "digits" else 3
    if name == "model":
        save_vit(tmp_path)
    if name == "script":
        save_script(tmp_path / "script.pt")
    path = {"model": str(tmp_path), "script": str(tmp_path / "script.pt")}.get(name, name)
    extractor = load_feature_extractor(path, trust_file=name == "script")
    batch = images(channels=channels)
    together = extractor(batch)
    assert torch.equal(extractor(batch[3:4])[0], together[3])
    assert torch.equal(extractor(batch.flip(0)), together.flip(0))
    assert together.dtype == torch.float32
    assert len(together.unique(dim=0)) == 5


@pytest.mark.parametrize(("size", "target"), [((37, 21), (8, 12)), ((5, 6), (16, 16)), ((64, 64), (7, 64))])
def test_resizing_is_pillows(size, target):
    """Of floats, with Pillow's antialiasing; what overshoots is clipped."""
    pixels = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    expected = np.asarray(Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC)).clip(-1, 1)
    result = resize(torch.from_numpy(pixels)[None, None], target)[0, 0].numpy()
    np.testing.assert_allclose(result, expected, atol=2e-6)


def test_the_digits_classifier_knows_digits_it_has_not_seen():
    digits = load_digits()
    pixels = torch.from_numpy(digits.images[DIGITS_TRAINED:]).float()[:, None] / 8 - 1
    logits = load_digit_classifier()(pixels)
    right = (logits.argmax(1).numpy() == digits.target[DIGITS_TRAINED:]).mean()
    assert right > 0.93
    features = load_feature_extractor("digits")(pixels[:20])
    assert features.shape == (20, 64)
    large = torch.nn.functional.interpolate(pixels[:20], scale_factor=4)
    nearest = torch.cdist(load_feature_extractor("digits")(large), features).argmin(1)
    assert (nearest == torch.arange(20)).float().mean() > 0.9  # of another size they are resized


@pytest.mark.parametrize("pooling", [True, False])
def test_a_vision_model_of_transformers(pooling, tmp_path):
    """Against the model itself on pixels that Pillow resized; weights without a pooler give the class token."""
    model = save_vit(tmp_path, add_pooling_layer=pooling)
    preparation = {"size": {"height": 8, "width": 8}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preparation))
    extractor = load_feature_extractor(str(tmp_path))
    image = images(1)
    rows = [Image.fromarray((image[0, c].numpy() + 1) / 2).resize((8, 8), Image.Resampling.BICUBIC) for c in range(3)]
    pixels = torch.tensor(np.stack([np.asarray(row).clip(0, 1) for row in rows]))
    mean, std = (torch.tensor(preparation[key])[:, None, None] for key in ("image_mean", "image_std"))
    with torch.no_grad():
        output = model(pixel_values=((pixels - mean) / std)[None])
    expected = output.pooler_output if pooling else output.last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(image), expected, atol=1e-5, rtol=1e-5)
    assert "resized to 8x8 (bicubic, antialiased)" in extractor.preparation
    assert ("pooled output" if pooling else "class token") in extractor.preparation
    gray = images(1, channels=1)
    assert torch.equal(extractor(gray), extractor(gray.expand(-1, 3, -1, -1)))


def test_models_of_other_kinds(tmp_path):
    """A CLIP model gives its image embedding, a convolutional one its pooled output."""
    from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = sizes | {"image_size": 8, "patch_size": 4}, sizes | {"vocab_size": 9, "max_position_embeddings": 4}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=6)).save_pretrained(tmp_path / "clip")
    ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])).save_pretrained(tmp_path / "res")
    clip, resnet = (load_feature_extractor(str(tmp_path / name)) for name in ("clip", "res"))
    assert clip(images()).shape == (5, 6)
    assert resnet(images()).shape == (5, 8)
    assert "image embedding" in clip.preparation
    assert "not resized" in resnet.preparation
    assert clip.fingerprint != resnet.fingerprint


class Script(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(432, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image.flatten(1)).relu() + 0.1 * image.flatten(1)[:, :4]


class StyleGAN(torch.nn.Module):
    def forward(self, image: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert image.dtype == torch.uint8
        return image.float().mean(dim=(2, 3)) if return_features else image.float()


def save_script(path, module=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Script() if module is None else module).save(path)


def test_a_torchscript_file_runs_only_where_it_is_trusted(tmp_path):
    path = str(tmp_path / "script.pt")
    save_script(path, StyleGAN())
    with pytest.raises(ConfigError, match="add --trust_feature_extractor"):
        load_feature_extractor(path)
    extractor = load_feature_extractor(path, trust_file=True)
    levels = ((images() + 1) * 127.5).round()
    torch.testing.assert_close(extractor(images()), levels.mean(dim=(2, 3)))
    with pytest.raises(ValueError, match="1 or 3 channels, not of 2"):
        extractor(images(channels=2))


def damaged(folder, name):
    if name == "no weights":
        (folder / "model.safetensors").unlink()
    elif name == "half the weights":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif name == "no config":
        (folder / "config.json").unlink()
    elif name == "another size":
        (folder / "preprocessor_config.json").write_text('{"size": {"height": "big", "width": 3}}')
    elif name == "zero deviation":
        (folder / "preprocessor_config.json").write_text('{"image_std": [0, 1, 1]}')
    elif name == "other layers":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif name == "a text model":
        from transformers import BertConfig, BertModel

        BertModel(
            BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        ).save_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    ["no weights", "half the weights", "no config", "another size", "zero deviation", "other layers", "a text model"],
)
def test_bad_models_are_one_sentence(name, tmp_path):
    save_vit(tmp_path)
    damaged(tmp_path, name)
    with pytest.raises((ConfigError, OSError)) as caught:
        load_feature_extractor(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "trust", "message"),
    [
        ("no/such/model", False, "neither pixels, digits, a file nor a folder"),
        ("no-such-model", True, "is for a TorchScript file"),
    ],
)
def test_what_is_no_extractor(name, trust, message):
    with pytest.raises(ConfigError, match=message):
        load_feature_extractor(name, trust_file=trust)


def test_a_pickle_is_not_run(tmp_path):
    (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ConfigError, match="is not a file of TorchScript"):
        load_feature_extractor(str(tmp_path / "evil.pt"), trust_file=True)
    assert not os.path.exists("ran")


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(0, 1, 4, 4)]
)
def test_what_are_no_images(bad):
    with pytest.raises(ValueError, match="must be \\(N, C, H, W\\), floating"):
        load_feature_extractor("pixels")(bad)


def test_features_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        load_feature_extractor("pixels")(torch.full((1, 1, 2, 2), torch.nan))


def test_cached_features_return_and_damaged_ones_do_not(tmp_path):
    features = torch.rand(6, 3)
    assert cached_features(tmp_path, "key", 6) is None
    cache_features(tmp_path / "new", "key", features)
    (path,) = (tmp_path / "new").iterdir()
    assert torch.equal(cached_features(tmp_path / "new", "key", 6), features)
    assert cached_features(tmp_path / "new", "key", 5) is None
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert cached_features(tmp_path / "new", "key", 6) is None
    path.write_bytes(b"")
    assert cached_features(tmp_path / "new", "key", 6) is None
