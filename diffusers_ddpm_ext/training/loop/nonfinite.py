"""What happens when a loss or a gradient is no number: one line, a folder to look into, and the rule of the run.

stop      the run ends, with the older checkpoints as they were
skip      the step is left out: weights, optimizer and average stay, the learning rate and the batches go on
rollback  weights, optimizer and average are those of the newest checkpoint again, and the run goes on with the next
          batch: all that was learned since the checkpoint is undone, its batches are not seen again

The rules are functions of the run's steps: a run that is killed and started again comes to the same weights.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from diffusers_ddpm_ext.errors import ConfigError, RunError, warn
from diffusers_ddpm_ext.plotting.sheets import save_grid
from diffusers_ddpm_ext.training.checkpoints import snapshot as snapshots
from diffusers_ddpm_ext.training.checkpoints.restore import restore_snapshot
from diffusers_ddpm_ext.training.distributed import exit_without_message, fail_together
from diffusers_ddpm_ext.training.loop.resume import find, live
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.training.tracking.step_losses import SampleLoss
from diffusers_ddpm_ext.utils.files import CONFIG

CRASH = "crash"
FOLDERS = 10
"""So many events get a folder of their own; the lines tell of all of them."""

SKIPS_IN_A_ROW = 20
ROLLBACKS_TO_A_CHECKPOINT = 3
PICTURES = 16

Facts = tuple[int, SampleLoss]  # the process, and what it saw


def give_up(run: Run, step: int) -> None:
    """End a run whose losses or gradients are not finite; all processes enter.

    Args:
        run: that broke.
        step: the first such one.

    Raises:
        RunError: in the first process; the others leave silently.
    """
    line = report(run, step)
    if not run.accelerator.is_main_process:
        exit_without_message(1)
    raise RunError(f"{line}; try {advice(run)}, or --on_nonfinite skip")


def recover(run: Run) -> None:
    """Go on after a step that was left out, as the run's rule says; all processes enter.

    Args:
        run: just after the step.

    Raises:
        RunError: it happens again and again; in the first process, the others leave silently.
    """
    line = report(run, run.step)
    rolling = run.config.loop.on_nonfinite == "rollback"
    limit = ROLLBACKS_TO_A_CHECKPOINT if rolling else SKIPS_IN_A_ROW
    run.recoveries += 1
    if run.recoveries > limit:
        if not run.accelerator.is_main_process:
            exit_without_message(1)
        since = "to the same checkpoint" if rolling else "in a row"
        raise RunError(f"{line}, as in {limit} before it {since}; try {advice(run)}")
    went_on = "the step is left out"
    if rolling:
        step = roll_back(run)
        went_on = f"weights, optimizer and average are those of checkpoint-{step} again, the next batch is step"
        went_on += f" {run.step + 1}'s"
    if run.accelerator.is_main_process:
        warn(f"{line}; --on_nonfinite {run.config.loop.on_nonfinite}: {went_on}")


def roll_back(run: Run) -> int:
    """Put everything that learns back to the newest checkpoint; step, batches and learning rate go on.

    Args:
        run: after a step.

    Returns:
        The checkpoint's step.

    Raises:
        RunError: there is none any more, or it is damaged.
    """
    snapshot = None
    with fail_together(run.accelerator):
        if run.accelerator.is_main_process:
            try:
                checkpoint = find(run.taken_folder, "latest")
                assert checkpoint is not None
                snapshot = snapshots.read_snapshot(checkpoint.path)
            except (ConfigError, ValueError) as error:
                raise RunError(f"--on_nonfinite rollback: there is no checkpoint to go back to: {error}") from None
    with fail_together(run.accelerator):
        progress = restore_snapshot(snapshot, live(run))
    for _ in range(run.step - progress.step):
        run.lr_scheduler.step()
    return progress.step


def report(run: Run, step: int) -> str:
    """Say what happened, and leave it in a folder; all processes enter.

    Args:
        run: its meter still knows the step.
        step: that was not finite.

    Returns:
        One line without an end.
    """
    rank, accelerator = run.accelerator.process_index, run.accelerator
    facts: list[Facts] = gather_object([(rank, sample) for sample in run.meter.samples(step)])
    suspects = sorted({sample.timestep for _, sample in facts if not math.isfinite(sample.loss)})
    norms = run.meter.norms(step)
    if suspects:
        losses = [sample.loss for _, sample in facts if not math.isfinite(sample.loss)]
        where = f"timesteps {', '.join(map(str, suspects[:8]))}{', ...' if len(suspects) > 8 else ''}"
        if len(losses) == len(facts):
            where = f"every sample; {where}"
        line = f"step {step}: the loss was {losses[0]} ({where})"
    else:
        first = next((name for name, norm in _by_module(run, norms) if not math.isfinite(norm)), "")
        line = f"step {step}: the gradient was not finite ({first or 'its norm'}), the losses were"
    if accelerator.is_main_process:
        try:
            line += _write(run, step, line, facts, norms)
        except (OSError, RunError) as error:
            warn(f"{run.taken_folder / CRASH} could not be written ({error})")
    return line


def advice(run: Run) -> str:
    """The options to change."""
    optim, precision = run.config.optim, run.accelerator.mixed_precision
    told = f"a lower --learning_rate than {optim.learning_rate:g} or --max_grad_norm than {optim.max_grad_norm:g}"
    if precision != "no":
        told += f", or --mixed_precision {'bf16' if precision == 'fp16' else 'no'}"
    return told


def _by_module(run: Run, norms: Iterable[float]) -> list[tuple[str, float]]:
    """The gradient's norm in each module that has parameters of its own, in the network's order."""
    squares: dict[str, float] = {}
    for (name, _), norm in zip(run.denoiser.named_parameters(), norms, strict=True):
        module = name.rpartition(".")[0]
        squares[module] = squares.get(module, 0.0) + norm * norm
    return [(name, math.sqrt(square) if square >= 0 else square) for name, square in squares.items()]


def _write(run: Run, step: int, line: str, facts: list[Facts], norms: list[float]) -> str:
    """Write the folder of an event; what to add to its line."""
    parent = run.taken_folder / CRASH
    folder = parent / f"step-{step}"
    if not folder.is_dir() and parent.is_dir() and len(list(parent.iterdir())) >= FOLDERS:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    images = run.data.train
    samples = [(rank, sample.image, images.name(sample.image), sample.timestep, sample.loss) for rank, sample in facts]
    _table(folder / "samples.csv", ("process", "image", "name", "timestep", "loss"), samples)
    _table(folder / "gradients.csv", ("module", "norm_before_clipping"), _by_module(run, norms))
    what = {
        "format": 1,
        "step": step,
        "what": line,
        "on_nonfinite": run.config.loop.on_nonfinite,
        "processes": run.plan.processes,
        "precision": run.accelerator.mixed_precision,
        "versions": snapshots.library_versions(),
    }
    (folder / "event.json").write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    run.config.write_resolved(folder / CONFIG)
    # Those whose loss was no number come first: the picture shows them.
    order = sorted(facts, key=lambda fact: math.isfinite(fact[1].loss))
    chosen = torch.tensor([sample.image for _, sample in order[:PICTURES]])
    save_grid(images.pixels(chosen), folder / "inputs.png")
    return f", see {folder}"


def _table(path: Path, header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
