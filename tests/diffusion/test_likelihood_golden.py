"""Numbers recorded from improved-diffusion's bound: every case but those of mean type PREVIOUS_X."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN

from diffusers_ddpm_ext import DDPMExtScheduler, DDPMObjective
from diffusers_ddpm_ext.diffusion.likelihood import (
    bits_per_dim,
    bound_terms,
    discretized_gaussian_log_likelihood,
    normal_kl,
    prior_bits,
)

CASES = json.loads((GOLDEN / "i_vlb.json").read_text())["cases"]
with np.load(GOLDEN / "i_vlb.npz") as archive:
    ARRAYS = {key: archive[key] for key in archive.files}
BY_ID = {case["id"]: case for case in CASES}
MEANS = {"EPSILON": "epsilon", "START_X": "sample"}
VARIANCES = {name: name.lower() for name in ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE")}


def group(name: str) -> list[Any]:
    chosen = [case for case in CASES if case["group"] == name and case.get("mean_type") != "PREVIOUS_X"]
    return [pytest.param(case, id=case["id"]) for case in chosen]


def arrays(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(ARRAYS[key][row].copy()) for name, (key, row) in case["arrays"].items()}


def openai_betas(name: str, steps: int) -> np.ndarray:
    if name == "linear":
        return np.linspace(0.0001 * 1000 / steps, 0.02 * 1000 / steps, steps)
    cosine = np.cos(np.pi / 2 * (np.linspace(0, 1, steps + 1) + 0.008) / 1.008) ** 2
    return np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)


def scheduler_of(case: dict[str, Any], given: dict[str, torch.Tensor]) -> DDPMExtScheduler:
    betas = given["betas"].numpy() if case["beta_schedule"] == "given" else None
    if betas is None:
        betas = openai_betas(case["beta_schedule"], case["timesteps"])
    return DDPMExtScheduler(
        trained_betas=betas,
        prediction_type=MEANS[case.get("mean_type", "EPSILON")],
        variance_type=VARIANCES[case.get("var_type", "FIXED_SMALL")],
    )


def output_of(given: dict[str, torch.Tensor]) -> torch.Tensor:
    variance = given.get("model_var_out")
    return given["model_mean_out"] if variance is None else torch.cat([given["model_mean_out"], variance], 1)


def near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Equal up to an error scaled by max(1, |theirs|), and not finite where theirs is not."""
    ours, theirs = ours.detach().double(), theirs.double()
    finite = torch.isfinite(theirs)
    assert torch.equal(torch.isfinite(ours), finite)
    off = (ours - theirs)[finite].abs() / theirs[finite].abs().clamp(min=1)
    assert off.numel() == 0 or off.max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", group("likelihood"))
def test_likelihood_of_levels(case, dtype):
    given = arrays(case)
    x, means, log_scales = (given[name].to(dtype) for name in ("x", "means", "log_scales"))
    ours = discretized_gaussian_log_likelihood(x, means, log_scales, decoder="improved_diffusion")
    assert ours.dtype == dtype
    if dtype == torch.float64:
        near(ours, given["log_probs64"], 1e-6)
    likely = given["log_probs"] > np.log(1e-4)
    near(ours[likely], given["log_probs"][likely], 1e-4)


@pytest.mark.parametrize("case", group("normal_kl"))
def test_divergence_of_normal_distributions(case):
    given = arrays(case)
    names = ("mean1", "logvar1", "mean2", "logvar2")
    near(normal_kl(*(given[name].double() for name in names)), given["kl64"], 1e-12)
    near(normal_kl(*(given[name] for name in names)), given["kl"], 1e-5)


@pytest.mark.parametrize("case", group("schedule"))
def test_tables(case):
    schedule = scheduler_of(case, {}).schedule
    recorded = arrays(case)["at"].numpy()
    for name, row in zip(case["rows"], recorded, strict=True):
        table = getattr(schedule, name)
        if name == "posterior_log_variance_clipped":
            table = np.append(table[1:2], table[1:])
        np.testing.assert_allclose(table[case["at_index"]], row, rtol=1e-12)


SPACED = [case for case in group("spaced_schedule") if "arrays" in case.values[0]]  # the others record an error


@pytest.mark.parametrize("case", SPACED)
def test_tables_of_shorter_chains(case):
    """Of the steps that the recorded strings of section counts stand for."""
    given = arrays(case)
    steps = given["timestep_map"].tolist()
    assert steps == BY_ID[case["use_timesteps"]]["use_timesteps"]
    scheduler = DDPMExtScheduler(trained_betas=openai_betas(case["beta_schedule"], case["timesteps"]))
    scheduler.set_timesteps(timesteps=steps[::-1])
    kept = scheduler.kept
    near(torch.from_numpy(kept.betas.copy()), given["betas"], 1e-12)
    near(torch.from_numpy(kept.posterior_variance.copy()), given["posterior_variance"], 1e-12)
    if len(steps) > 1:  # of a chain of one step the recorded code has no next step to take the first from
        own = np.log(np.append(kept.posterior_variance[1], kept.posterior_variance[1:]))
        near(torch.from_numpy(own), given["posterior_log_variance_clipped"], 1e-12)


