"""Values of a wrong type, size or shape in every argument of the public classes and functions: used, or one sentence.

The values are what configs, notebooks and other libraries hand over: one list for all arguments, read off the
signatures, so that none is left out when one is added.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.draws import draws

from diffusers_ddpm_ext import DDPMExtScheduler, DDPMObjective, LitEMA, NoiseSchedule, gaussian, likelihood, timesteps

VALUES = [
    None, True, False, 0, 1, -1, 2, 3.5, 10**9, 10**400, 1e308, float("nan"), float("inf"), -float("inf"), 1j,
    "", "x", "0.1", "linear", "l2", "v_prediction", b"x", "a\x1b[31m" * 40, [], [1], [0.1, 0.2], ["a"], [None],
    [[0.1]], (0.1, 0.2), set(), {}, {"a": 1}, {"2": [1, 0]}, {"2": "ab"}, {2: [3, 1]}, object(),
    np.float32(0.1), np.float64(0.5), np.int64(3), np.array(0.5), np.array([0.1, 0.2]), np.array([]),
    np.array(["a"]), np.array([True, False]), torch.tensor(0.5), torch.tensor([0.1, 0.2]), torch.zeros(0),
    torch.tensor(float("nan")), torch.tensor(3),
]  # fmt: skip
T = 20
SCHEDULER = DDPMExtScheduler(T)
X, _ = draws(2, 3, 4, 4)


def arguments(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def make_scheduler(**values):
    scheduler = DDPMExtScheduler(**{"num_train_timesteps": T} | values)
    assert json.loads(scheduler.to_json_string())["num_train_timesteps"] == len(scheduler)
    count = min(3, len(scheduler))
    output = torch.cat([X, X], 1) if scheduler.config.variance_type.startswith("learned") else X
    scheduler.set_timesteps(count)
    assert scheduler.step(output, int(scheduler.timesteps[0]), X).prev_sample.isfinite().all()


def set_timesteps(**values):
    count = {} if {"timesteps", "num_inference_steps"} & values.keys() else {"num_inference_steps": 3}
    DDPMExtScheduler(T).set_timesteps(**count | values)


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "DDPMExtScheduler": (make_scheduler, dict.fromkeys(arguments(DDPMExtScheduler.__init__))),
    "register_to_config": (
        DDPMExtScheduler(T).register_to_config,
        dict.fromkeys(arguments(DDPMExtScheduler.__init__)),
    ),
    "register_schedule": (
        DDPMExtScheduler(T).register_schedule,
        dict.fromkeys(arguments(SCHEDULER.register_schedule)),
    ),
    "set_timesteps": (set_timesteps, dict.fromkeys(arguments(SCHEDULER.set_timesteps))),
    "step": (
        SCHEDULER.step,
        {"model_output": X, "timestep": 3, "sample": X, "generator": None, "variance_noise": None},
    ),
    "previous_timestep": (SCHEDULER.previous_timestep, {"timestep": 3}),
    "add_noise": (SCHEDULER.add_noise, {"original_samples": X, "noise": X, "timesteps": 3}),
    "get_velocity": (SCHEDULER.get_velocity, {"sample": X, "noise": X, "timesteps": 3}),
    "q_sample": (SCHEDULER.q_sample, {"x_start": X, "t": 3, "noise": X, "generator": None}),
    "q_posterior": (SCHEDULER.q_posterior, {"x_start": X, "x_t": X, "t": 3}),
    "predict_start_from_noise": (SCHEDULER.predict_start_from_noise, {"x_t": X, "t": 3, "noise": X}),
    "NoiseSchedule": (
        NoiseSchedule,
        {"num_train_timesteps": T} | dict.fromkeys(arguments(NoiseSchedule.__init__)[1:]),
    ),
    "respaced": (SCHEDULER.schedule.respaced, {"timesteps": [3, 1]}),
    "gaussian.q_sample": (gaussian.q_sample, {"schedule": SCHEDULER.schedule, "x0": X, "eps": X, "t": 3}),
    "gaussian.predict_x0": (
        gaussian.predict_x0,
        {"schedule": SCHEDULER, "prediction_type": "v_prediction", "output": X, "xt": X, "t": 3},
    ),
    "make_sampler": (
        timesteps.make_sampler,
        {"name": "log_snr_normal", "schedule": SCHEDULER.schedule, "log_snr_mean": 0.0, "log_snr_std": 2.0},
    ),
    "DDPMObjective": (DDPMObjective, {"scheduler": SCHEDULER} | dict.fromkeys(arguments(DDPMObjective.__init__)[1:])),
    "objective": (DDPMObjective(SCHEDULER), {"model_output": X, "x0": X, "noise": X, "t": 3, "weights": None}),
    "bound_terms": (
        likelihood.bound_terms,
        {"scheduler": SCHEDULER, "model_output": X, "x0": X, "xt": X, "t": 3, "decoder": "exact", "bin_width": 0.1},
    ),
    "bits_per_dim": (
        likelihood.bits_per_dim,
        {"denoiser": lambda x, t: x, "scheduler": SCHEDULER, "x0": X}
        | dict.fromkeys(arguments(likelihood.bits_per_dim)[3:]),
    ),
    "prior_bits": (likelihood.prior_bits, {"scheduler": SCHEDULER, "x0": X}),
    "LitEMA": (LitEMA, {"module": torch.nn.Linear(1, 1), "decay": 0.9, "use_num_updates": True}),
}


@pytest.mark.parametrize(("name", "argument"), [(name, key) for name, (_, usual) in CALLS.items() for key in usual])
def test_a_value_is_used_or_refused_in_one_sentence(name, argument):
    """Warnings are errors here: a value that NumPy or torch only warns of is not accepted, either."""
    call, usual = CALLS[name]
    rest = {key: value for key, value in usual.items() if key != argument and value is not None}
    for value in VALUES:
        try:
            call(**rest | {argument: value})
        except ValueError as error:
            text = str(error)
            assert text.isprintable(), (value, text)
            assert 10 < len(text) < 500, (value, text)
