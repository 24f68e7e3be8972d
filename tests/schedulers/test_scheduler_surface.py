"""The scheduler around its reverse step: the forward process, every refusal, its configuration and its copies."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from helpers.draws import F64, draws, seeded

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.schedulers import scheduling_ddpm_ext as module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_add_noise_has_the_right_sigma_at_every_step(dtype):
    """In bfloat16 stock adds no noise at all at the first steps: alphas_cumprod rounds to 1."""
    ours = DDPMExtScheduler()
    t = torch.arange(1000)
    sigma = ours.add_noise(torch.zeros(1000, 2, dtype=dtype), torch.ones(1000, 2, dtype=dtype), t)
    assert sigma.dtype == dtype
    want = torch.tensor(np.sqrt(1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))).to(dtype)
    torch.testing.assert_close(sigma, want[:, None].expand(-1, 2))
    assert (sigma > 0).all()


def test_forward_process_takes_one_step_for_all():
    ours, stock = DDPMExtScheduler(), DDPMScheduler()
    x0, noise = draws(4, 3, 4, 4)
    for t in (torch.tensor([7]), torch.tensor(7), torch.tensor([0, 7, 500, 999])):
        torch.testing.assert_close(ours.add_noise(x0, noise, t), stock.add_noise(x0, noise, t), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            ours.get_velocity(x0, noise, t), stock.get_velocity(x0, noise, t), rtol=0, atol=1e-5
        )
    assert ours.get_velocity(x0.bfloat16(), noise.bfloat16(), torch.tensor([7])).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one step per sample"):
        ours.add_noise(x0, noise, torch.tensor([1, 2]))


def test_forward_process_is_counted_on_all_steps_after_set_timesteps():
    ours = DDPMExtScheduler()
    x0, noise = draws(2, 3)
    t = torch.tensor([17, 501])  # neither is kept below
    before = ours.add_noise(x0, noise, t), ours.q_posterior(x0, noise, t)
    ours.set_timesteps(7)
    assert torch.equal(ours.add_noise(x0, noise, t), before[0])
    assert torch.equal(ours.q_posterior(x0, noise, t)[0], before[1][0])


def test_q_sample_draws_where_no_noise_is_given():
    ours = DDPMExtScheduler()
    (x0,) = draws(2, 3, count=1)
    t = torch.tensor([5, 900])
    want = ours.q_sample(x0, t, randn_tensor((2, 3), generator=seeded()))
    torch.testing.assert_close(ours.q_sample(x0, t, generator=seeded()), want)


def test_previous_timestep_is_a_tensor():
    ours = DDPMExtScheduler()
    stock = DDPMScheduler()
    for count in (None, 10):
        for scheduler in (ours, stock):
            if count:
                scheduler.set_timesteps(count)
        for t in ours.timesteps[[0, 1, -2, -1]]:
            got = ours.previous_timestep(t)
            assert got.shape == ()
            assert got.dtype == torch.int64
            assert got == stock.previous_timestep(t) == ours.previous_timestep(int(t))
    with pytest.raises(ValueError, match="timestep 7 is not a step"):
        ours.previous_timestep(7)


@pytest.mark.parametrize("form", [int, torch.tensor, lambda t: torch.tensor([t, 900])])
@pytest.mark.parametrize("t", [7, 905])
def test_a_step_that_is_not_kept_is_refused(form, t):
    ours = DDPMExtScheduler()
    ours.set_timesteps(10)
    x, out = draws(2, 3)
    with pytest.raises(ValueError, match=f"timestep {t} is not a step of the chain in use"):
        ours.step(out, form(t), x)


@pytest.mark.parametrize("t", [-1, 1000])
@pytest.mark.parametrize("form", [int, lambda t: torch.tensor([t, 0])])
def test_a_step_outside_the_chain_is_refused(t, form):
    x, out = draws(2, 3)
    with pytest.raises(ValueError, match=str(t)):
        DDPMExtScheduler().step(out, form(t), x)


def test_wrong_shapes_are_refused():
    ours = DDPMExtScheduler()
    x, out = draws(2, 3, 4, 4)
    for bad, message in [
        ({"model_output": out[:1]}, "the same shape"),
        ({"model_output": torch.cat([out, out], 1)}, "variance_type='learned'"),
        ({"variance_noise": out[:1]}, "variance_noise must have"),
        ({"timestep": torch.tensor([1, 2, 3])}, "one step per sample"),
        ({"timestep": torch.tensor([1.0, 2.0])}, "integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.step(**({"model_output": out, "timestep": 5, "sample": x} | bad))
    with pytest.raises(ValueError, match="twice sample's channels"):
        DDPMExtScheduler(variance_type="learned").step(out, 5, x)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"v_posterior": -0.1}, "v_posterior=-0.1"),
        ({"v_posterior": 1.5}, "v_posterior=1.5"),
        ({"v_posterior": float("nan")}, "v_posterior=nan"),
        ({"v_posterior": "0.5"}, "v_posterior='0.5'"),
        ({"v_posterior": 0.0, "variance_type": "learned"}, "contradicts variance_type='learned'"),
        ({"v_posterior": 0.5, "variance_type": "fixed_small_log"}, "contradicts variance_type='fixed_small_log'"),
        ({"variance_type": "other"}, "variance_type='other'"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even'"),
        ({"prediction_type": "eps"}, "prediction_type='eps'"),
        ({"beta_schedule": "cosine"}, "beta_schedule='cosine'"),
        ({"beta_end": 2}, "beta_end=2"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 500}, "num_train_timesteps=500 contradicts the 2"),
        ({"trained_betas": [0.1, 1.2]}, "beta 1.2 of step 1"),
        ({"trained_betas": [[0.1], [0.2]]}, "list of numbers"),
        ({"trained_betas": ["a"]}, "list of numbers"),
        ({"trained_betas": []}, "at least one"),
    ],
)
def test_constructor_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DDPMExtScheduler(**kwargs)


def test_length_of_given_betas_counts():
    betas = [0.1, 0.2, 0.3]
    for kwargs in ({}, {"num_train_timesteps": 1000}, {"num_train_timesteps": 3}):
        assert len(DDPMExtScheduler(trained_betas=betas, **kwargs)) == 3


def test_register_schedule_resets_the_chain():
    ours = DDPMExtScheduler(v_posterior=0.5, prediction_type="v_prediction")
    ours.set_timesteps(10)
    stale = ours.betas
    ours.register_schedule(beta_schedule="cosine", timesteps=100, cosine_s=0.02)
    assert ours.timesteps.tolist() == list(range(99, -1, -1))
    assert ours.num_inference_steps is None
    assert ours.kept is ours.schedule
    assert len(ours.betas) == 100 != len(stale)
    assert ours.schedule.v_posterior == 0.5
    ours.set_timesteps(10)
    x, out = draws(2, 3)
    assert ours.step(out, 90, x).prev_sample.isfinite().all()
    ours.register_schedule(given_betas=np.linspace(0.01, 0.2, 30))
    assert len(ours) == len(ours.config.trained_betas) == 30
    with pytest.raises(ValueError, match=r"choose one of .*CompVis' names"):
        ours.register_schedule(beta_schedule="scaled_linear")


def test_zero_terminal_snr():
    """Fine to construct; epsilon is refused where sampling starts, the others sample from the very last step."""
    x, out = draws(2, 3)
    epsilon = DDPMExtScheduler(rescale_betas_zero_snr=True)
    assert epsilon.step(out, 500, x).prev_sample.isfinite().all()
    for call in (
        lambda: epsilon.set_timesteps(10),
        lambda: epsilon.set_timesteps(timesteps=[999, 0]),
        lambda: DDPMExtScheduler(trained_betas=[0.5, 1.0]).set_timesteps(1),
    ):
        with pytest.raises(ValueError, match="prediction_type='v_prediction' or 'sample'"):
            call()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        epsilon.step(out, 999, x)
    for prediction_type in ("sample", "v_prediction"):
        ours = DDPMExtScheduler(
            rescale_betas_zero_snr=True,
            prediction_type=prediction_type,
            timestep_spacing="trailing",
            clip_sample=False,
        )
        ours.set_timesteps(10)
        first = ours.step(out, 999, x)
        assert first.prev_sample.isfinite().all()
        want = out if prediction_type == "sample" else -out
        torch.testing.assert_close(first.pred_original_sample, want)


def test_set_timesteps_arguments():
    ours = DDPMExtScheduler()
    for arguments in ({}, {"num_inference_steps": 5, "timesteps": [3, 1]}):
        with pytest.raises(ValueError, match="one of num_inference_steps and timesteps"):
            ours.set_timesteps(**arguments)
    for timesteps in ([900, 5], np.array([900, 5]), torch.tensor([900, 5])):
        ours.set_timesteps(timesteps=timesteps, device="cpu")
        assert ours.timesteps.tolist() == [900, 5]
        assert ours.custom_timesteps
    ours.set_timesteps(4)
    assert ours.timesteps.dtype == torch.int64
    assert not ours.custom_timesteps
    with pytest.raises(ValueError, match="steps_offset=1"):
        DDPMExtScheduler(steps_offset=1).set_timesteps(1000)


def test_tables_are_casts_of_the_one_table():
    ours = DDPMExtScheduler()
    assert ours.betas is ours.betas
    assert "alphas_cumprod" not in vars(ours)
    np.testing.assert_array_equal(ours.alphas_cumprod.numpy(), ours.schedule.alphas_cumprod.astype(np.float32))
    np.testing.assert_array_equal(ours.alphas.numpy(), ours.schedule.alphas.astype(np.float32))
    ours.alphas_cumprod = ours.alphas_cumprod.double()  # as scripts do to move it to their device
    assert ours.alphas_cumprod.dtype == F64


def test_what_diffusers_looks_for():
    """It finds the base class by name in the module that defines the scheduler."""
    assert module.SchedulerMixin is not None
    ours = DDPMExtScheduler()
    x, out = draws(2, 3)
    assert ours.scale_model_input(x, 5) is x
    assert ours.scale_model_input(x) is x
    assert ours.order == 1
    assert ours.init_noise_sigma == 1.0
    assert len(ours) == 1000
    output = ours.step(out, 5, x, seeded())
    assert output[0] is output.prev_sample is output["prev_sample"]
    first, second = ours.step(out, 5, x, seeded(), False)
    assert torch.equal(first, output.prev_sample)
    assert torch.equal(second, output.pred_original_sample)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_work(copied):
    ours = DDPMExtScheduler(v_posterior=0.3)
    ours.set_timesteps(10)
    x, out = draws(2, 3)
    want = ours.step(out, torch.tensor([900, 0]), x, generator=seeded()).prev_sample
    got = copied(ours).step(out, torch.tensor([900, 0]), x, generator=seeded()).prev_sample
    assert torch.equal(got, want)


def test_int_steps_read_no_tensor_back():
    """A tensor on the meta device has no values: reading them raises."""
    ours = DDPMExtScheduler()
    ours.set_timesteps(10)
    x = torch.zeros(2, 3, 4, 4, device="meta")
    assert ours.step(x, 900, x).prev_sample.device.type == "meta"


def test_one_step_chain():
    ours = DDPMExtScheduler(num_train_timesteps=1)
    x, out = draws(2, 3)
    last = ours.step(out, 0, x)
    torch.testing.assert_close(last.prev_sample, last.pred_original_sample)
    ours.set_timesteps(1)
    assert ours.timesteps.tolist() == [0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_an_accelerator():
    """Steps by int and per sample wait for nothing, and draw what the CPU draws from a CPU generator."""
    ours = DDPMExtScheduler()
    ours.set_timesteps(10, device="cuda")
    x, out = draws(4, 3, 8, 8)
    want = ours.step(out, 900, x, generator=seeded()).prev_sample
    x, out, each = x.cuda(), out.cuda(), torch.tensor([900, 900, 0, 0], device="cuda")
    listed = ours.step(out, 900, x, generator=[seeded(i) for i in range(4)]).prev_sample
    torch.testing.assert_close(ours.step(out, 900, x, generator=seeded()).prev_sample.cpu(), want)
    for t in (each, ours.timesteps[0], torch.tensor([900, 905, 0, 0], device="cuda")):  # tables reach the device once
        ours.step(out, t, x)
    on_device = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        shared = ours.step(out, 900, x, generator=on_device).prev_sample
        zero_dim = ours.step(out, ours.timesteps[0], x, generator=on_device.manual_seed(0)).prev_sample
        per_sample = ours.step(out, each, x, generator=on_device.manual_seed(0))
        unknown = ours.step(out, each + 5, x).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(zero_dim, shared, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(per_sample.prev_sample[:2], shared[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(per_sample.prev_sample[2:], per_sample.pred_original_sample[2:], rtol=1e-5, atol=1e-6)
    assert unknown.isnan().all()  # a step that is not kept cannot pass for one that is
    alone = ours.step(out[1:2], 900, x[1:2], generator=seeded(1)).prev_sample
    torch.testing.assert_close(listed[1:2], alone)
    noised = ours.add_noise(x, out, each)
    torch.testing.assert_close(noised.cpu(), ours.add_noise(x.cpu(), out.cpu(), each.cpu()), rtol=1e-5, atol=1e-6)


def test_a_new_schedule_drops_what_was_fitted_on_the_old_one():
    fitted = {"v_decoder": [0.5] * 20, "optimal_timesteps": {"2": [19, 3]}}
    scheduler = DDPMExtScheduler(20, v_posterior=0.4, **fitted)
    scheduler.register_schedule(timesteps=10)
    assert scheduler.config.v_decoder is None
    assert scheduler.config.optimal_timesteps is None
    assert scheduler.config.v_posterior == 0.4
    with pytest.raises(ValueError, match="none are known"):
        scheduler.set_timesteps(2, optimal=True)
