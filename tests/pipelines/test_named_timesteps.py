"""`timesteps="samples"`, "bound" and "even" of a call, and the error that such steps are fitted to."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.pipelines.sample_error import SampleError

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of NumPy 2 about Diffusers
SAMPLES = {"DDIMScheduler": {"2": [60, 20], "4": [80, 50, 20, 3]}, "EulerDiscreteScheduler": {"3": [80, 40, 9]}}
BOUND = {"2": [99, 7]}


def pipeline(kind=None, **fitted) -> DDPMExtPipeline:
    scheduler = DDPMExtScheduler.from_config(dict(DDPMExtScheduler(100).config) | fitted)
    pipe = DDPMExtPipeline(tiny_unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    if kind is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


def draw(pipe, **arguments) -> torch.Tensor:
    return pipe(1, torch.Generator().manual_seed(0), output_type="latent", **arguments).images


def test_names_choose_the_steps(tmp_path):
    pipe = pipeline(sample_timesteps=SAMPLES, optimal_timesteps=BOUND)
    pipe.save_pretrained(tmp_path)
    pipe = DDPMExtPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    bound = draw(pipe, num_inference_steps=2, timesteps="bound")
    assert torch.equal(bound, draw(pipe, timesteps=[99, 7]))
    assert torch.equal(bound, draw(pipe, num_inference_steps=2, optimal_timesteps=True))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    chosen = {"samples": [60, 20], "bound": [99, 7], "even": [50, 0]}
    for name, steps in chosen.items():
        assert torch.equal(draw(pipe, num_inference_steps=2, timesteps=name), draw(pipe, timesteps=steps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": "samples"}, "needs num_inference_steps"),
        ({"timesteps": "best", "num_inference_steps": 2}, "timesteps='best' is unknown: choose one of samples, bound"),
        ({"timesteps": "samples", "num_inference_steps": 3}, "for DDIMScheduler those of 2, 4 steps are fitted; .*"
         "fit-steps FOLDER --scheduler DDIMScheduler --num_inference_steps 3"),
        ({"timesteps": "bound", "num_inference_steps": 3}, "known are those for 2 steps; .*fit-variance FOLDER"),
        ({"timesteps": "samples", "num_inference_steps": 2, "optimal_timesteps": True}, "optimal_timesteps needs"),
    ],
)  # fmt: skip
def test_steps_that_are_not_fitted(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline(DDIMScheduler, sample_timesteps=SAMPLES, optimal_timesteps=BOUND), **arguments)


def test_steps_of_other_classes_are_named():
    pipe = pipeline(DPMSolverMultistepScheduler, sample_timesteps=SAMPLES)
    with pytest.raises(ValueError, match=r"none are fitted for DPM.*, but 2, 4 of DDIMScheduler; 3 of EulerDiscrete"):
        draw(pipe, num_inference_steps=2, timesteps="samples")


@pytest.mark.parametrize(
    "damaged", [[1], {"DDIMScheduler": [3]}, {"DDIMScheduler": {"2": [5]}}, {"DDIMScheduler": {"1": [100]}}]
)
def test_damaged_steps_are_refused(damaged):
    with pytest.raises(ValueError, match=r"sample_timesteps.*(must|holds)"):
        draw(pipeline(DDIMScheduler, sample_timesteps=damaged), num_inference_steps=1, timesteps="samples")


def test_another_schedule_drops_them():
    scheduler = pipeline(sample_timesteps=SAMPLES).scheduler
    scheduler.register_schedule(timesteps=20)
    assert not scheduler.config.get("sample_timesteps")


def test_the_error_is_the_distance_of_final_samples():
    """By hand, of single trajectories; in any batches; zero for the many steps themselves."""
    pipe = pipeline(DDIMScheduler)
    error = SampleError(pipe, 5, seed=3, reference_steps=10, batch_size=2)
    again = SampleError(pipe, 5, seed=3, reference_steps=10, batch_size=5)
    assert error([80, 40]) == pytest.approx(again([80, 40]), rel=1e-4)
    assert error(range(9, 100, 10)[::-1]) == 0
    noise = torch.cat(error._noise)
    few, many = (
        pipe(5, latents=noise, timesteps=steps, output_type="latent").images
        for steps in ([80, 40], list(range(9, 100, 10)[::-1]))
    )
    assert error([80, 40]) == pytest.approx(float((few - many).square().mean().sqrt()), rel=1e-4)
    assert SampleError(pipe, 5, seed=4, reference_steps=10)([80, 40]) != again([80, 40])


@pytest.mark.parametrize("kind", [None, EulerAncestralDiscreteScheduler])
def test_schedulers_that_draw_noise_are_refused(kind):
    with pytest.raises(ValueError, match=r"draws noise at its steps.*: use a deterministic one"):
        SampleError(pipeline(kind), 2, reference_steps=5)
