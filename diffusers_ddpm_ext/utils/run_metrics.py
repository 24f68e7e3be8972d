"""Reading ``metrics.jsonl`` of a run of any length, in bounded memory: newest and least values, and curves to plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import exists, file_name, iter_json_rows

MAX_POINTS = 2**15
MAX_STEP = 2**63


@dataclass
class MetricCurve:
    """Values of one metric over the steps, not one of them non-finite.

    A curve of up to 32,768 values is exact. A longer one has the means of 2, 4, 8, ... successive values, at the last
    step of each.

    Attributes:
        steps: optimizer steps, (n,).
        values: at these steps, (n,).
        stride: how many successive values one value is the mean of.
    """

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    stride: int = 1
    _pending: list[float] = field(default_factory=list)

    def append(self, step: float, value: float) -> None:
        """Add the next value; a non-finite one is left out."""
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) < self.stride:
            return
        self.steps.append(step)
        self.values.append(_mean(self._pending))
        self._pending.clear()
        if len(self.values) > MAX_POINTS:
            self.stride *= 2
            pairs = len(self.values) // 2 * 2
            self._pending = self.values[pairs:] * (self.stride // 2)
            self.values = [_mean(self.values[i : i + 2]) for i in range(0, pairs, 2)]
            self.steps = self.steps[1:pairs:2]


@dataclass
class RunMetrics:
    """What the rows of a run's metrics state.

    Attributes:
        last: newest value of each metric, and of ``step``.
        least: smallest value of each metric, and the first step that has it.
        most: largest value of each metric, and the first step that has it.
        curves: each metric over the steps.
        problem: what of the file could not be read, as a sentence, or empty; the rest is from the rows before.
    """

    last: dict[str, float] = field(default_factory=dict)
    least: dict[str, tuple[float, int]] = field(default_factory=dict)
    most: dict[str, tuple[float, int]] = field(default_factory=dict)
    curves: dict[str, MetricCurve] = field(default_factory=dict)
    problem: str = ""


def read_metrics(path: Path, names: Sequence[str]) -> RunMetrics:
    """Read some metrics of a run; a missing file has none. An incomplete last row, being written, is left out.

    Args:
        path: of ``metrics.jsonl``.
        names: the metrics to read; others are ignored.
    """
    metrics = RunMetrics()
    if not exists(path):
        return metrics
    number = 0
    try:
        for row in iter_json_rows(path):
            number += 1
            _add_row(metrics, row, names, f"{file_name(path)}, row {number:,}")
    except ConfigError as error:
        metrics.problem = str(error)
    return metrics


def _add_row(metrics: RunMetrics, row: Mapping[str, Any], names: Sequence[str], name: str) -> None:
    found = {key: row[key] for key in ("step", *names) if key in row}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name}: {key} is {printable(repr(value), 60)}, not a number.")
    if not found:
        return
    if "step" not in found or not 0 <= found["step"] < MAX_STEP:
        raise ConfigError(f"{name}: step is {found.get('step', 'missing')}; it must be 0 or more, and less than 2^63.")
    metrics.last |= found
    step = float(found.pop("step"))
    for key, value in found.items():
        metrics.curves.setdefault(key, MetricCurve()).append(step, float(value))
        if math.isfinite(value):
            if key not in metrics.least or value < metrics.least[key][0]:
                metrics.least[key] = (value, int(step))
            if key not in metrics.most or value > metrics.most[key][0]:
                metrics.most[key] = (value, int(step))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(value / len(values) for value in values)  # the sum of two large floats may overflow
