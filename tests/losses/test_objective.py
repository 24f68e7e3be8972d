"""The objective against recorded losses of the original, hand-written formulas, and traps of precision and shape."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN
from torch import Tensor

from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.losses.objective import DDPMObjective
from diffusers_ddpm_ext.utils.vocabulary import PREDICTION_TYPES

CASES = json.loads((GOLDEN / "d_p_losses.json").read_text())["cases"]
ARRAYS = np.load(GOLDEN / "d_p_losses.npz")
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
LOG_KEYS = {
    "train/loss": "loss",
    "train/loss_simple": "loss_simple",
    "train/loss_vlb": "loss_vlb",
    "train/loss_gamma": "loss_gamma",
    "logvar": "logvar_mean",
}


def scheduler(prediction_type: str = "epsilon", variance_type: str = "fixed_small", **schedule) -> SimpleNamespace:
    """What the objective needs of a scheduler, and nothing else."""
    tables = NoiseSchedule(**{"num_train_timesteps": 20, "prediction_type": prediction_type, **schedule})
    config = SimpleNamespace(prediction_type=prediction_type, variance_type=variance_type)
    return SimpleNamespace(schedule=tables, config=config)


def batch(size: int = 4, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    output, x0, noise = (torch.randn(size, *shape, generator=generator).to(dtype) for _ in range(3))
    return output, x0, noise, torch.randint(0, 20, (size,), generator=generator)


def recorded(case: dict, **options) -> DDPMObjective:
    owner = scheduler(
        NAMES[case["parameterization"]],
        num_train_timesteps=case["timesteps"],
        beta_schedule="scaled_linear",
        v_posterior=case["v_posterior"],
    )
    weights = {name: case[name] for name in ("loss_type", "l_simple_weight", "original_elbo_weight")}
    return DDPMObjective(owner, elbo_weights="compvis", **weights, **options)


def run_recorded(case: dict, objective: DDPMObjective):
    names = ("model_out", "x_start", "noise", "t")
    return objective(*(torch.tensor(ARRAYS[f"{case['id']}/{name}"]) for name in names))


def check_logs(output, logs: dict[str, float]) -> None:
    for key, value in logs.items():
        assert getattr(output, LOG_KEYS[key]).item() == pytest.approx(value, rel=3e-6, abs=3e-6), key


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_recorded_losses(case):
    """Base DDPM ignores logvar, so its numbers are those of a fixed logvar of 0."""
    check_logs(run_recorded(case, recorded(case)), case["ddpm"]["train"])
    fixed = case["latent_fixed_logvar"]
    output = run_recorded(case, recorded(case, logvar_init=fixed["logvar_init"]))
    check_logs(output, fixed["train"])
    assert output.loss.item() == pytest.approx(fixed["loss"], rel=3e-6, abs=3e-6)


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_recorded_learned_logvar_and_its_gradient(case):
    learned = case["latent_learn_logvar"]
    table = torch.tensor(ARRAYS[f"{case['id']}/logvar"])
    objective = recorded(case, learn_logvar=True, logvar_init=table)
    output = run_recorded(case, objective)
    check_logs(output, learned["train"])
    output.loss.backward()
    gradient = objective.logvar.grad
    t = torch.tensor(ARRAYS[f"{case['id']}/t"])
    np.testing.assert_allclose(gradient[t].numpy(), ARRAYS[f"{case['id']}/dlogvar"], rtol=3e-6, atol=3e-6)
    assert float(gradient.abs().sum()) == pytest.approx(learned["dlogvar_abs_sum"], rel=3e-6, abs=3e-6)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_logvar_gradient_is_the_formula_and_zero_elsewhere(snr_gamma):
    """l_simple / B * sum over the samples of a step of w (1 - d / exp(logvar)); exactly 0 for absent steps."""
    init = torch.linspace(-1, 1, 20)
    objective = DDPMObjective(
        scheduler("v_prediction"),
        l_simple_weight=0.7,
        original_elbo_weight=0.3,
        learn_logvar=True,
        logvar_init=init,
        snr_gamma=snr_gamma,
    )
    output, x0, noise, _ = batch(6, 2, 3)
    t = torch.tensor([3, 3, 0, 19, 3, 7])
    abar = NoiseSchedule(20).alphas_cumprod
    root, sigma = (torch.tensor(table**0.5)[t].reshape(6, 1, 1) for table in (abar, 1 - abar))
    distance = ((output - (root * noise - sigma * x0)) ** 2).mean((1, 2))
    expected = torch.zeros(20, dtype=torch.float64)
    for d, k in zip(distance, t, strict=True):
        weight = 1.0 if snr_gamma is None else min(abar[k] / (1 - abar[k]), 5.0) * (1 - abar[k])
        expected[k] += 0.7 / 6 * weight * (1 - d / torch.exp(init[k].double()))
    objective(output, x0, noise, t).loss.backward()
    torch.testing.assert_close(objective.logvar.grad.double(), expected, rtol=1e-6, atol=1e-6)
    absent = [k for k in range(20) if k not in t]
    assert (objective.logvar.grad[absent] == 0).all()


def test_logvar_goes_to_the_log_of_the_unweighted_loss():
    """Under min-SNR too: at logvar = log d its gradient vanishes."""
    output, x0, noise, _ = batch(3, 4)
    t = torch.tensor([1, 8, 17])
    first = DDPMObjective(scheduler(), snr_gamma=1.0)(output, x0, noise, t)
    init = torch.zeros(20)
    init[t] = first.per_sample_simple.log()
    objective = DDPMObjective(scheduler(), snr_gamma=1.0, learn_logvar=True, logvar_init=init)
    objective(output, x0, noise, t).loss.backward()
    torch.testing.assert_close(objective.logvar.grad, torch.zeros(20), rtol=0, atol=1e-7)


@pytest.mark.parametrize("options", [{"snr_gamma": 5.0}, {"l_simple_weight": 0.0, "original_elbo_weight": 1.0}])
@pytest.mark.parametrize("v_posterior", [0.0, 0.4])
def test_one_prediction_costs_the_same_in_eps_x0_and_v(options, v_posterior):
    """The same predicted clean sample in three parameterizations; min-SNR and the exact bound are the same for all."""
    guess, x0, noise, t = batch(8, 3, 4, 4, dtype=torch.float64)
    abar = torch.tensor(NoiseSchedule(20).alphas_cumprod)[t].reshape(8, 1, 1, 1)
    root, sigma = abar.sqrt(), (1 - abar).sqrt()
    eps = (root * x0 + sigma * noise - root * guess) / sigma
    outputs = {"epsilon": eps, "sample": guess, "v_prediction": root * eps - sigma * guess}
    losses = [
        float(
            DDPMObjective(scheduler(name, v_posterior=v_posterior), **options)(
                outputs[name].float(), x0.float(), noise.float(), t
            ).loss
        )
        for name in PREDICTION_TYPES
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (3, 4, 5), (1, 2, 3, 4)])
@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_any_rank_each_sample_by_its_own_step(name, shape):
    """Batch equals width on purpose: a missing reshape would broadcast. One sample at a time gives the same terms."""
    objective = DDPMObjective(scheduler(name), original_elbo_weight=0.1, snr_gamma=5.0, logvar_init=0.3)
    inputs = batch(4, *shape)
    output = objective(*inputs)
    alone = [objective(*(tensor[i : i + 1] for tensor in inputs)) for i in range(4)]
    assert output.per_sample_loss.shape == output.per_sample_simple.shape == (4,)
    torch.testing.assert_close(output.per_sample_loss, torch.cat([one.per_sample_loss for one in alone]))
    torch.testing.assert_close(output.loss, torch.stack([one.loss for one in alone]).mean())
    torch.testing.assert_close(output.loss_simple, torch.stack([one.loss_simple for one in alone]).mean())
    torch.testing.assert_close(output.per_sample_loss.mean(), output.loss)
    torch.testing.assert_close(output.per_sample_simple.mean(), output.loss_simple)


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_the_target_costs_nothing(name):
    objective = DDPMObjective(scheduler(name))
    _, x0, noise, t = batch(4, 3)
    target = objective.target(x0, noise, t)
    assert float(objective(target, x0, noise, t).loss) == 0
    expected = {"epsilon": noise, "sample": x0}.get(name)
    assert expected is None or torch.equal(target, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    objective = DDPMObjective(scheduler("v_prediction"), original_elbo_weight=0.3, logvar_init=0.25)
    output, x0, noise, t = batch(4, 3, dtype=dtype)
    half, full = objective(output, x0, noise, t), objective(output.float(), x0.float(), noise.float(), t)
    assert half.loss.dtype == half.loss_vlb.dtype == half.loss_gamma.dtype == torch.float32
    assert objective.target(x0, noise, t).dtype == torch.float32
    assert torch.equal(half.loss, full.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    def matrix(prediction: Tensor, target: Tensor) -> Tensor:
        """A product, which autocast would run in the half type."""
        return ((prediction - target) @ torch.full((3, 1), 1 / 3)).square().mean(1)

    objective = DDPMObjective(scheduler("v_prediction"), loss_type=matrix, learn_logvar=True)
    output, x0, noise, t = batch(4, 3)
    plain = objective(output, x0, noise, t)
    with torch.autocast("cpu", dtype=dtype):
        inside = objective(output, x0, noise, t)
    assert torch.equal(plain.per_sample_loss, inside.per_sample_loss)


def test_float64_stays_float64():
    objective = DDPMObjective(scheduler("v_prediction"), original_elbo_weight=0.5, snr_gamma=5.0, logvar_init=0.3)
    inputs = batch(4, 3, dtype=torch.float64)
    output = objective(*inputs)
    assert output.loss.dtype == torch.float64
    abar, d = NoiseSchedule(20).alphas_cumprod, output.per_sample_simple.numpy()
    steps = inputs[3].numpy()
    schedule = NoiseSchedule(20)
    variance = schedule.posterior_variance.copy()
    variance[0] = variance[1]
    e = schedule.betas**2 * schedule.alphas_cumprod_prev / (2 * variance * (1 - abar))
    w = np.minimum(abar / (1 - abar), 5.0) * (1 - abar)
    logvar = float(np.float32(0.3))
    expected = w[steps] * (d / np.exp(logvar) + logvar) + 0.5 * e[steps] * d
    assert float(output.loss) == pytest.approx(expected.mean(), rel=1e-12)


@pytest.mark.parametrize("learn", [True, False])
def test_logvar_is_always_in_the_state_and_never_half(learn):
    objective = DDPMObjective(scheduler(), learn_logvar=learn, logvar_init=0.1)
    assert dict(objective.named_parameters()).keys() == ({"logvar"} if learn else set())
    assert objective.state_dict().keys() == {"logvar"}
    before = objective.logvar.detach().clone()
    for cast in (objective.half, objective.bfloat16, lambda: objective.to(torch.float16)):
        cast()
        assert objective.logvar.dtype == torch.float32
        assert torch.equal(objective.logvar, before)
    torch.nn.ModuleList([objective]).half()
    assert torch.equal(objective.logvar, before)
    assert isinstance(objective.logvar, torch.nn.Parameter) == learn
    assert objective.to("meta").logvar.device.type == "meta"


def test_state_moves_between_learned_and_fixed():
    learned = DDPMObjective(scheduler(), learn_logvar=True, logvar_init=torch.arange(20.0))
    fixed = DDPMObjective(scheduler())
    fixed.load_state_dict(learned.state_dict())
    torch.testing.assert_close(fixed.logvar, torch.arange(20.0))
    assert torch.equal(copy.deepcopy(learned).logvar, learned.logvar)


def test_logs_are_detached_and_the_loss_is_not():
    objective = DDPMObjective(scheduler(), learn_logvar=True)
    output, x0, noise, t = batch(4, 3)
    result = objective(output.requires_grad_(), x0, noise, t)
    logs = (result.loss_simple, result.loss_vlb, result.loss_gamma, result.logvar_mean)
    assert not any(tensor.requires_grad or tensor.ndim for tensor in logs)
    assert result.loss.requires_grad
    assert result.per_sample_simple.requires_grad
    result.loss.backward()
    torch.testing.assert_close(output.grad, 2 * (output.detach() - noise) / 12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_steps_of_any_integer_dtype(dtype):
    """torch reads a uint8 index as a mask."""
    objective = DDPMObjective(scheduler("v_prediction"), snr_gamma=5.0, logvar_init=torch.arange(20.0))
    output, x0, noise, t = batch(4, 3)
    assert torch.equal(objective(output, x0, noise, t.to(dtype)).loss, objective(output, x0, noise, t).loss)


def test_inputs_are_not_changed():
    inputs = batch(4, 3)
    before = [tensor.clone() for tensor in inputs]
    DDPMObjective(scheduler("sample"), original_elbo_weight=1.0)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_zero_terminal_snr_trains_in_x0_and_v():
    for name in ("sample", "v_prediction"):
        owner = scheduler(name, rescale_betas_zero_snr=True)
        objective = DDPMObjective(owner, original_elbo_weight=1.0, snr_gamma=5.0)
        output, x0, noise, _ = batch(2, 3)
        assert torch.isfinite(objective(output, x0, noise, torch.tensor([19, 0])).loss)


def test_custom_distance_and_modules():
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            assert prediction.dtype == target.dtype == torch.float32
            return self.scale * (prediction - target).abs().amax(dim=(1, 2))

    objective = DDPMObjective(scheduler(), loss_type=Scaled())
    output, x0, noise, t = batch(4, 3, 2, dtype=torch.bfloat16)
    expected = 2 * (output.float() - noise.float()).abs().flatten(1).max(1).values.mean()
    torch.testing.assert_close(objective(output, x0, noise, t).loss, expected)


@pytest.mark.parametrize(
    "distance",
    [
        lambda p, q: (p - q).square().mean(),
        lambda p, q: (p - q).square(),
        lambda p, q: (p - q).square().mean(1, keepdim=True),
        lambda p, q: 1.0,
    ],
)
def test_custom_distance_of_another_shape_is_refused(distance):
    with pytest.raises(ValueError, match=r"loss_type.*one value per sample"):
        DDPMObjective(scheduler(), loss_type=distance)(*batch(4, 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prediction_type": "sample"}, "prediction_type='sample' differs from the scheduler's 'epsilon'"),
        ({"prediction_type": "x0"}, "use 'sample'"),
        ({"prediction_type": "noise"}, "choose one of epsilon, sample, v_prediction"),
        ({"loss_type": "perceptual"}, "needs features"),
        ({"features": lambda a, b: a.flatten(1).mean(1)}, "only used by loss_type='perceptual'"),
        ({"loss_type": "hybrid"}, "nothing to learn from the bound with variance_type='fixed_small'"),
        ({"loss_type": "vlb", "learn_logvar": True}, "learn_logvar has no effect"),
        ({"loss_type": "vlb", "original_elbo_weight": 5}, "original_elbo_weight=5 has no effect"),
        ({"loss_type": "vlb", "l_simple_weight": 7}, "l_simple_weight=7 has no effect"),
        ({"loss_type": "vlb", "loss_weighting": "p2"}, "loss_weighting='p2' has no effect"),
        ({"loss_type": "vlb", "snr_gamma": 5}, "loss_weighting='min_snr' has no effect"),
        ({"loss_type": "vlb", "vlb_weight": -1.0}, "vlb_weight"),
        ({"loss_type": "vlb", "decoder": "tanh"}, "decoder='tanh' is unknown"),
        ({"loss_type": "vlb", "bin_width": 3.0}, "bin_width"),
        ({"perceptual_weight": 1.5}, "perceptual_weight"),
        ({"loss_weighting": "snr"}, "choose one of simple, min_snr"),
        ({"loss_weighting": "p2", "snr_gamma": 5.0}, "only used by loss_weighting='min_snr' and 'soft_min_snr'"),
        ({"loss_weighting": "p2", "p2_k": 0.0}, "p2_k"),
        ({"logvar_kind": "continuous"}, "needs learn_logvar=True"),
        ({"logvar_kind": "spline"}, "choose one of table, continuous"),
        ({"logvar_kind": "continuous", "learn_logvar": True, "logvar_init": torch.zeros(20)}, "must be one number"),
        ({"loss_type": "l3"}, "loss_type"),
        ({"loss_type": "huber", "huber_c": 0}, "huber_c"),
        ({"l_simple_weight": -1.0}, "l_simple_weight"),
        ({"original_elbo_weight": float("nan")}, "original_elbo_weight"),
        ({"l_simple_weight": 0.0}, "both 0"),
        ({"elbo_weights": "other"}, "elbo_weights"),
        ({"snr_gamma": 0.0}, "snr_gamma"),
        ({"logvar_init": float("inf")}, "logvar_init"),
        ({"logvar_init": torch.zeros(7)}, "logvar_init"),
    ],
)
def test_bad_options_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        DDPMObjective(scheduler(), **options)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("loss_type", ["l2", "huber", "perceptual"])
def test_learned_variances_need_the_bound(variance_type, loss_type):
    with pytest.raises(ValueError, match=f"{variance_type}.*use loss_type='hybrid'"):
        DDPMObjective(scheduler(variance_type=variance_type), loss_type=loss_type)


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_hybrid_moves_the_variance_by_the_bound_and_the_mean_by_l2(name):
    """Its gradient in the mean's channels is that of l2 alone, in the variance's that of the bound alone."""
    owner = scheduler(name, "learned_range")
    output, x0, noise, t = batch(5, 3, 4, 4, dtype=torch.float64)
    both = torch.cat([output, torch.randn_like(output)], 1).requires_grad_()
    got = DDPMObjective(owner, loss_type="hybrid", vlb_weight=0.7)(both, x0, noise, t)
    got.loss.backward()
    plain = output.clone().requires_grad_()
    l2 = DDPMObjective(scheduler(name))(plain, x0, noise, t)
    l2.loss.backward()
    torch.testing.assert_close(both.grad[:, :3], plain.grad, rtol=1e-12, atol=1e-15)
    again = both.detach().clone().requires_grad_()
    bound = DDPMObjective(owner, loss_type="vlb")(again, x0, noise, t)
    bound.loss.backward()
    share = 0.7 / 1000  # hybrid's T / 1000 against T
    torch.testing.assert_close(both.grad[:, 3:], share * again.grad[:, 3:], rtol=1e-12, atol=1e-15)
    assert got.loss.item() == pytest.approx(l2.loss.item() + share * bound.loss.item(), rel=1e-12)
    assert got.loss_bound.item() == pytest.approx(bound.loss.item(), rel=1e-12)
    assert l2.loss_bound is None
    assert torch.equal(got.per_sample_simple, l2.per_sample_simple)


def test_hybrid_is_single_precision_for_half_inputs():
    owner = scheduler("v_prediction", "learned")
    output, x0, noise, t = batch(5, 3, 4, 4)
    both = torch.cat([output, output], 1).bfloat16().requires_grad_()
    got = DDPMObjective(owner, loss_type="hybrid", learn_logvar=True)(both, x0, noise, t)
    assert got.loss.dtype == torch.float32
    got.loss.backward()
    assert bool(torch.isfinite(both.grad).all())


@pytest.mark.parametrize(
    "options",
    [{}, {"learn_logvar": True}, {"loss_weighting": "p2", "original_elbo_weight": 0.3}, {"loss_type": "vlb"}],
)
def test_weights_of_drawn_steps_apply_to_every_mean(options):
    objective = DDPMObjective(scheduler("v_prediction"), **options)
    given = batch(6, 2, 3, 3, dtype=torch.float64)
    weights = torch.linspace(0.2, 3, 6, dtype=torch.float64)
    plain, weighted = objective(*given), objective(*given, weights=weights)
    assert torch.equal(plain.per_sample_loss, weighted.per_sample_loss)
    assert weighted.loss.item() == pytest.approx((weights * plain.per_sample_loss).mean().item(), rel=1e-12)
    assert weighted.loss_simple.item() == pytest.approx((weights * plain.per_sample_simple).mean().item(), rel=1e-12)
    even = objective(*given, weights=torch.ones(6, dtype=torch.float64))
    for name in ("loss", "loss_simple", "loss_vlb", "loss_gamma"):
        assert getattr(even, name).item() == pytest.approx(getattr(plain, name).item(), rel=1e-12)


@pytest.mark.parametrize("weighting", ["soft_min_snr", "p2", "debiased", "elbo", "min_snr"])
def test_weighted_losses_are_one_function_in_all_parameterizations(weighting):
    """One predicted clean sample has the same loss in all parameterizations."""
    _, x0, noise, t = batch(8, 2, 3, 3, dtype=torch.float64)
    guess = x0 + 0.3 * torch.randn_like(x0)
    losses = []
    for name in PREDICTION_TYPES:
        owner = scheduler(name)
        abar = torch.from_numpy(owner.schedule.alphas_cumprod.copy())[t].reshape(-1, 1, 1, 1)
        xt = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        eps = (xt - abar.sqrt() * guess) / (1 - abar).sqrt()
        outputs = {"epsilon": eps, "sample": guess, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * guess}
        losses.append(DDPMObjective(owner, loss_weighting=weighting)(outputs[name], x0, noise, t).per_sample_loss)
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-9, atol=1e-12)


def test_gamma_alone_is_min_snr():
    given = batch(4, 3, 2, 2)
    owner = scheduler("v_prediction")
    alone, named = DDPMObjective(owner, snr_gamma=4.0), DDPMObjective(owner, loss_weighting="min_snr", snr_gamma=4.0)
    assert torch.equal(alone(*given).loss, named(*given).loss)
    usual = DDPMObjective(owner, loss_weighting="min_snr")
    assert torch.equal(usual(*given).loss, DDPMObjective(owner, snr_gamma=5.0)(*given).loss)


def test_weights_that_are_not_finite_are_refused():
    owner = scheduler("v_prediction", rescale_betas_zero_snr=True)
    for weighting in ("min_snr", "soft_min_snr", "p2", "debiased", "elbo"):
        table = DDPMObjective(owner, loss_weighting=weighting).weight_table
        assert np.isfinite(table).all()


def test_perceptual_is_a_share_of_features_of_the_predicted_image():
    def features(prediction: Tensor, image: Tensor) -> Tensor:
        return (prediction.flatten(1).mean(1) - image.flatten(1).mean(1)).abs()

    output, x0, noise, t = batch(4, 3, 2, 2, dtype=torch.float64)
    owner = scheduler("sample")
    got = DDPMObjective(owner, loss_type="perceptual", features=features, perceptual_weight=0.25)(output, x0, noise, t)
    l2 = DDPMObjective(owner)(output, x0, noise, t)
    expected = 0.75 * l2.per_sample_simple + 0.25 * features(output, x0)
    torch.testing.assert_close(got.per_sample_loss, expected, rtol=1e-12, atol=0)
    bad = DDPMObjective(owner, loss_type="perceptual", features=lambda a, b: (a - b).abs())
    with pytest.raises(ValueError, match="features: the distance must return one value per sample"):
        bad(output, x0, noise, t)


def test_continuous_logvar_learns_the_values_of_the_table():
    """At the optimum of the loss both are the log of the mean distance; the function has it for unseen steps too."""
    owner = scheduler("v_prediction", num_train_timesteps=100)
    objective = DDPMObjective(owner, learn_logvar=True, logvar_kind="continuous", logvar_init=0.5)
    assert set(objective.state_dict()) == {
        f"logvar_network.{name}" for name in ("weights", "frequencies", "phases", "centre", "spread")
    }
    torch.testing.assert_close(objective.log_variances(), torch.full((100,), 0.5))
    truth = torch.linspace(1.0, -3.0, 100)
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(800):
        t = torch.randint(0, 100, (64,), generator=generator)
        t = t[(t < 40) | (t >= 50)]  # ten steps are never seen
        distances = torch.exp(truth[t]).sqrt().reshape(-1, 1, 1, 1)
        zero = torch.zeros(len(t), 1, 1, 1)
        output = objective.target(zero, zero, t) + distances
        loss = objective(output, zero, zero, t).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((objective.log_variances().detach() - truth).abs().max()) < 0.25
    assert float((objective.log_variances().detach() - truth).abs().mean()) < 0.08


def test_zero_terminal_snr_with_epsilon_names_the_way_out():
    with pytest.raises(ValueError, match=r"zero terminal SNR.*v_prediction.*rescale_betas_zero_snr=False"):
        DDPMObjective(scheduler(rescale_betas_zero_snr=True))


def test_the_error_for_a_stock_scheduler_names_the_conversion():
    with pytest.raises(ValueError, match=r"DDPMExtScheduler\.from_config"):
        DDPMObjective(SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon")))


def test_prediction_type_may_repeat_the_schedulers():
    assert DDPMObjective(scheduler("v_prediction"), prediction_type="v_prediction").prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_output": torch.zeros(4, 6)}, r"shapes must be equal.*model_output \(4, 6\)"),
        ({"x0": torch.zeros(3, 3)}, "shapes must be equal"),
        ({"noise": torch.zeros(4, 1)}, "shapes must be equal"),
        ({"x0": torch.zeros(4, 3, dtype=torch.uint8)}, "x0 must be a floating tensor"),
        ({"t": torch.tensor(3)}, "one step per sample"),
        ({"t": torch.zeros(3, dtype=torch.long)}, "one step per sample"),
        ({"t": torch.zeros(4, 1, dtype=torch.long)}, "one step per sample"),
        ({"t": torch.zeros(4)}, "integers"),
        ({"t": torch.zeros(4, dtype=torch.bool)}, "integers"),
        ({"t": torch.tensor([0, 1, 2, 20])}, r"\[0, 20\)"),
        ({"t": torch.tensor([0, 1, 2, -1])}, r"\[0, 20\)"),
    ],
)
@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_bad_batches_are_refused(name, change, match):
    good = dict(zip(("model_output", "x0", "noise", "t"), batch(4, 3), strict=True))
    with pytest.raises(ValueError, match=match):
        DDPMObjective(scheduler(name))(**{**good, **change})


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        DDPMObjective(scheduler())(*(tensor[:0] for tensor in batch(4, 3)))
