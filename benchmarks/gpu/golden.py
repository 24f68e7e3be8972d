"""Golden numbers on the device: what was recorded from the original classes, and the device's random numbers.

The forward process, one step of sampling and the moving average, in float32 and within 1e-5, as the tests compare them
on a CPU; the words of the counter-based generator must be the same integers as on a CPU.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from common import ROOT, arguments, device, write
from torch import Tensor, nn

from diffusers_ddpm_ext import DDPMExtScheduler
from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.utils import device_random
from diffusers_ddpm_ext.utils.vocabulary import FROM_COMPVIS_PREDICTION_TYPE

GOLDEN = ROOT / "tests" / "golden"
LIMIT = 1e-5
SCHEDULE = ("beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s")


def load(name: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Cases and arrays of a recording."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return json.loads((GOLDEN / f"{name}.json").read_text())["cases"], dict(arrays)


def scheduler_of(case: dict[str, Any], arrays: dict[str, np.ndarray], clip: bool = True) -> DDPMExtScheduler:
    """The scheduler of a case."""
    prediction = FROM_COMPVIS_PREDICTION_TYPE[case.get("parameterization", "eps")]
    scheduler = DDPMExtScheduler(
        v_posterior=case.get("v_posterior", 0.0), prediction_type=prediction, clip_sample=clip
    )
    given = {"given_betas": arrays[case["given_betas"]]} if "given_betas" in case else {}
    scheduler.register_schedule(**{name: case[name] for name in SCHEDULE if name in case}, **given)
    return scheduler


def difference(got: Tensor, want: np.ndarray) -> float:
    """Largest difference, relative where numbers are above 1."""
    expected = torch.from_numpy(want).double()
    return float(((got.cpu().double().reshape(expected.shape) - expected).abs() / expected.abs().clamp(min=1)).max())


def forward_process() -> list[float]:
    """q_sample, the mean of the posterior, and the velocity."""
    cases, arrays = load("b_forward")
    differences = []
    for case in cases:
        record = {name: arrays[f"{case['id']}/{name}"] for name in case["arrays"]}
        x0, xt, noise, t = (torch.from_numpy(record[n]).to(device()) for n in ("x_start", "x_t", "noise", "t"))
        scheduler = scheduler_of(case, arrays)
        got = {"q_sample": scheduler.q_sample(x0, t, noise), "get_v": scheduler.get_v(x0, noise, t)}
        got["post_mean"] = scheduler.q_posterior(x0, xt, t)[0]
        differences += [difference(value, record[name]) for name, value in got.items()]
    return differences


def sampling_steps() -> list[float]:
    """One step of sampling with stored noise."""
    cases, arrays = load("c_p_sample")
    differences = []
    for case in cases:
        x, output, noise, t = (
            torch.from_numpy(arrays[f"{case['id']}/{name}"]).to(device()) for name in ("x", "model_out", "noise", "t")
        )
        for clip in (True, False):
            step = scheduler_of(case, arrays, clip).step(output, t, x, variance_noise=noise)
            differences.append(
                difference(step.prev_sample, arrays[f"{case['id']}/{'clip' if clip else 'noclip'}/sample"])
            )
    return differences


def averages() -> list[float]:
    """The moving average after every update."""
    cases, arrays = load("e_litema")
    differences = []
    for case in cases:
        parameters, shadows = (torch.from_numpy(arrays[f"{case['id']}/{name}"]) for name in ("params", "shadow"))
        module = nn.ParameterDict({"p": nn.Parameter(parameters[0].to(device()))})
        ema = LitEMA(module, case["decay"], case["use_num_updates"])
        for row, shadow in zip(parameters[1:], shadows[1:], strict=True):
            with torch.no_grad():
                module["p"].copy_(row)
            ema.step(module)
            differences.append(difference(ema.shadow["p"], shadow.numpy()))
    return differences


def words_are_equal() -> bool:
    """Whether the device's generator gives the integers that it gives on a CPU."""
    positions = torch.tensor([0, 1, 7, 2**32 - 1])
    there = device_random.random_words(3, 2**33 + 1, positions.to(device()), 257, "noise")
    return all(
        torch.equal(a.cpu(), b)
        for a, b in zip(there, device_random.random_words(3, 2**33 + 1, positions, 257, "noise"), strict=True)
    )


def main() -> None:
    """Write the largest differences."""
    args = arguments(__doc__)
    with torch.no_grad():
        parts = {"q_sample and posterior": forward_process(), "step": sampling_steps()}
    parts["EMA"] = averages()
    largest = {name: max(values) for name, values in parts.items()}
    counts = {name: len(values) for name, values in parts.items()}
    equal = words_are_equal()
    write(args.out, max(largest.values()) < LIMIT and equal, largest=largest, cases=counts, same_random_words=equal)


if __name__ == "__main__":
    main()
