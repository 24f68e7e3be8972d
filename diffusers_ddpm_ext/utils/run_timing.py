"""Reading ``timing.jsonl`` of a run: how long it trained, and how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import exists, file_name, iter_json_rows

TIMING = "timing.jsonl"


@dataclass(frozen=True)
class RunTiming:
    """Time of a run, without validation, images and files.

    Attributes:
        steps: optimizer steps whose time is known.
        seconds: that these steps took, of all processes of the run that followed each other.
        problem: what of the file could not be read, as a sentence, or empty.
    """

    steps: float = 0.0
    seconds: float = 0.0
    problem: str = ""

    @property
    def steps_per_second(self) -> float | None:
        """The mean; None where no step was timed."""
        return self.steps / self.seconds if self.seconds > 0 else None


def read_timing(path: Path) -> RunTiming:
    """Read the time of a run; a missing file has none.

    A resumed run counts its seconds from 0 again; its rows state the step that it began after (``start_step``). In
    files of earlier versions, whose rows do not, a process begins where the seconds fall.
    """
    if not exists(path):
        return RunTiming()
    last_step, last_seconds, start, steps, seconds = 0.0, 0.0, 0.0, 0.0, 0.0
    try:
        for number, row in enumerate(iter_json_rows(path), 1):
            step, now, began = (
                _number(row.get(key, unless), f"{file_name(path)}, row {number:,}: {key}")
                for key, unless in (("step", None), ("seconds", None), ("start_step", start))
            )
            if began != start:
                last_step, last_seconds, start = began, 0.0, began
            since = now - last_seconds if now >= last_seconds else now
            steps, seconds = steps + max(step - last_step, 0.0), seconds + since
            last_step, last_seconds = step, now
    except ConfigError as error:
        return RunTiming(steps, seconds, str(error))
    return RunTiming(steps, seconds)


def format_duration(seconds: float) -> str:
    """Seconds as a reader says them: ``48 s``, ``12 min``, ``3 h 20 min``, ``2 days 4 h``."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


def _number(value: object, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{label} is {printable(repr(value), 60)}, not a number of 0 or more.")
    return float(value)
