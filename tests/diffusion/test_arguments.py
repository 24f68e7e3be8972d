"""Arguments in every form a user writes them: converted where their meaning is plain, else refused in one sentence."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from helpers.draws import draws, seeded
from torch import nn

from diffusers_ddpm_ext import DDPMExtScheduler, DDPMObjective, LitEMA, gaussian, likelihood
from diffusers_ddpm_ext.diffusion.variance_fit import fit_logvar

T = 20
SCHEDULER = DDPMExtScheduler(T)
X, NOISE = draws(2, 3, 4, 4)
S = SCHEDULER.schedule
FUNCTIONS = {
    "gaussian.q_sample": lambda t: gaussian.q_sample(S, X, NOISE, t),
    "gaussian.posterior": lambda t: gaussian.posterior(S, X, NOISE, t).mean,
    "gaussian.q_mean_variance": lambda t: gaussian.q_mean_variance(S, X, t).mean,
    "gaussian.velocity": lambda t: gaussian.velocity(S, X, NOISE, t),
    "gaussian.predict_x0": lambda t: gaussian.predict_x0(S, "epsilon", NOISE, X, t),
    "gaussian.predict_eps": lambda t: gaussian.predict_eps(S, "sample", NOISE, X, t),
    "gaussian.training_target": lambda t: gaussian.training_target(S, "v_prediction", X, NOISE, t),
    "scheduler.q_sample": lambda t: SCHEDULER.q_sample(X, t, NOISE),
    "scheduler.q_posterior": lambda t: SCHEDULER.q_posterior(X, NOISE, t)[0],
    "scheduler.predict_start_from_noise": lambda t: SCHEDULER.predict_start_from_noise(X, t, NOISE),
    "scheduler.get_v": lambda t: SCHEDULER.get_v(X, NOISE, t),
    "scheduler.add_noise": lambda t: SCHEDULER.add_noise(X, NOISE, t),
    "scheduler.get_velocity": lambda t: SCHEDULER.get_velocity(X, NOISE, t),
    "scheduler.step": lambda t: SCHEDULER.step(NOISE, t, X, generator=seeded()).prev_sample,
    "objective": lambda t: DDPMObjective(SCHEDULER)(NOISE, X, NOISE, t).per_sample_loss,
    "objective.target": lambda t: DDPMObjective(SCHEDULER).target(X, NOISE, t),
    "bound_terms": lambda t: likelihood.bound_terms(SCHEDULER, NOISE, X, NOISE, t).bits,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_steps_in_every_form(function):
    """An int is one step for all; lists, ranges, arrays and tensors of any integer type are one per sample."""
    want = function(torch.tensor([5, 5]))
    for t in (5, np.int32(5), [5, 5], (5, 5), np.array([5, 5], np.uint8), torch.tensor([5, 5], dtype=torch.uint8)):
        torch.testing.assert_close(function(t), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(function([7, 5])[1], want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    "t",
    [5.0, 5.5, True, "5", None, [5.0, 5.0], [True, 5], ["5", "5"], [[5], [5, 6]], [5], [5, 5, 5], T, -1, [0, T], {5}],
)
def test_steps_that_mean_nothing_are_refused(function, t):
    if t == [5] and function in (FUNCTIONS[name] for name in FUNCTIONS if name.startswith("scheduler")):
        function(t)  # one step for all, as in Diffusers
        return
    with pytest.raises(ValueError, match=r"^(t|timesteps?)\b.*(integer|one step per sample|must be in|not a step)"):
        function(t)


SAMPLES = {
    "gaussian.q_sample": lambda x, y: gaussian.q_sample(S, x, y, 5),
    "gaussian.q_mean_variance": lambda x, y: (gaussian.q_mean_variance(S, x, 5), gaussian.q_mean_variance(S, y, 5)),
    "gaussian.velocity": lambda x, y: gaussian.velocity(S, x, y, 5),
    "scheduler.q_sample": lambda x, y: SCHEDULER.q_sample(x, 5, y),
    "scheduler.q_sample alone": lambda x, y: (SCHEDULER.q_sample(x, 5), SCHEDULER.q_sample(y, 5)),
    "scheduler.q_posterior": lambda x, y: SCHEDULER.q_posterior(x, y, 5),
    "scheduler.add_noise": lambda x, y: SCHEDULER.add_noise(x, y, 5),
    "scheduler.get_velocity": lambda x, y: SCHEDULER.get_velocity(x, y, 5),
    "scheduler.step": lambda x, y: SCHEDULER.step(x, 5, y),
    "objective": lambda x, y: DDPMObjective(SCHEDULER)(y, x, y, 5),
    "bound_terms": lambda x, y: likelihood.bound_terms(SCHEDULER, x, x, y, 5),
}


@pytest.mark.parametrize("function", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_images_of_integers_are_refused(function, dtype):
    """They would be noised at 0 to 255, or come back as integers."""
    image = (X.abs() * 50).to(dtype)
    for x, y in ((image, image), (X, image), (image, X)):
        with pytest.raises(ValueError, match=f"must be a floating tensor, got {dtype}"):
            function(x, y)


def test_an_image_of_bytes_is_told_how_to_scale():
    with pytest.raises(ValueError, match=r"x / 127\.5 - 1"):
        SCHEDULER.add_noise(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), X[:1], 5)


@pytest.mark.parametrize("function", [f for name, f in SAMPLES.items() if "alone" not in name and "mean" not in name])
def test_other_containers_shapes_and_devices_are_refused(function):
    for x, message in ((X.numpy(), "ndarray"), (None, "None"), (X[:1], "shape"), (X.to("meta"), "devices")):
        with pytest.raises(ValueError, match=message):
            function(x, X)


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (0, r"generator=0 .*manual_seed"),
        ("cpu", r"generator='cpu'"),
        (np.random.default_rng(0), "generator=Generator"),
        ([None, None], r"generator\[0\]=None"),
        ([torch.Generator(), 1], r"generator\[1\]=1"),
        ([torch.Generator()] * 3, r"one generator per sample \(2\), got 3"),
    ],
)
def test_generators_that_are_none_are_refused(generator, message):
    for call in (
        lambda: SCHEDULER.step(NOISE, 5, X, generator=generator),
        lambda: SCHEDULER.step(NOISE, torch.tensor([5, 6]), X, generator=generator),
        lambda: SCHEDULER.q_sample(X, 5, generator=generator),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="generator"):
        likelihood.bits_per_dim(lambda x, t: x, SCHEDULER, X, generator=generator)


def tiny_unet(**options) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        4, 3, 3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4, add_attention=False, **options,
    ).eval()  # fmt: skip


def test_the_output_of_a_diffusers_model_is_taken_as_it_is():
    unet, t = tiny_unet(), torch.tensor([3, 9])
    with torch.no_grad():
        output = unet(X, t)
    for form in (output, (output.sample,)):
        assert (
            DDPMObjective(SCHEDULER)(form, X, NOISE, t).loss
            == DDPMObjective(SCHEDULER)(output.sample, X, NOISE, t).loss
        )
        step = SCHEDULER.step(form, 5, X, generator=seeded()).prev_sample
        assert torch.equal(step, SCHEDULER.step(output.sample, 5, X, generator=seeded()).prev_sample)
        x0 = gaussian.predict_x0(S, "epsilon", form, X, t)
        assert torch.equal(x0, gaussian.predict_x0(S, "epsilon", output.sample, X, t))
    want = likelihood.bits_per_dim(lambda x, t: unet(x, t).sample, SCHEDULER, X, generator=seeded()).total
    assert torch.equal(likelihood.bits_per_dim(unet, SCHEDULER, X, generator=seeded()).total, want)
    assert np.isfinite(fit_logvar(unet, SCHEDULER, X, draws=4, generator=seeded()).x0_error).all()
    for wrong in (None, {"x": 1}, UNet2DOutput(sample=None), (X, X)):
        with pytest.raises(ValueError, match="model_output must be a tensor, or a Diffusers output"):
            DDPMObjective(SCHEDULER)(wrong, X, NOISE, t)


def test_a_network_left_in_training_mode_is_evaluated_without_dropout():
    unet = tiny_unet(dropout=0.9)
    want = likelihood.bits_per_dim(unet, SCHEDULER, X, generator=seeded()).total
    unet.train()
    unet.conv_in.eval()
    assert torch.equal(likelihood.bits_per_dim(unet, SCHEDULER, X, generator=seeded()).total, want)
    assert unet.training
    assert unet.mid_block.training
    assert not unet.conv_in.training


def test_a_network_runs_in_its_own_precision():
    unet = tiny_unet()
    exact = likelihood.bits_per_dim(unet, SCHEDULER, X.double(), noise=torch.zeros(T, *X.shape)).total
    assert exact.dtype == torch.float64
    half = likelihood.bits_per_dim(unet.bfloat16(), SCHEDULER, X, noise=torch.zeros(T, *X.shape)).total
    torch.testing.assert_close(half, exact.float(), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: likelihood.bits_per_dim(LitEMA(nn.Linear(1, 1)), SCHEDULER, X),
            r"LitEMA is not a network.*ema\.scope",
        ),
        (lambda: likelihood.bits_per_dim(SCHEDULER, nn.Linear(1, 1), X), "scheduler=Linear has no chain of steps"),
        (lambda: likelihood.bits_per_dim(nn.Linear(1, 1), DDPMScheduler(), X), "from_config"),
        (lambda: likelihood.bits_per_dim(lambda x, t: x, SCHEDULER, X / 0), "x0 has values that are NaN or infinite"),
        (lambda: fit_logvar(lambda x, t: x, SCHEDULER, X / 0), "x0 has values that are NaN or infinite"),
        (lambda: DDPMObjective(nn.Linear(1, 1)), "scheduler=Linear has no NoiseSchedule: pass a DDPMExtScheduler"),
        (
            lambda: DDPMObjective(SCHEDULER)(X, X, NOISE, 5, weights=torch.ones(1)),
            "weights must be a tensor of one per",
        ),
        (lambda: DDPMObjective(SCHEDULER)(X, X, NOISE, 5, weights=[1.0, 1.0]), "weights must be a tensor of one per"),
    ],
)
def test_arguments_in_each_others_place_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDPMExtScheduler(parameterization="eps"), "use prediction_type='epsilon'"),
        (lambda: DDPMExtScheduler(parameterization="v"), "use prediction_type='v_prediction'"),
        (lambda: DDPMExtScheduler(linear_start=0.0015), "use beta_start=0.0015"),
        (lambda: DDPMExtScheduler(timesteps=1000), "use num_train_timesteps=1000"),
        (lambda: DDPMExtScheduler(given_betas=[0.1, 0.2]), r"use trained_betas=\[0.1, 0.2\]"),
        (lambda: DDPMObjective(SCHEDULER, parameterization="x0"), "use prediction_type='sample'"),
        (lambda: DDPMObjective(SCHEDULER, linear_end=0.02), "use beta_end=0.02 of DDPMExtScheduler"),
        (lambda: DDPMObjective(SCHEDULER, "eps"), "use 'epsilon'"),
    ],
)
def test_compvis_names_of_arguments_are_translated_in_the_message(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "v_prediction"},
        {"beta_end": 0.03},
        {"num_train_timesteps": 10},
        {"variance_type": "fixed_large"},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
    ],
)
@pytest.mark.parametrize("copied", [lambda pair: pair, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_an_objective_never_disagrees_with_its_scheduler(change, copied):
    scheduler, objective = copied((DDPMExtScheduler(T), DDPMObjective(SCHEDULER)))
    objective = DDPMObjective(scheduler)
    scheduler, objective = copied((scheduler, objective))
    want = objective(X, X, NOISE, 5).loss
    scheduler.register_to_config(clip_sample=False, timestep_spacing="trailing")  # training does not depend on them
    assert objective(X, X, NOISE, 5).loss == want
    scheduler.register_to_config(**change)
    for call in (lambda: objective(X, X, NOISE, 5), lambda: objective.target(X, NOISE, 5)):
        with pytest.raises(ValueError, match="has changed since this objective was made"):
            call()
    assert DDPMObjective(scheduler).schedule.prediction_type == scheduler.config.prediction_type


@pytest.mark.parametrize(
    "timesteps",
    [
        [19.5], [True, False], ["19"], [19, False], [float("nan")], [float("inf"), 3], [2**63], [-1], [T], [3, 3], [],
        np.array([19.5, 3.0]), torch.tensor([19.5]), torch.tensor([True]), 19, "19", [[19], [3]], [1j], range(10**9),
    ],
)  # fmt: skip
def test_timesteps_are_never_truncated(timesteps):
    with pytest.raises(ValueError, match=r"^timesteps"):
        DDPMExtScheduler(T).set_timesteps(timesteps=timesteps)
