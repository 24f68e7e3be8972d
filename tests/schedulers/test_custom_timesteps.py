"""Timesteps of one's own for every class: against the class's own spacing, and against DDIM by hand."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.schedulers.custom_timesteps import scheduler_names_with_timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of NumPy 2 about Diffusers
UNEVEN = [731, 502, 188, 40]


def pipeline(scheduler=None, **config) -> DDPMExtPipeline:
    pipe = DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(clip_sample=False, **config))
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def draw(pipe, **arguments) -> torch.Tensor:
    return pipe(2, torch.Generator().manual_seed(0), output_type="latent", **arguments).images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name",
    [
        *("DDIMScheduler", "DDPMExtScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"),
        *("EulerDiscreteScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler"),
    ],
)
def test_even_steps_by_name_are_those_of_the_class(name, prediction_type):
    pipe = pipeline(
        None if name == "DDPMExtScheduler" else name, prediction_type=prediction_type, timestep_spacing="trailing"
    )
    by_count = draw(pipe, num_inference_steps=8)
    steps = pipe.scheduler.timesteps
    seen = []
    by_steps = draw(pipe, timesteps=steps, callback_on_step_end=lambda _, i, t, tensors: seen.append(int(t)) or {})
    assert torch.allclose(by_steps, by_count, atol=2e-5)
    assert seen == steps.tolist() == pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("config", [{}, {"set_alpha_to_one": False}, {"rescale_betas_zero_snr": True}])
def test_uneven_steps_of_ddim_by_hand(config):
    """DDIM's formula without noise, between any two steps ([DDIM] eq. 12)."""
    zero = {name: value for name, value in config.items() if name == "rescale_betas_zero_snr"}
    pipe = pipeline(prediction_type="v_prediction", **zero)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    steps = [999, *UNEVEN]
    got = draw(pipe, timesteps=steps)
    abar = pipe.scheduler.alphas_cumprod.double()
    x = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t, below in zip(steps, [*steps[1:], None], strict=True):
            then = abar[below] if below is not None else abar[0] if config.get("set_alpha_to_one") is False else 1.0
            v = pipe.unet(x.float(), torch.tensor(t)).sample
            x0 = abar[t] ** 0.5 * x - (1 - abar[t]) ** 0.5 * v
            eps = (1 - abar[t]) ** 0.5 * x + abar[t] ** 0.5 * v
            x = then**0.5 * x0 + (1 - then) ** 0.5 * eps
    assert torch.allclose(got, x.float(), atol=2e-4)


def test_the_network_gets_the_steps_of_training():
    pipe, seen = pipeline("DDIMScheduler"), []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1].reshape(-1)[0])))
    draw(pipe, timesteps=UNEVEN)
    assert seen == UNEVEN
    before = pipe.scheduler.alphas_cumprod.clone()
    draw(pipe, num_inference_steps=3)  # the next call is not on that chain
    assert seen[4:] == [666, 333, 0]
    assert torch.equal(pipe.scheduler.alphas_cumprod, before)


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "DEISMultistepScheduler", "KDPM2DiscreteScheduler", "EDMEulerScheduler"]
)
def test_classes_without_timesteps_are_refused(name):
    with pytest.raises(ValueError, match=f"timesteps is given, but {name} takes none: use one of DDIMScheduler, "):
        draw(pipeline(name), timesteps=UNEVEN)


@pytest.mark.slow
def test_every_named_class_takes_them():
    names = scheduler_names_with_timesteps(DDPMExtScheduler())
    assert {"DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"} < {
        *names
    }
    for name in names:
        pipe = pipeline(None if name.startswith("DDPM") else name)
        assert bool(torch.isfinite(draw(pipe, timesteps=UNEVEN)).all())


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([1000, 3], r"timesteps must be in \[0, 1000\)"),
        ([3, 500], "strictly descending"),
        ([3.5], "whole numbers"),
        ([], "whole numbers"),
    ],
)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_wrong_steps_are_refused(name, timesteps, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline(name), timesteps=timesteps)
