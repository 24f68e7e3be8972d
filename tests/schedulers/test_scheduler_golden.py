"""Numbers recorded from the original classes: bit-exact tables, the forward process, one step of sampling."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule
from diffusers_ddpm_ext.utils.vocabulary import FROM_COMPVIS_BETA_SCHEDULE, FROM_COMPVIS_PREDICTION_TYPE


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return json.loads((GOLDEN / f"{name}.json").read_text()), dict(arrays)


A, A_ARRAYS = load("a_register_schedule")
B, B_ARRAYS = load("b_forward")
C, C_ARRAYS = load("c_p_sample")


def by_id(group: dict[str, Any]) -> list[Any]:
    return [pytest.param(case, id=case["id"]) for case in group["cases"]]


def schedule_arguments(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The case in the words of `register_schedule`."""
    names = ("beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s")
    arguments = {name: case[name] for name in names if name in case}
    if "given_betas" in case:
        arguments["given_betas"] = arrays[case["given_betas"]]
    return arguments


def registered(case: dict[str, Any], arrays: dict[str, np.ndarray], **kwargs: Any) -> DDPMExtScheduler:
    scheduler = DDPMExtScheduler(
        v_posterior=case.get("v_posterior", 0.0),
        prediction_type=FROM_COMPVIS_PREDICTION_TYPE[case.get("parameterization", "eps")],
        **kwargs,
    )
    scheduler.register_schedule(**schedule_arguments(case, arrays))
    return scheduler


def assert_tables(case: dict[str, Any], tables: list[np.ndarray]) -> None:
    tables = np.stack(tables)
    assert tables.dtype == np.float32
    np.testing.assert_array_equal(tables.astype(np.float64).sum(axis=1), A_ARRAYS[case["sum"]])
    if "full" in case:
        np.testing.assert_array_equal(tables, A_ARRAYS[case["full"]])
    else:
        np.testing.assert_array_equal(tables[:, case["at_index"]], A_ARRAYS[case["at"]])


@pytest.mark.parametrize("case", by_id(A))
def test_tables_of_the_scheduler(case):
    scheduler = registered(case, A_ARRAYS)
    tables = [getattr(scheduler, name) for name in A["buffers"]]
    assert all(table.dtype == torch.float32 and table.device.type == "cpu" for table in tables)
    assert_tables(case, [table.numpy() for table in tables])
    assert len(scheduler) == case["num_timesteps"] == scheduler.config.num_train_timesteps


@pytest.mark.parametrize("case", by_id(A))
def test_tables_of_the_schedule(case):
    given = A_ARRAYS[case["given_betas"]] if "given_betas" in case else None
    schedule = NoiseSchedule(
        case["timesteps"],
        case.get("linear_start", 1e-4),
        case.get("linear_end", 2e-2),
        FROM_COMPVIS_BETA_SCHEDULE[case["beta_schedule"]],
        given,
        cosine_s=case.get("cosine_s", 0.008),
        v_posterior=case["v_posterior"],
        prediction_type=FROM_COMPVIS_PREDICTION_TYPE[case["parameterization"]],
    )
    assert_tables(case, [getattr(schedule, name).astype(np.float32) for name in A["buffers"]])


@pytest.mark.parametrize("case", by_id(A))
def test_tables_after_saving(case, tmp_path):
    """What `register_schedule` wrote into the config is the same schedule for every reader."""
    registered(case, A_ARRAYS).save_pretrained(tmp_path)
    loaded = DDPMExtScheduler.from_pretrained(tmp_path)
    assert_tables(case, [getattr(loaded, name).numpy() for name in A["buffers"]])


@pytest.mark.parametrize("case", by_id(B))
def test_forward_process(case):
    recorded = {name: torch.from_numpy(B_ARRAYS[f"{case['id']}/{name}"]) for name in case["arrays"]}
    scheduler = registered(case, B_ARRAYS)
    x_start, x_t, noise, v, t = (recorded[name] for name in ("x_start", "x_t", "noise", "v", "t"))
    got: dict[str, torch.Tensor] = {
        "q_sample": scheduler.q_sample(x_start, t, noise),
        "x0_from_noise": scheduler.predict_start_from_noise(x_t, t, noise),
        "x0_from_v": scheduler.predict_start_from_z_and_v(x_t, t, v),
        "eps_from_v": scheduler.predict_eps_from_z_and_v(x_t, t, v),
        "get_v": scheduler.get_v(x_start, noise, t),
    }
    got["q_mean"], got["q_var"], got["q_logvar"] = scheduler.q_mean_variance(x_start, t)
    got["post_mean"], got["post_var"], got["post_logvar"] = scheduler.q_posterior(x_start, x_t, t)
    assert set(got) == set(case["arrays"]) - {"x_start", "x_t", "noise", "v", "t"}
    for name, value in got.items():
        assert value.dtype == torch.float32
        value = value.flatten() if value.shape[1:].numel() == 1 else value
        torch.testing.assert_close(value, recorded[name], rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("case", by_id(C))
def test_one_step_of_sampling(case, clip, one_by_one):
    """As one call with a step per sample, and as one call a sample with an int."""
    folder = f"{case['id']}/{'clip' if clip else 'noclip'}"
    x, output, noise, t = (torch.from_numpy(C_ARRAYS[f"{case['id']}/{n}"]) for n in ("x", "model_out", "noise", "t"))
    scheduler = registered(case, C_ARRAYS, clip_sample=clip)
    if one_by_one:
        parts = [
            scheduler.step(output[i : i + 1], int(t[i]), x[i : i + 1], variance_noise=noise[i : i + 1])
            for i in range(len(t))
        ]
        sample = torch.cat([part.prev_sample for part in parts])
        x0 = torch.cat([part.pred_original_sample for part in parts])
    else:
        sample, x0 = scheduler.step(output, t, x, variance_noise=noise, return_dict=False)
    torch.testing.assert_close(sample, torch.from_numpy(C_ARRAYS[f"{folder}/sample"]), rtol=1e-5, atol=1e-5)
    mean, _, log_variance = scheduler.q_posterior(x0, x, t)
    torch.testing.assert_close(mean, torch.from_numpy(C_ARRAYS[f"{folder}/mean"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        log_variance.flatten(), torch.from_numpy(C_ARRAYS[f"{folder}/logvar"]), rtol=1e-5, atol=1e-5
    )
