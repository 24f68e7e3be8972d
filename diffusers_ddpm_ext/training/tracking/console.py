"""What a run prints while it trains: the progress bar, and one line per validation, checkpoint and resume.

The bar is for terminals. In a file it would be thousands of overwritten lines, so there a plain line replaces it, at
most one in half a minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from tqdm.auto import tqdm

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.training.tracking.monitor import Monitor, MonitorDecision
from diffusers_ddpm_ext.utils.vocabulary import SCORES

SECONDS_BETWEEN_LINES = 30.0


def print_line(text: str) -> None:
    """Print a line to stdout, above the progress bar; only the main process calls this."""
    tqdm.write(printable(text))
    sys.stdout.flush()


def is_terminal() -> bool:
    """Whether stderr, where the progress bar is, is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


@dataclass
class ProgressDisplay:
    """The progress of a run on the terminal, or as plain lines elsewhere; of the main process only.

    Attributes:
        total: steps of the run.
        initial: steps that were done before.
        enabled: whether this is the main process.
        last_line: when the last plain line was printed, on the monotonic clock.
    """

    total: int
    initial: int = 0
    enabled: bool = True
    last_line: float = 0.0

    def __post_init__(self) -> None:
        self.bar = tqdm(
            total=self.total, initial=self.initial, unit="step", disable=not (self.enabled and is_terminal())
        )
        self.last_line = time.monotonic()

    def update(self, steps: int = 1) -> None:
        """Count steps; fewer than 0 where they are repeated."""
        self.bar.update(steps)

    def show(self, step: int, text: str) -> None:
        """Show the last losses after ``step`` steps."""
        self.bar.set_postfix_str(text)
        due = time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES
        if self.enabled and self.bar.disable and (due or step == self.total):
            self.last_line = time.monotonic()
            print_line(f"step {step:,} of {self.total:,}: {text}")

    def close(self) -> None:
        """Close the bar; its last state stays on the terminal."""
        self.bar.close()


def describe_validation(
    step: int, values: Mapping[str, float], monitor: Monitor | None, decision: MonitorDecision | None
) -> str:
    """One line about a validation: the monitored loss, whether it is the best, and the bound.

    Args:
        step: optimizer steps done.
        values: its metrics by name.
        monitor: of the run; without one, or if it follows another metric, the simple loss is shown.
        decision: of the monitor.
    """
    names = [monitor.name] if monitor is not None else []
    names += ["val/loss_simple_ema", "val/loss_simple"]
    name = next((name for name in names if name in values), None)
    parts = [] if name is None else [f"{name} {values[name]:.4g}"]
    if decision is not None and (decision.best or decision.in_top_k):
        parts.append("best" if decision.best else "among the best")
    bound = validation_bound(values)
    if bound is not None:
        parts.append(describe_bound(bound, in_latents="val/latent_bpd" in values))
    parts += describe_scores(values)
    return f"step {step:,}: {', '.join(parts)}"


def describe_scores(values: Mapping[str, float]) -> list[str]:
    """Metrics of samples among those of a validation, each with its interval; the number of samples comes last."""
    texts = []
    for score in (score for scores in SCORES.values() for score in scores):
        for suffix in ("_ema", ""):
            ends = [values.get(f"val/{score}{end}{suffix}") for end in ("", "_low", "_high")]
            if None not in ends:
                texts.append(f"{score} {ends[0]:.4g} ({ends[1]:.4g} to {ends[2]:.4g})")
    return [*texts, f"N = {values['val/num_samples']:,}"] if texts else []


def validation_bound(values: Mapping[str, float]) -> float | None:
    """The bound in bits per dimension among the metrics of a validation, of the average if there is one."""
    names = ("val/bpd_ema", "val/bpd", "val/latent_bpd_ema", "val/latent_bpd")
    return next((values[name] for name in names if name in values), None)


def describe_bound(bits: float, in_latents: bool) -> str:
    """A bound with its unit: of pixels, or of latents, which depends on their first stage and scale."""
    return f"{bits:.2f} bits per latent dimension" if in_latents else f"bpd {bits:.2f}"


def describe_end(seconds: float, monitor: Monitor | None, bound: float | None, in_latents: bool = False) -> str:
    """The closing line of a run: its time in this process, its best validation, and its last bound."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"finished in {hours}:{minutes:02}:{rest:02}"]
    if monitor is not None and monitor.best is not None:
        parts.append(f"best {monitor.name} {monitor.best.value:.4g} at step {monitor.best.step:,}")
    if bound is not None:
        parts.append(describe_bound(bound, in_latents))
    return ", ".join(parts)