@pytest.mark.parametrize("case", group("vb_terms"))
def test_terms_of_the_bound(case):
    given, options = arrays(case), {"clip_denoised": case["clip_denoised"], "decoder": "improved_diffusion"}
    scheduler, t = scheduler_of(case, given), given["t"]
    x0, xt, output = (tensor.double() for tensor in (given["x_start"], given["x_t"], output_of(given)))
    exact = bound_terms(scheduler, output, x0, xt, t, **options)
    near(exact.bits, given["output64"], 1e-6)
    ours = bound_terms(scheduler, output_of(given), given["x_start"], given["x_t"], t, **options)
    assert ours.bits.dtype == torch.float32
    good = [item for item in range(8) if item not in (1, 2)]
    near(ours.bits[good], given["output"][good], 1e-5)
    near(ours.pred_x0, given["pred_xstart"], 3e-4)
    near(ours.mean, given["mean"], 1e-5)
    near(ours.log_variance.reshape(given["log_variance"].shape), given["log_variance"], 1e-5)


@pytest.mark.parametrize("case", group("prior_bpd"))
def test_prior(case):
    given = arrays(case)
    scheduler = scheduler_of(case, given)
    near(prior_bits(scheduler, given["x_start"].double()), given["prior_bpd64"], 1e-12)
    near(prior_bits(scheduler, given["x_start"]), given["prior_bpd"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", group("calc_bpd_loop"))
def test_loop_over_a_chain(case, dtype):
    given = arrays(case)
    scheduler = scheduler_of(case, given)
    chain = case.get("timestep_map", list(range(case["timesteps"])))
    if len(chain) < case["timesteps"]:
        scheduler.set_timesteps(timesteps=chain[::-1])
    images = len(given["x_start"])
    outputs = given["model_out"].to(dtype)
    seen = []

    def denoiser(xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.extend(t.tolist())
        rows = [outputs[chain.index(step), row % images] for row, step in enumerate(t.tolist())]
        return torch.stack(rows)

    options = {"clip_denoised": case["clip_denoised"], "decoder": "improved_diffusion", "rows": 7}
    x0, noise = given["x_start"].to(dtype), given["noise"].to(dtype)
    ours = bits_per_dim(denoiser, scheduler, x0, noise=noise, **options)
    suffix, tolerance = ("64", 1e-6) if dtype == torch.float64 else ("", 1e-5)
    near(ours.total, given[f"total_bpd{suffix}"], tolerance)
    near(ours.prior, given[f"prior_bpd{suffix}"], tolerance)
    near(ours.steps.flip(1), given[f"vb{suffix}"], tolerance)
    assert seen == [step for step in chain for _ in range(images)]


@pytest.mark.parametrize("case", group("training_losses"))
def test_training_losses_and_gradients(case):
    """L_simple is ours; the bound next to it, with its gradient."""
    given = arrays(case)
    scheduler, kind = scheduler_of(case, given), case["loss_type"]
    learned, options = case["var_type"].startswith("LEARNED"), {"decoder": "improved_diffusion"}
    for dtype, suffix, tolerance in ((torch.float64, "64", 1e-6), (torch.float32, "", 5e-4)):
        output = output_of(given).to(dtype).requires_grad_()
        x0 = given["x_start"].to(dtype)
        xt = scheduler.add_noise(x0, given["noise"].to(dtype), given["t"])  # recorded in float32 alone
        near(xt, given["x_t"], 1e-5)
        share = 1.0
        if kind in ("MSE", "RESCALED_MSE"):
            mean = output[:, :3]
            target = given["noise"].to(dtype) if case["mean_type"] == "EPSILON" else x0
            loss = mse = ((target - mean) ** 2).flatten(1).mean(1)
            near(mse, given[f"mse{suffix}"], tolerance)
            if learned:
                fixed = torch.cat([mean.detach(), output[:, 3:]], 1)
                share = case["timesteps"] / 1000 if kind == "RESCALED_MSE" else 1.0
                vb = share * bound_terms(scheduler, fixed, x0, xt, given["t"], **options).bits
                near(vb, given[f"vb{suffix}"], tolerance)
                loss = mse + vb
        else:
            share = case["timesteps"] if kind == "RESCALED_KL" else 1.0
            loss = share * bound_terms(scheduler, output, x0, xt, given["t"], **options).bits
        near(loss, given[f"loss{suffix}"], tolerance)
        loss.sum().backward()
        top = given["grad"].flatten(1).abs().amax(1).reshape(-1, 1, 1, 1)
        near(output.grad / top, given["grad"] / top, 1e-3)


BOUND_TRAINED = [
    case
    for case in group("training_losses")
    if case.values[0]["var_type"].startswith("LEARNED") and case.values[0]["loss_type"] in ("MSE", "RESCALED_MSE")
]


@pytest.mark.parametrize("case", BOUND_TRAINED)
def test_the_objective_has_the_same_losses(case):
    """`hybrid` is RESCALED_MSE with learned variances; a weight of 1000 / T makes it MSE."""
    given = arrays(case)
    weight = 1.0 if case["loss_type"] == "RESCALED_MSE" else 1000 / case["timesteps"]
    objective = DDPMObjective(
        scheduler_of(case, given), loss_type="hybrid", vlb_weight=weight, decoder="improved_diffusion"
    )
    output = output_of(given).double().requires_grad_()
    got = objective(output, given["x_start"].double(), given["noise"].double(), given["t"])
    near(got.per_sample_loss, given["loss64"], 1e-6)
    got.per_sample_loss.sum().backward()
    top = given["grad"].flatten(1).abs().amax(1).reshape(-1, 1, 1, 1)
    near(output.grad / top, given["grad"] / top, 1e-3)
