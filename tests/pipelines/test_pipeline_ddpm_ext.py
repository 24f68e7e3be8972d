"""DDPMExtPipeline: the images stock DDPMPipeline draws, CompVis' intermediates, and clear refusals."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, ImagePipelineOutput, PNDMScheduler
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtPipelineOutput, DDPMExtScheduler


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(unet=None, scheduler=None, **config) -> DDPMExtPipeline:
    return quiet(DDPMExtPipeline(unet or tiny_unet(), scheduler or DDPMExtScheduler(**config)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- the same images as stock


@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variance_type": "fixed_large"},
        {
            "prediction_type": "v_prediction",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.0015,
            "beta_end": 0.0195,
        },
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
        {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "sample"},
        {"thresholding": True, "prediction_type": "sample"},
        {"trained_betas": np.linspace(1e-3, 0.03, 200).tolist(), "num_train_timesteps": 200},
    ],
    ids=lambda config: "-".join(config) or "plain",
)
def test_same_images_as_stock(config, count):
    unet, generator, stock_generator = tiny_unet(), seeded(), seeded()
    stock = quiet(DDPMPipeline(unet, DDPMScheduler(**config)))
    theirs = stock(batch_size=2, generator=stock_generator, num_inference_steps=count, output_type="np").images
    mine = ours(unet, **config)(batch_size=2, generator=generator, num_inference_steps=count, output_type="np").images
    exempt = config.get("variance_type") == "fixed_large" and count == 1
    assert exempt or np.abs(mine - theirs).max() <= 1e-4
    if config.get("timestep_spacing") != "trailing":  # then the last kept step is 0, which draws nothing in either
        assert torch.equal(generator.get_state(), stock_generator.get_state()), "another number of draws"


def test_same_images_as_stock_over_all_steps():
    unet = tiny_unet(1)
    theirs = quiet(DDPMPipeline(unet, DDPMScheduler()))(generator=seeded(), output_type="np").images
    mine = ours(unet)(generator=seeded(), output_type="np").images
    assert np.abs(mine - theirs).max() <= 1e-3


def test_no_count_means_all_steps():
    seen: list[int] = []
    pipeline = ours(tiny_unet(1), num_train_timesteps=12)
    pipeline(callback_on_step_end=lambda pipe, i, t, tensors: seen.append(int(t)))
    assert seen == list(range(11, -1, -1))
    assert pipeline.num_timesteps == 12


# ---------------------------------------------------------------------- generators


def test_image_follows_its_own_generator():
    """Image i is the same whatever the batch: alone, or in any place."""
    pipeline = ours()
    together = pipeline(3, [seeded(i) for i in (5, 6, 7)], 6, "pt").images
    for place, seed in enumerate((5, 6, 7)):
        alone = pipeline(1, [seeded(seed)], 6, "pt").images
        single = pipeline(1, seeded(seed), 6, "pt").images
        assert (together[place] - alone[0]).abs().max() <= 1e-5
        assert torch.equal(alone, single)


def test_image_follows_its_own_generator_with_temperature():
    pipeline = ours()
    together = pipeline(2, [seeded(5), seeded(6)], 6, "pt", temperature=0.5).images
    alone = pipeline(1, seeded(6), 6, "pt", temperature=0.5).images
    assert (together[1] - alone[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_generators(count):
    with pytest.raises(ValueError, match=f"generator is a list of {count}, but batch_size is 2"):
        ours()(2, [seeded() for _ in range(count)], 3)


# ---------------------------------------------------------------------- intermediates


@pytest.mark.parametrize(("count", "every"), [(10, 3), (10, 1), (10, 100), (7, 2), (1, 5)])
def test_intermediates_follow_compvis(count, every):
    """Replayed by hand: x_T, then the sample after each kept step i with i % every == 0 or i == K - 1."""
    pipeline = ours()
    samples, x0s = [], []

    def note(pipe, i, t, tensors):
        samples.append(tensors["latents"])

    out = pipeline(2, seeded(), count, "latent", log_every_t=every, callback_on_step_end=note)
    kept = [i for i in range(count - 1, -1, -1) if i % every == 0 or i == count - 1]
    expected = [samples[count - 1 - i] for i in kept]
    assert len(out.intermediates) == 1 + len(kept)
    assert torch.equal(out.intermediates[0], torch.randn((2, 3, 8, 8), generator=seeded()))
    for have, want in zip(out.intermediates[1:], expected, strict=True):
        assert torch.equal(have, want)
    assert torch.equal(out.intermediates[-1], out.images)

    # the predictions, from the samples alone: the network's eps at each kept step, inverted and clipped
    steps = [int(t) for t in pipeline.scheduler.timesteps]
    before = [out.intermediates[0], *samples]
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for i in kept:
        place = count - 1 - i
        with torch.no_grad():
            eps = pipeline.unet(before[place], steps[place]).sample
        a = abar[steps[place]]
        x0s.append(((before[place] - (1 - a) ** 0.5 * eps) / a**0.5).clamp(-1, 1))
    assert len(out.pred_x0) == len(kept)
    for have, want in zip(out.pred_x0, x0s, strict=True):
        assert (have - want).abs().max() <= 1e-4


def test_intermediates_are_absent_unless_asked_for():
    out = ours()(1, seeded(), 3, "pt")
    assert isinstance(out, DDPMExtPipelineOutput)
    assert isinstance(out, ImagePipelineOutput)
    assert out.intermediates is None
    assert out.pred_x0 is None
    assert len(out.to_tuple()) == 1


def test_tuple_carries_what_the_output_carries():
    pipeline = ours()
    assert len(pipeline(1, seeded(), 3, "pt", return_dict=False)) == 1
    images, intermediates, pred_x0 = pipeline(1, seeded(), 4, "pt", return_dict=False, log_every_t=2)
    assert images.shape == (1, 3, 8, 8)
    assert (len(intermediates), len(pred_x0)) == (4, 3)  # i = 3, 2, 0


# ---------------------------------------------------------------------- temperature


def test_temperature_scales_the_noise_of_a_step():
    """One step further the sample is mean + temperature * sigma * noise: three temperatures lie on a line."""
    pipeline = ours(clip_sample=False)
    first = {
        t: pipeline(1, seeded(), 4, "latent", temperature=t, log_every_t=1).intermediates[1] for t in (0.0, 0.5, 1.0)
    }
    assert (first[0.5] - (first[0.0] + first[1.0]) / 2).abs().max() <= 1e-5
    noise = torch.randn((2, 3, 8, 8), generator=seeded())[1:]  # the second draw of the stream
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    now, previous = abar[750], abar[500]
    sigma = ((1 - previous) / (1 - now) * (1 - now / previous)) ** 0.5
    stream = seeded()
    torch.randn((1, 3, 8, 8), generator=stream)
    noise = torch.randn((1, 3, 8, 8), generator=stream)
    assert ((first[1.0] - first[0.0]) - sigma * noise).abs().max() <= 1e-5


def test_temperature_leaves_the_stream_alone():
    pipeline = ours()
    for temperature in (0.0, 0.7):
        a, b = seeded(), seeded()
        pipeline(1, a, 3, "pt")
        pipeline(1, b, 3, "pt", temperature=temperature)
        assert torch.equal(torch.randn(4, generator=a), torch.randn(4, generator=b))


def test_temperature_needs_our_scheduler():
    with pytest.raises(
        ValueError, match=r"temperature is 0\.5, but DDIMScheduler takes no noise as an argument, or adds"
    ):
        ours(scheduler=DDIMScheduler())(temperature=0.5, num_inference_steps=2)


def test_temperature_of_a_scheduler_that_takes_noise():
    """At 0 the noisy DDIM is DDIM without noise: its mean moves as if eta were there, so only the last steps agree."""
    pipeline = ours(scheduler=DDIMScheduler())
    cold, other = (pipeline(1, seeded(7), 4, "pt", temperature=0.0, eta=1.0).images for _ in range(2))
    assert torch.equal(cold, other)
    assert not torch.equal(cold, pipeline(1, seeded(7), 4, "pt", eta=1.0).images)


# ---------------------------------------------------------------------- callbacks, latents, timesteps, progress


def test_callback_replaces_the_sample():
    def zero_at_the_end(pipe, i, t, tensors):
        assert set(tensors) == {"latents", "model_output"}
        return {"latents": torch.zeros_like(tensors["latents"])} if i == pipe.num_timesteps - 1 else tensors

    out = ours()(
        2,
        seeded(),
        3,
        "latent",
        callback_on_step_end=zero_at_the_end,
        callback_on_step_end_tensor_inputs=["latents", "model_output"],
    )
    assert out.images.abs().sum() == 0


def test_callback_may_stop_the_loop():
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append(i)
        pipe._interrupt = i == 1

    pipeline = ours()
    pipeline(1, seeded(), 10, "pt", callback_on_step_end=stop)
    assert seen == [0, 1]
    assert pipeline.interrupt


def test_unknown_callback_tensor():
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs has prompt_embeds; it may have latents"):
        ours()(callback_on_step_end=print, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_latents_are_the_starting_noise():
    start = torch.randn((2, 3, 8, 8), generator=seeded(3))
    drawn = ours()(2, seeded(3), 4, "pt").images
    stream = seeded(3)
    torch.randn((2, 3, 8, 8), generator=stream)
    assert torch.equal(ours()(2, stream, 4, "pt", latents=start).images, drawn)
    with pytest.raises(ValueError, match=r"latents has shape \(2, 3, 8, 8\); .*\(1, 3, 8, 8\)"):
        ours()(1, latents=start)


def test_custom_timesteps():
    by_count = ours()(1, seeded(), 4, "pt").images
    assert torch.equal(ours()(1, seeded(), None, "pt", timesteps=[750, 500, 250, 0]).images, by_count)
    with pytest.raises(ValueError, match="give one of them"):
        ours()(1, num_inference_steps=4, timesteps=[750, 500, 250, 0])
    with pytest.raises(ValueError, match="PNDMScheduler takes none: use one of DDIMScheduler"):
        ours(scheduler=PNDMScheduler())(1, timesteps=[750, 500])


def test_progress_bar(capsys):
    pipeline = DDPMExtPipeline(tiny_unet(), DDPMExtScheduler())
    pipeline(1, seeded(), 4, "pt")
    assert "4/4" in capsys.readouterr().err
    quiet(pipeline)(1, seeded(), 4, "pt")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------- shapes and outputs


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_modes(channels, mode):
    pipeline = ours(tiny_unet(channels, size=(16, 8)))
    images = pipeline(2, seeded(), 2).images
    assert [image.mode for image in images] == [mode, mode]
    assert images[0].size == (8, 16)  # PIL says (width, height)
    array = pipeline(2, seeded(), 2, "np").images
    assert array.shape == (2, 16, 8, channels)
    pixels = np.asarray(images[1]).reshape(16, 8, channels)
    assert np.array_equal(pixels, (array[1] * 255).round().astype(np.uint8))
    tensor = pipeline(2, seeded(), 2, "pt").images
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_other_channels_come_as_arrays():
    pipeline = ours(tiny_unet(2))
    assert pipeline(1, seeded(), 2, "np").images.shape == (1, 8, 8, 2)
    with pytest.raises(ValueError, match=r'2 channels; PIL images have 1 \(L\).*output_type="np"'):
        pipeline(1, seeded(), 2)


def test_sample_size_is_needed():
    with pytest.raises(ValueError, match="sample_size None"):
        ours(tiny_unet(size=None))(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -3}, "batch_size is -3"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'; it must be one of pil, np, pt, latent"),
        ({"output_type": None}, "output_type is None"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 1001}, "1001"),
        ({"log_every_t": 0}, "log_every_t is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_bad_arguments_stop_before_sampling(arguments, message):
    pipeline = ours()
    pipeline.unet.forward = None  # whoever calls it would know
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_out.bias.fill_(value)
    with pytest.raises(ValueError, match="Non-finite values"):
        ours(unet)(1, seeded(), 2)


def test_samples_that_stop_being_finite():
    def spoil(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * float("nan")}

    with pytest.raises(ValueError, match="latents that callback_on_step_end returned"):
        ours()(1, seeded(), 2, callback_on_step_end=spoil)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances_sample(variance_type):
    pipeline = ours(tiny_unet(3, 6), variance_type=variance_type)
    images = pipeline(2, seeded(), 5, "pt").images
    assert images.shape == (2, 3, 8, 8)
    assert torch.isfinite(images).all()


def test_learned_range_is_stock():
    unet = tiny_unet(3, 6)
    theirs = quiet(DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")))(2, seeded(), 5, "np").images
    assert np.abs(ours(unet, variance_type="learned_range")(2, seeded(), 5, "np").images - theirs).max() <= 1e-4


def test_learned_variances_with_a_scheduler_that_ignores_them():
    """A swap to DDIM keeps variance_type as a hidden key: the mean's half of the channels remains."""
    unet, half = tiny_unet(3, 6), tiny_unet(3)
    weights = {name: w[:3] if name.startswith("conv_out") else w for name, w in unet.state_dict().items()}
    half.load_state_dict(weights)
    swapped = DDIMScheduler.from_config(DDPMExtScheduler(variance_type="learned_range").config)
    images = ours(unet, swapped)(1, seeded(), 3, "pt").images
    assert (images - ours(half, DDIMScheduler())(1, seeded(), 3, "pt").images).abs().max() <= 1e-6


