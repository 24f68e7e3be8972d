"""CompVis' learning-rate lambdas against recorded values and the shapes that their definitions promise."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from helpers.paths import TESTS

from diffusers_ddpm_ext.utils import lr_lambdas
from diffusers_ddpm_ext.utils.lr_lambdas import (
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
)

CASES = json.loads((TESTS / "golden/f_lr_lambda.json").read_text())["cases"]
LISTS = {"warm_up_steps": [3, 2], "f_min": [0.1, 0.05], "f_max": [1.0, 0.5], "f_start": [0.0, 0.2]}
CYCLES = {**LISTS, "cycle_lengths": [10, 5]}


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_recorded_values_and_the_last_one_past_the_end(case):
    """A text among the recorded values is the exception that the original raises past the last cycle."""
    f = getattr(lr_lambdas, case["cls"])(**case["kwargs"])
    recorded = list(zip(case["steps"], case["values"], strict=True))
    for step, value in recorded:
        if isinstance(value, str):
            value = case["kwargs"]["f_min"][-1]
            assert step > sum(case["kwargs"]["cycle_lengths"])
        assert f(step) == pytest.approx(value, rel=1e-12, abs=1e-12)
        assert f.schedule(step) == f(step)


def test_golden_group_reaches_past_the_last_cycle():
    assert sum(isinstance(value, str) for case in CASES for value in case["values"]) >= 10


@pytest.mark.parametrize("cls", [LambdaWarmUpCosineScheduler2, LambdaLinearScheduler])
def test_last_value_holds_even_where_the_last_cycle_is_all_warm_up(cls):
    """A cycle shorter than its warm-up ends on the ramp; that value, not f_min, is the last one."""
    f = cls(warm_up_steps=[10], f_min=[0.0], f_max=[1.0], f_start=[0.0], cycle_lengths=[5])
    assert f(5) == pytest.approx(0.5)
    assert f(6) == f(10**9) == f(5)


def test_border_step_belongs_to_the_earlier_cycle():
    f = LambdaWarmUpCosineScheduler2(**CYCLES)
    assert f(10) == pytest.approx(0.1)
    assert f(11) == pytest.approx(0.2 + (0.5 - 0.2) / 2)


def test_linear_never_reaches_its_maximum():
    f = LambdaLinearScheduler(**CYCLES)
    assert f(3) == pytest.approx(0.1 + 0.9 * 7 / 10)
    assert max(f(n) for n in range(20)) < 1.0


@pytest.mark.parametrize("cls", [LambdaWarmUpCosineScheduler2, LambdaLinearScheduler])
def test_cycle_that_is_exactly_its_warm_up_has_no_division_by_zero(cls):
    f = cls(warm_up_steps=[4], f_min=[0.0], f_max=[1.0], f_start=[0.0], cycle_lengths=[4])
    assert 0 <= f(4) <= 1
    single = LambdaWarmUpCosineScheduler(4, 0.0, 1.0, 0.0, 4)
    assert [single(3), single(4), single(5)] == pytest.approx([0.75, 1.0, 0.0])


def test_positional_order_is_compvis():
    assert LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 0.01, 100)(0) == pytest.approx(0.01)
    assert LambdaLinearScheduler([10], [0.1], [1.0], [0.01], [100])(0) == pytest.approx(0.01)


def test_drives_torchs_lambda_lr():
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, LambdaWarmUpCosineScheduler2(**CYCLES))
    seen = []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    f = LambdaWarmUpCosineScheduler2(**CYCLES)
    assert seen == pytest.approx([2.0 * f(n) for n in range(20)])
    scheduler.load_state_dict(scheduler.state_dict())


def test_verbosity_goes_to_the_log_and_not_to_the_screen(caplog, capsys):
    f = LambdaLinearScheduler(**CYCLES, verbosity_interval=5)
    with caplog.at_level(logging.INFO, logger="diffusers_ddpm_ext.utils.lr_lambdas"):
        for n in range(11):
            f(n)
    assert [record.args[0] for record in caplog.records] == [0, 5, 10]
    assert capsys.readouterr().out == ""
    caplog.clear()
    LambdaLinearScheduler(**CYCLES)(0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"f_max": [1.0]}, "f_max"),
        ({"cycle_lengths": [10, 5, 5]}, "cycle_lengths"),
        ({"cycle_lengths": [10, 0]}, "cycle_lengths"),
        ({"warm_up_steps": [-1, 2]}, "warm_up_steps"),
        ({"f_start": ["1e-6", 0.0]}, "f_start"),
        ({"f_min": [float("nan"), 0.0]}, "f_min"),
        ({"f_min": 0.1}, "f_min"),
        ({"f_min": []}, "f_min"),
        ({"verbosity_interval": -1}, "verbosity_interval"),
    ],
)
@pytest.mark.parametrize("cls", [LambdaWarmUpCosineScheduler2, LambdaLinearScheduler])
def test_bad_lists_are_refused_by_name(cls, change, name):
    with pytest.raises(ValueError, match=name):
        cls(**{**CYCLES, **change})


@pytest.mark.parametrize(
    ("change", "name"),
    [({"max_decay_steps": 5}, "max_decay_steps"), ({"lr_min": "0"}, "lr_min"), ({"warm_up_steps": -1}, "warm_up")],
)
def test_bad_numbers_are_refused_by_name(change, name):
    good = {"warm_up_steps": 10, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 0.0, "max_decay_steps": 100}
    with pytest.raises(ValueError, match=name):
        LambdaWarmUpCosineScheduler(**{**good, **change})


def test_imports_no_torch():
    heavy = {"torch", "diffusers", "numpy"}
    code = f"import sys, diffusers_ddpm_ext.utils.lr_lambdas; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TESTS.parent)
