"""Calls of pipelines with a first stage: pictures, latents and noise, against the autoencoders themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline
from helpers.tiny import tiny_autoencoder, tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler

KINDS = ("kl", "vq", "tiny", "dc")


def pipeline(kind: str = "kl", unet: Any = None, **arguments: Any) -> DDPMExtPipeline:
    scheduler = DDPMExtScheduler(num_train_timesteps=10, clip_sample=False)
    arguments = {"vae": tiny_autoencoder(kind, scaling_factor=0.6)} | arguments
    result = DDPMExtPipeline(unet or tiny_unet(4), scheduler, **arguments)
    result.set_progress_bar_config(disable=True)
    return result


def drawn(pipe: DDPMExtPipeline, output_type: str, **arguments: Any) -> Any:
    return pipe(2, torch.Generator().manual_seed(3), output_type=output_type, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_the_decoded_latents(kind):
    pipe = pipeline(kind)
    latents = drawn(pipe, "latent").images
    assert latents.shape == (2, 4, 8, 8)
    decoded = pipe.vae.decode(latents / 0.6).sample.clamp(-1, 1) / 2 + 0.5
    pictures = drawn(pipe, "pt").images
    torch.testing.assert_close(pictures, decoded, rtol=1e-5, atol=1e-5)
    assert np.array_equal(drawn(pipe, "np").images, pictures.permute(0, 2, 3, 1).numpy())
    (first, _) = drawn(pipe, "pil").images
    expected = (pictures[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    assert np.array_equal(np.asarray(first), expected)


def test_the_samples_are_those_without_a_first_stage():
    """Decoding draws nothing, so x_T and every noise are the same."""
    plain = DDPMExtPipeline(tiny_unet(4), pipeline().scheduler, latent_scaling_factor=0.6)
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(plain, "latent").images, drawn(pipeline(), "latent").images)
    torch.manual_seed(5)
    pipeline()(output_type="pt")
    state = torch.get_rng_state()
    torch.manual_seed(5)
    plain(output_type="pt")
    assert torch.equal(torch.get_rng_state(), state)


def test_intermediates_stay_latents():
    output = drawn(pipeline(), "pil", log_every_t=4)
    assert {item.shape for item in [*output.intermediates, *output.pred_x0]} == {(2, 4, 8, 8)}
    pipe = pipeline()
    assert pipe.decode_latents(output.pred_x0[-1]).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_of_pictures_are_the_first_stages(channels, mode):
    pipe = pipeline(vae=tiny_autoencoder("kl", channels=channels))
    assert isinstance(drawn(pipe, "pil").images[0], Image.Image)
    assert drawn(pipe, "pil").images[0].mode == mode
    assert drawn(pipe, "np").images.shape == (2, 16, 16, channels)


def test_pictures_of_other_channels_are_no_pil_images():
    pipe = pipeline(vae=tiny_autoencoder("kl", channels=2))
    with pytest.raises(ValueError, match="2 channels; PIL"):
        pipe()
    assert pipe(output_type="np").images.shape == (1, 16, 16, 2)


def test_encoding_and_decoding_are_inverse_in_scale():
    pipe = pipeline()
    pixels = torch.rand(2, 3, 16, 12) * 2 - 1
    latents = pipe.encode_images(pixels, torch.Generator().manual_seed(8))
    posterior = pipe.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(8))
    torch.testing.assert_close(latents, posterior * 0.6)
    torch.testing.assert_close(pipe.decode_latents(latents), pipe.vae.decode(posterior).sample, rtol=1e-5, atol=1e-5)
    each = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipe.encode_images(pixels, each)
    one = pipe.encode_images(pixels[1:], torch.Generator().manual_seed(2))
    torch.testing.assert_close(both[1:], one, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="3"):
        pipe.encode_images(pixels, [torch.Generator()] * 3)


def test_without_a_first_stage_nothing_encodes_or_decodes():
    pixel = DDPMExtPipeline(tiny_unet(3), DDPMExtScheduler())
    latent = DDPMExtPipeline(tiny_unet(4), DDPMExtScheduler(), latent_scaling_factor=0.5)
    assert pixel.first_stage is None
    for name in ("encode_images", "decode_latents"):
        with pytest.raises(ValueError, match="samples are images"):
            getattr(pixel, name)(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match="pass vae="):
            getattr(latent, name)(torch.zeros(1, 4, 8, 8))
    for name in ("enable_vae_slicing", "disable_vae_slicing", "enable_vae_tiling", "disable_vae_tiling"):
        with pytest.raises(ValueError, match="needs a first stage"):
            getattr(pixel, name)()


# ------------------------------------------------------------------ the component


def test_vae_is_whichever_is_given():
    vae = tiny_autoencoder("vq")
    pipe = DDPMExtPipeline(tiny_unet(4), DDPMExtScheduler(), vqvae=vae)
    assert pipe.vae is vae
    assert pipe.first_stage.kind == "vq"
    with pytest.raises(ValueError, match="both given"):
        DDPMExtPipeline(tiny_unet(4), DDPMExtScheduler(), vae=vae, vqvae=vae)
    again = DDPMExtPipeline(**pipe.components)
    assert again.vae is vae


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vae": tiny_unet(4)}, "UNet2DModel; it must be an AutoencoderKL"),
        ({"conditioning_key": tiny_autoencoder("kl")}, "pass a first stage by its name"),
        ({"vae": "stabilityai/sd-vae"}, "str; it must be an AutoencoderKL"),
        ({"vae": tiny_autoencoder("kl", latent_channels=3)}, "latents of 3 channels, but the network denoises 4"),
        ({"vae": tiny_autoencoder("kl", latents_mean=[0.0] * 4)}, "latents_mean without latents_std"),
        ({"latent_scaling_factor": 0.5}, "latent_scaling_factor is 0.5, but the configuration of vae"),
        ({"concat_through_vae": "mode"}, "has no concatenated inputs"),
        ({"concat_through_vae": "both"}, "mode, sample"),
    ],
)
def test_first_stages_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_conditions_through_a_first_stage_need_one():
    with pytest.raises(ValueError, match="the samples of this model are images"):
        DDPMExtPipeline(tiny_unet(8, 4), DDPMExtScheduler(), "concat", concat_through_vae="mode")


def test_a_first_stage_given_later_and_taken_away(tmp_path):
    pipe = DDPMExtPipeline(tiny_unet(4), DDPMExtScheduler(10), latent_scaling_factor=0.6)
    with pytest.raises(ValueError, match="another scale"):
        pipe.vae = tiny_autoencoder("kl")
    assert pipe.vae is None
    pipe.vqvae = tiny_autoencoder("vq", scaling_factor=0.6)
    assert not pipe.is_latent
    assert drawn(pipe, "pt").images.shape == (2, 3, 16, 16)
    pipe.save_pretrained(tmp_path)
    assert "latent_scaling_factor" not in (tmp_path / "model_index.json").read_text()
    assert DDPMExtPipeline.from_pretrained(tmp_path).first_stage.kind == "vq"
    pipe.vae = None
    assert pipe.config.latent_scaling_factor == 0.6
    assert drawn(pipe, "pt").images.shape == (2, 4, 8, 8)


def test_a_changed_scale_is_obeyed():
    pipe = pipeline()
    before = pipe.decode_latents(torch.ones(1, 4, 4, 4))
    pipe.vae.register_to_config(scaling_factor=1.2)
    torch.testing.assert_close(pipe.decode_latents(2 * torch.ones(1, 4, 4, 4)), before, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ precision, memory


def test_half_precision_is_the_networks():
    pipe = pipeline()
    weights = [weight.clone() for weight in pipe.vae.parameters()]
    assert pipe.to(torch.bfloat16) is pipe
    assert (pipe.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert drawn(pipe, "pt").images.dtype == torch.float32
    assert pipe.to("cpu", torch.float32) is pipe
    assert pipe.to(device="cpu", dtype=torch.float64).unet.dtype == torch.float64
    assert all(torch.equal(one, other) for one, other in zip(weights, pipe.vae.parameters(), strict=True))


def test_a_first_stage_in_half_precision_computes_in_float32():
    vae = tiny_autoencoder("kl").half()
    pictures = drawn(pipeline(vae=vae), "pt").images
    assert torch.equal(pictures, drawn(pipeline(vae=tiny_autoencoder("kl").half().float()), "pt").images)


def test_slicing_and_tiling():
    pipe = pipeline()
    x = torch.randn(2, 4, 32, 32)
    whole = pipe.decode_latents(x)
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    torch.testing.assert_close(pipe.decode_latents(x), whole, rtol=1e-5, atol=1e-5)
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling()
    assert not torch.equal(pipe.decode_latents(x), whole)
    pipe.disable_vae_tiling()
    assert torch.equal(pipe.decode_latents(x), whole)
    with pytest.raises(NotImplementedError, match="VQModel"):
        pipeline("vq").enable_vae_tiling()


def test_offloaded_models_draw_the_same():
    pipe = pipeline()
    expected = drawn(pipe, "pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(drawn(pipe, "pt").images, expected)
    pixels = torch.zeros(1, 3, 16, 16)
    assert pipe.encode_images(pixels, torch.Generator().manual_seed(1)).shape == (1, 4, 8, 8)
    assert [hook.model for hook in pipe._all_hooks] == [pipe.unet, pipe.vae]


def test_sequential_offloading_keeps_a_first_stage_in_float32():
    """The weights that its modules fetch; Accelerate's hooks themselves need an accelerator."""
    pipe = pipeline(vae=tiny_autoencoder("kl").half())
    pipe.enable_sequential_cpu_offload(device="cpu")
    module = pipe.vae.encoder.conv_in
    assert module.weight.device.type == "meta"
    assert module._hf_hook.weights_map["weight"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile's own imports
def test_a_compiled_first_stage(tmp_path):
    vae = tiny_autoencoder("vq", scaling_factor=0.6)
    expected = drawn(pipeline(vae=vae), "pt").images
    pipe = pipeline(vae=torch.compile(vae, backend="eager"))
    assert torch.equal(drawn(pipe, "pt").images, expected)
    assert pipe.to(torch.float32) is pipe
    pipe.save_pretrained(tmp_path)
    assert DDPMExtPipeline.from_pretrained(tmp_path).first_stage.content_hash() == pipe.first_stage.content_hash()


def test_damaged_weights_are_not_pictures():
    pipe = pipeline()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match="the decoded images"):
        pipe()


# ------------------------------------------------------------------ other schedulers


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_ddim_draws_what_ldm_pipeline_draws(kind):
    vae = tiny_autoencoder(kind, scaling_factor=0.6)
    ours = pipeline(vae=vae)
    ours.scheduler = scheduler = DDIMScheduler.from_config(ours.scheduler.config)
    stock = LDMPipeline(vae, tiny_unet(4), scheduler)
    stock.set_progress_bar_config(disable=True)
    expected = stock(2, torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np").images
    assert np.abs(drawn(ours, "np", num_inference_steps=5).images - expected).max() <= 1e-5