@pytest.mark.parametrize("made", [6, 2])
def test_channels_that_do_not_fit(made):
    with pytest.raises(ValueError, match=f"returns {made} channels for samples of 3"):
        ours(tiny_unet(3, made))(1, seeded(), 2)


def test_bfloat16_runs_the_network_only():
    full = ours()(2, seeded(), 10, "pt").images
    half = ours(tiny_unet().to(torch.bfloat16))(2, seeded(), 10, "pt", log_every_t=5)
    assert half.images.dtype == torch.float32
    assert {sample.dtype for sample in half.intermediates} == {torch.float32}
    assert 0 < (half.images - full).abs().mean() < 0.05  # the same noise, hence the same images but for rounding


def test_ddim_is_stock():
    unet = tiny_unet()
    theirs = quiet(DDPMPipeline(unet, DDIMScheduler()))(2, seeded(), 8, "np").images
    assert np.abs(ours(unet, DDIMScheduler())(2, seeded(), 8, "np").images - theirs).max() <= 1e-6


# ---------------------------------------------------------------------- the scheduler becomes ours


def test_stock_scheduler_becomes_ours():
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample_range": 0.7}
    stock = DDPMScheduler(num_train_timesteps=100, **config)
    for pipeline in (ours(scheduler=stock), DDPMExtPipeline.from_pipe(DDPMPipeline(tiny_unet(), stock))):
        assert type(pipeline.scheduler) is DDPMExtScheduler
        kept = {key: value for key, value in stock.config.items() if not key.startswith("_")}
        assert {key: pipeline.scheduler.config[key] for key in kept} == kept
    pipeline.scheduler = DDPMScheduler(num_train_timesteps=50)
    assert type(pipeline.scheduler) is DDPMExtScheduler
    assert pipeline.scheduler.config.num_train_timesteps == 50


