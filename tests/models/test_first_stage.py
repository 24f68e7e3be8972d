"""First stages against Diffusers' own classes, and against the lines of its pipelines."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from helpers.tiny import tiny_autoencoder

from diffusers_ddpm_ext.models.first_stage import FirstStage, load_first_stage

KINDS = ("kl", "vq", "tiny", "dc")
MEAN, STD = [0.25, -1.5, 0.0, 0.75], [0.5, 2.0, 1.25, 0.125]


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


# ------------------------------------------------------------------ encoding and decoding, as Diffusers' classes do


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_divides_by_the_scaling_factor_and_runs_the_decoder(kind):
    model = tiny_autoencoder(kind, scaling_factor=0.3)
    x = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(FirstStage(model).decode(x), model.decode(x / 0.3).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vq", "tiny", "dc"])
def test_encoding_without_posterior(kind, pixels):
    model = tiny_autoencoder(kind, scaling_factor=0.3)
    (z,) = model.encode(pixels, return_dict=False)
    stage = FirstStage(model)
    mean, std = stage.posterior(pixels)
    close(mean, z)
    assert std is None
    assert not stage.is_stochastic
    close(stage.encode(pixels, torch.Generator()), z * 0.3)
    close(stage.encode_condition(pixels), z)


def test_encoding_draws_from_the_posterior(pixels):
    model = tiny_autoencoder("kl", scaling_factor=0.3)
    stage, posterior = FirstStage(model), model.encode(pixels).latent_dist
    assert stage.is_stochastic
    expected = posterior.sample(torch.Generator().manual_seed(5)) * 0.3
    close(stage.encode(pixels, torch.Generator().manual_seed(5)), expected)
    close(stage.encode(pixels, mode=True), posterior.mode() * 0.3)
    torch.manual_seed(6)
    globally = posterior.sample() * 0.3
    torch.manual_seed(6)
    close(stage.encode(pixels), globally)
    close(stage.encode_condition(pixels), posterior.mode())
    close(stage.posterior(pixels)[1], posterior.std)


def test_a_vq_model_quantizes_after_the_scale_is_undone():
    """Quantizing the scaled latents instead gives other codes."""
    model = tiny_autoencoder("vq", scaling_factor=0.6)
    codes = torch.randint(0, 32, (2, 4, 4), generator=torch.Generator().manual_seed(3))
    z = model.quantize.get_codebook_entry(codes, (2, 4, 4, 4))
    stage = FirstStage(model)
    torch.testing.assert_close(
        stage.decode(stage.normalize(z)), model.decode(z, force_not_quantize=True).sample, rtol=1e-5, atol=1e-5
    )


# ------------------------------------------------------------------ the scale


def test_scale_of_stable_diffusion_3_and_flux():
    model = tiny_autoencoder("kl", scaling_factor=1.5305, shift_factor=0.0609)
    latents, z = torch.randn(2, 2, 4, 4, 4)
    vae = model
    stage = FirstStage(model)
    close(stage.denormalize(latents), (latents / vae.config.scaling_factor) + vae.config.shift_factor)
    close(stage.normalize(z), (z - vae.config.shift_factor) * vae.config.scaling_factor)


def test_scale_of_sdxl():
    """The lines of its pipelines, with a mean and a standard deviation per channel."""
    model = tiny_autoencoder("kl", scaling_factor=0.13025, latents_mean=MEAN, latents_std=STD)
    latents, z = torch.randn(2, 2, 4, 4, 4)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    stage = FirstStage(model)
    close(stage.denormalize(latents), latents * std / 0.13025 + mean)
    close(stage.normalize(z), (z - mean) * 0.13025 / std)
    assert torch.equal(stage.shift, mean)
    close(stage.scale, std / 0.13025)


@pytest.mark.parametrize("kind", KINDS)
def test_a_measured_scale_makes_unit_latents_and_survives_saving(kind, pixels, tmp_path):
    z = FirstStage(tiny_autoencoder(kind)).posterior(pixels)[0]
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    model = tiny_autoencoder(kind, scaling_factor=7.0)
    stage = FirstStage(model).with_scale(None, mean, std)
    x = stage.encode(pixels, mode=True)
    close(x.mean((0, 2, 3)), torch.zeros(4))
    close(x.std((0, 2, 3)), torch.ones(4))
    assert model.config.scaling_factor == 7.0  # the other one's scale is as it was
    assert next(model.parameters()) is next(stage.autoencoder.parameters())
    stage.autoencoder.save_pretrained(tmp_path)
    loaded = FirstStage(type(model).from_pretrained(tmp_path))
    torch.testing.assert_close(loaded.encode(pixels, mode=True), x, rtol=1e-5, atol=1e-5)
    close(loaded.denormalize(x), z)


def test_a_scale_replaces_mean_and_shift():
    z = torch.randn(1, 4, 2, 2)
    for config in ({"shift_factor": 0.5}, {"latents_mean": MEAN, "latents_std": STD}):
        stage = FirstStage(tiny_autoencoder("kl", **config)).with_scale(0.5)
        close(stage.normalize(z), z / 2)


def test_the_default_scale_of_a_class_is_written(tmp_path):
    """`VQModel` has 0.18215 too where a file says nothing, so a file must say it."""
    stage = FirstStage(tiny_autoencoder("vq", scaling_factor=1)).with_scale(None)
    assert stage.autoencoder.config["scaling_factor"] == 1
    assert '"scaling_factor": 1' in stage.autoencoder.to_json_string()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scaling_factor": 0.0}, "scaling_factor .* must be a positive number"),
        ({"scaling_factor": -0.2}, "scaling_factor"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"scaling_factor": float("inf")}, "scaling_factor"),
        ({"scaling_factor": "1"}, "scaling_factor"),
        ({"scaling_factor": None}, "scaling_factor"),
        ({"shift_factor": "a"}, "shift_factor"),
        ({"latents_mean": MEAN}, "latents_mean without latents_std"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, "shift_factor .* beside latents_mean"),
        ({"latents_mean": MEAN[:3], "latents_std": STD}, "list of 4 numbers"),
        ({"latents_mean": 0.5, "latents_std": STD}, "list of 4 numbers"),
        ({"latents_mean": MEAN, "latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std .* positive"),
        ({"latents_mean": [*MEAN[:3], float("nan")], "latents_std": STD}, "latents_mean"),
    ],
)
def test_refused_scales(config, message):
    with pytest.raises(ValueError, match=message):
        FirstStage(tiny_autoencoder("kl", **config))


def test_other_classes_are_refused():
    with pytest.raises(ValueError, match="UNet2DModel; it must be an AutoencoderKL, VQModel"):
        FirstStage(
            UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
        )
    with pytest.raises(ValueError, match="dict; it must be"):
        FirstStage({})  # type: ignore[arg-type]


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(("kind", "levels"), [(kind, levels) for kind in KINDS for levels in (1, 2, 3)])
def test_the_factor_is_measured(kind, levels):
    width = (8,) * levels
    if kind in ("kl", "vq"):
        config = {
            "block_out_channels": width,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
    elif kind == "tiny":
        config = {f"{part}_block_out_channels": width for part in ("encoder", "decoder")}
        config |= {f"num_{part}_blocks": (1,) * levels for part in ("encoder", "decoder")}
    else:
        config = {f"{part}_block_out_channels": width for part in ("encoder", "decoder")}
        config |= {f"{part}_layers_per_block": (1,) * levels for part in ("encoder", "decoder")}
        config |= {f"{part}_qkv_multiscales": ((),) * levels for part in ("encoder", "decoder")}
    stage = FirstStage(tiny_autoencoder(kind, **config))
    assert stage.factor == 2 ** (levels - 1)
    assert stage.encode(torch.zeros(1, 3, 16, 24)).shape[2:] == stage.latent_size(16, 24)


def test_a_decoder_that_does_not_undo_the_factor_is_refused():
    stage = FirstStage(tiny_autoencoder("tiny", upsampling_scaling_factor=3))
    with pytest.raises(ValueError, match=r"1024x1024 pixels as 512x512 latents and decodes these as 1536x1536"):
        stage.latent_size(8, 8)


def test_levels_without_layers_of_deep_compression():
    """The published DC-AE of factor 64 and 128 have such first levels."""
    layers = {f"{part}_layers_per_block": (0, 1) for part in ("encoder", "decoder")}
    assert FirstStage(tiny_autoencoder("dc", **layers)).factor == 2


def test_sizes_that_do_not_divide_are_refused():
    stage = FirstStage(tiny_autoencoder("kl"))
    assert stage.latent_size(10, 6) == (5, 3)
    with pytest.raises(ValueError, match=r"9x6 .* multiples of 2, e.g. 6, 8, 10"):
        stage.encode(torch.zeros(1, 3, 9, 6))


def test_wrong_inputs_are_refused():
    stage = FirstStage(tiny_autoencoder("kl"))
    for wrong in (torch.zeros(1, 4, 8, 8), torch.zeros(3, 8, 8), [0.0], torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="pixels"):
            stage.encode(wrong)
    with pytest.raises(ValueError, match="latents"):
        stage.decode(torch.zeros(1, 3, 8, 8))


def test_embeddings_of_another_width_are_the_latents():
    stage = FirstStage(tiny_autoencoder("vq", latent_channels=6, vq_embed_dim=3))
    assert stage.latent_channels == 3
    assert stage.encode(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 4, 4)
    assert stage.decode(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 8, 8)


# ------------------------------------------------------------------ precision, gradients, wrappers


@pytest.mark.parametrize("kind", KINDS)
def test_float32_outside_autocast_and_from_half_precision(kind, pixels):
    model = tiny_autoencoder(kind).half()
    stage, exact = FirstStage(copy.deepcopy(model)), FirstStage(model.float())
    with torch.autocast("cpu", torch.bfloat16):
        x = stage.encode(pixels.bfloat16(), mode=True)
        image = stage.decode(x.bfloat16())
    assert x.dtype == image.dtype == torch.float32
    assert torch.equal(x, exact.encode(pixels.bfloat16().float(), mode=True))
    assert torch.equal(image, exact.decode(x.bfloat16().float()))


def test_gradients_flow_through_decoding_only(pixels):
    stage = FirstStage(tiny_autoencoder("kl"))
    x = stage.encode(pixels.requires_grad_()).requires_grad_()
    assert x.grad_fn is None
    stage.decode(x).sum().backward()
    assert bool(x.grad.abs().sum() > 0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile's own imports
def test_compiled_autoencoders_are_unwrapped():
    model = tiny_autoencoder("kl")
    stage = FirstStage(torch.compile(model))
    assert stage.autoencoder is model
    assert stage.kind == "kl"


@pytest.mark.parametrize("kind", ["kl", "tiny", "dc"])
def test_slicing_is_the_autoencoders(kind, pixels):
    stage = FirstStage(tiny_autoencoder(kind))
    x = stage.encode(pixels, mode=True)
    images = stage.decode(x)
    stage.autoencoder.enable_slicing()
    stage.autoencoder.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    sizes: list[int] = []
    torch.testing.assert_close(stage.encode(pixels, mode=True), x)
    torch.testing.assert_close(stage.decode(x), images)
    assert sizes == [1, 1]


def test_tiling_is_the_autoencoders():
    stage = FirstStage(tiny_autoencoder("kl"))
    wide = torch.rand(1, 3, 64, 64)
    whole = stage.encode(wide, mode=True)
    stage.autoencoder.enable_tiling()
    assert not torch.equal(stage.encode(wide, mode=True), whole)
    close(stage.posterior(wide)[0], stage.autoencoder.encode(wide).latent_dist.mean)
    assert stage.factor == 2


def test_tiling_of_a_tiny_autoencoder_is_that_of_diffusers_or_refused(pixels):
    """Its factor is fixed at 8 there: others fail in mid-image, or give pictures of another size."""
    levels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    stage = FirstStage(tiny_autoencoder("tiny", **levels, **blocks))
    x = torch.randn(1, 4, 72, 8)
    whole = stage.decode(x)
    stage.autoencoder.enable_tiling()
    assert torch.equal(stage.decode(x), stage.autoencoder.decode(x).sample)
    assert not torch.equal(stage.decode(x), whole)
    torch.testing.assert_close(stage.decode(x)[..., :440, :], whole[..., :440, :], rtol=0, atol=1e-4)
    for channels in (1, 3):
        small = FirstStage(tiny_autoencoder("tiny", channels=channels))
        latents = small.encode(pixels[:, :channels])
        small.autoencoder.enable_tiling()
        for call, images in ((small.encode, pixels[:, :channels]), (small.decode, latents)):
            with pytest.raises(ValueError, match=f"this one has {channels}, 4 and 2x2: call disable_tiling"):
                call(images)


def test_training_mode_is_restored(pixels):
    model = tiny_autoencoder("dc").train()
    FirstStage(model).encode(pixels)
    assert model.training


# ------------------------------------------------------------------ identity


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile's own imports
def test_the_hash_is_of_what_is_computed(tmp_path):
    model = tiny_autoencoder("kl")
    known = FirstStage(model).content_hash()
    assert FirstStage(model).with_scale(0.7, MEAN, STD).content_hash() == known
    assert FirstStage(torch.compile(model)).content_hash() == known
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert FirstStage(loaded).content_hash() == known
    with torch.no_grad():
        loaded.decoder.conv_out.bias[0] += 1e-6
    assert FirstStage(loaded).content_hash() != known
    assert FirstStage(tiny_autoencoder("kl", norm_num_groups=2)).content_hash() != known


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_loaded_frozen_and_in_float32(kind, tmp_path, pixels):
    model = tiny_autoencoder(kind, scaling_factor=0.4)
    model.half().save_pretrained(tmp_path / "fp16")
    loaded = load_first_stage(tmp_path / "fp16")
    assert type(loaded) is type(model)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert FirstStage(loaded).content_hash() == FirstStage(model).content_hash()


@pytest.mark.parametrize("slot", ["vae", "vqvae"])
def test_the_autoencoder_of_a_pipelines_folder(slot, tmp_path):
    model = tiny_autoencoder("kl")
    model.save_pretrained(tmp_path / slot)
    index = {"_class_name": "LDMPipeline", "vae": [None, None]} | {slot: ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    known = FirstStage(model).content_hash()
    assert FirstStage(load_first_stage(tmp_path)).content_hash() == known
    assert FirstStage(load_first_stage(tmp_path, slot)).content_hash() == known


def wrong_folders(folder: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    """Damage -> what the message says."""
    config = folder / "config.json"
    weights = folder / "diffusion_pytorch_model.safetensors"

    def change(**values) -> None:
        config.write_text(json.dumps(json.loads(config.read_text()) | values))

    return {
        "no config": (config.unlink, "neither config.json nor model_index.json"),
        "no weights": (weights.unlink, "diffusion_pytorch_model"),
        "half of the weights": (lambda: weights.write_bytes(weights.read_bytes()[: 2 * 10**4]), "."),
        "no JSON": (lambda: config.write_text("{"), "config.json"),
        "another class": (lambda: change(_class_name="UNet2DModel"), "UNet2DModel; a first stage is an AutoencoderKL"),
        "no scale": (lambda: change(scaling_factor=0), "scaling_factor"),
        "another scale": (lambda: change(latents_mean=[0.0] * 4), "latents_mean without latents_std"),
        "too wide": (lambda: change(block_out_channels=[8, 10**6]), "block_out_channels"),
        "other widths": (lambda: change(block_out_channels=[8, 16]), "."),
        "a layer more": (lambda: change(layers_per_block=2), "lack|missing"),
        "a block less": (
            lambda: change(up_block_types=["UpDecoderBlock2D"]),
            "tensors, but the network of config.json",
        ),
        "unknown blocks": (lambda: change(down_block_types=["A", "B"]), "."),
        "no file": (lambda: (weights.unlink(), weights.mkdir()), "."),
    }


@pytest.mark.parametrize("damage", list(wrong_folders(Path("."))))
def test_damaged_folders_are_refused_in_one_line(damage, tmp_path):
    tiny_autoencoder("kl").save_pretrained(tmp_path)
    action, message = wrong_folders(tmp_path)[damage]
    action()
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_first_stage(tmp_path)
    assert "\n" not in str(error.value)


def test_other_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "vae": [null, null]}')
    with pytest.raises(ValueError, match="a pipeline without a first stage"):
        load_first_stage(tmp_path)
    with pytest.raises(ValueError, match="no folder vae"):
        load_first_stage(tmp_path, "vae")
    with pytest.raises(ValueError, match="inside"):
        load_first_stage(tmp_path, "../x")
    with pytest.raises(ValueError, match="is not a folder on this machine and cannot be loaded from the Hub"):
        load_first_stage("nobody/nothing")
