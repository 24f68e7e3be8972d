"""The best checkpoints and early stopping, against a sort of all values."""

from __future__ import annotations

import json
import math
import random

import pytest

from diffusers_ddpm_ext.training.tracking.monitor import Monitor, RankedValue


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_top_is_that_of_the_whole_history(mode, k):
    """Few distinct values, so that ties occur: the earlier of two equal ones ranks first."""
    draw = random.Random(0)
    values = [draw.choice([1.0, 2.0, 3.0, 4.0, math.nan, math.inf, -math.inf]) for _ in range(60)]
    monitor = Monitor("val/loss_simple", mode, save_top_k=k)
    sign = 1 if mode == "min" else -1
    top_steps: set[int] = set()
    for step, value in enumerate(values):
        decision = monitor.update(step, value)
        history = sorted((sign * v, s) for s, v in enumerate(values[: step + 1]) if math.isfinite(v))
        assert [(sign * entry.value, entry.step) for entry in monitor.top] == history[:k]
        assert monitor.best == (RankedValue(history[0][1], sign * history[0][0]) if history else None)
        assert decision.best == (bool(history) and history[0][1] == step)
        assert decision.in_top_k == (step in [s for _, s in history[:k]])
        top_steps |= {step} if decision.in_top_k else set()
        top_steps -= {decision.evicted_step} if decision.evicted_step is not None else set()
        assert top_steps == {entry.step for entry in monitor.top}


def test_patience_counts_validations_without_an_improvement():
    monitor = Monitor("val/loss", patience=2)
    stops = [monitor.update(step, value).stop for step, value in enumerate([3.0, 2.0, 2.0, 1.0, 1.5, 1.0])]
    assert stops == [False, False, False, False, False, True]


def test_min_delta_asks_for_more_but_does_not_hide_the_best():
    monitor = Monitor("val/loss", patience=2, min_delta=0.5)
    decisions = [monitor.update(step, value) for step, value in enumerate([3.0, 2.8, 2.6])]
    assert [decision.stop for decision in decisions] == [False, False, True]
    assert monitor.best == RankedValue(2, 2.6)


def test_small_improvements_add_up():
    """Each step gains less than min_delta, all together more: the reference stays at the last improvement."""
    monitor = Monitor("val/loss", patience=3, min_delta=0.5)
    assert not any(monitor.update(step, 3.0 - 0.2 * step).stop for step in range(12))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_is_never_the_best(value):
    monitor = Monitor("val/loss", "min", patience=1)
    decision = monitor.update(1, value)
    assert (decision.in_top_k, decision.best, decision.stop) == (False, False, True)
    assert monitor.best is None


@pytest.mark.parametrize(("name", "mode"), [("val/loss_simple_ema", "min"), ("val/bpd", "min"), ("val/psnr", "max")])
def test_auto_mode_by_metric_name(name, mode):
    assert Monitor(name).mode == mode


def test_decisions_continue_after_loading_a_state_from_json():
    values = [5.0, 4.0, math.nan, 4.5, 3.0, 3.0, 2.0, 9.0, 9.0, 9.0]
    straight, first = Monitor("a", "min", 2, 3, 0.1), Monitor("a", "min", 2, 3, 0.1)
    for step in range(4):
        straight.update(step, values[step])
        first.update(step, values[step])
    resumed = Monitor("a", "min", 2, 3, 0.1)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(4, 10):
        assert resumed.update(step, values[step]) == straight.update(step, values[step])
    assert resumed.state_dict() == straight.state_dict()


def test_the_state_of_another_metric_is_ignored():
    other = Monitor("b", "min")
    other.update(1, 0.0)
    monitor = Monitor("a", "min")
    monitor.load_state_dict(other.state_dict())
    assert monitor.best is None
    with pytest.raises(ValueError, match="state"):
        monitor.load_state_dict({"name": "a"})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mode": "best"}, "monitor_mode"),
        ({"save_top_k": -1}, "save_top_k"),
        ({"patience": 0}, "early_stopping_patience"),
        ({"min_delta": -1.0}, "early_stopping_min_delta"),
        ({"min_delta": math.nan}, "early_stopping_min_delta"),
    ],
)
def test_invalid_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Monitor("val/loss", **arguments)