def test_subclass_of_stock_stays():
    class Custom(DDPMScheduler):
        pass

    assert type(ours(scheduler=Custom()).scheduler) is Custom


# ---------------------------------------------------------------------- logvar


def test_logvar_is_checked_and_kept():
    pipeline = ours(num_train_timesteps=20)
    assert pipeline.logvar is None
    table = torch.linspace(-3, 1, 20, dtype=torch.float64, requires_grad=True)
    pipeline.logvar = table
    assert pipeline.logvar.dtype == torch.float32
    assert not pipeline.logvar.requires_grad
    assert torch.equal(pipeline.logvar, table.detach().float())
    assert torch.equal(DDPMExtPipeline.from_pipe(pipeline).logvar, pipeline.logvar)
    for bad in (torch.zeros(19), torch.zeros(20, 1), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"scheduler has 20 steps, so it must be \(20,\)"):
            pipeline.logvar = bad
    with pytest.raises(ValueError, match=r"Non-finite values .* in logvar"):
        pipeline.logvar = torch.full((20,), float("nan"))
    pipeline.logvar = None
    assert pipeline.logvar is None


def test_logvar_of_another_schedule_is_not_saved(tmp_path):
    pipeline = ours(num_train_timesteps=20)
    pipeline.logvar = torch.zeros(20)
    pipeline.scheduler = DDPMExtScheduler(num_train_timesteps=30)
    with pytest.raises(ValueError, match="scheduler has 30 steps"):
        pipeline.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_from_pipe_shares_the_components():
    stock = DDPMPipeline(tiny_unet(), DDPMScheduler())
    assert DDPMExtPipeline.from_pipe(stock).unet is stock.unet


def test_save_warns_of_what_stock_cannot_sample(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="diffusers_ddpm_ext"):
        ours(tiny_unet(3, 6), variance_type="learned").save_pretrained(tmp_path)
    assert "Stock Diffusers cannot sample this model right (variance_type learned)" in caplog.text
