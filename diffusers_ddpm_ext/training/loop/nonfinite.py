"""Non-finite losses and gradients: the report, the folder with its facts, and the rule of ``--on_nonfinite``.

stop      the run ends; the older checkpoints stay as they are
skip      the step is skipped: weights, optimizer and average stay, learning rate and batches advance
rollback  weights, optimizer and average are loaded from the newest checkpoint, and the run continues with the next
          batch: everything learned since the checkpoint is undone, its batches are not repeated

The rules are functions of the run's steps: a run that is killed and restarted reaches the same weights.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import nn

from diffusers_ddpm_ext.errors import ConfigError, RunError, warn
from diffusers_ddpm_ext.plotting.sheets import save_grid
from diffusers_ddpm_ext.training.checkpoints.restore import restore_snapshot
from diffusers_ddpm_ext.training.checkpoints.state_file import library_versions
from diffusers_ddpm_ext.training.config.options import OptimOptions
from diffusers_ddpm_ext.training.distributed import exit_without_message, fail_together
from diffusers_ddpm_ext.training.loop.resume import find_checkpoint, read_checkpoint, training_objects
from diffusers_ddpm_ext.training.loop.run import Run
from diffusers_ddpm_ext.training.loop.setup import Setup
from diffusers_ddpm_ext.training.tracking.step_losses import LossMeter, SampleLoss
from diffusers_ddpm_ext.utils.files import CONFIG, write_text_atomically

CRASH_FOLDER = "crash"
MAX_CRASH_FOLDERS = 10  # later events are reported in one line, without a folder
MAX_SKIPS_IN_A_ROW = 20
MAX_ROLLBACKS_TO_A_CHECKPOINT = 3
MAX_IMAGES = 16

RankedSample = tuple[int, SampleLoss]  # rank of the process, and its sample


def stop_nonfinite(run: Run, step: int) -> None:
    """End a run whose losses or gradients are not finite, first at ``step``. Collective call.

    Raises:
        RunError: in the main process; the others exit without a message.
    """
    _fail(run.setup, report_nonfinite(run.setup, run.folder, run.meter, step), ", or --on_nonfinite skip")


def settle(run: Run) -> bool:
    """Follow the rule of the run for the steps since the last call, whose verdicts are read. Collective call.

    On an accelerator, where they are read once in a logging interval, a rollback also undoes the steps after the one
    that was not finite: the run's step is that one again, as if it had been noticed at once.

    Returns:
        Whether the run's present step was applied.

    Raises:
        RunError: the limit of recoveries is reached; in the main process, the others exit without a message.
    """
    progress, rule, applied = run.progress, run.setup.config.loop.on_nonfinite, True
    for step, applied in run.meter.settle():
        if applied:
            if rule != "rollback":
                progress.recoveries = 0
            continue
        if rule == "rollback":
            run.meter.forget_after(step)
            run.logger.progress_bar.update(step - progress.step)
            progress.step = step
        recover(run, step)
        if rule == "rollback":
            break
    return applied


def recover(run: Run, step: int) -> None:
    """Continue after a step that was not applied, by the rule of the run; see `settle`."""
    setup, progress = run.setup, run.progress
    line = report_nonfinite(setup, run.folder, run.meter, step)
    rule = setup.config.loop.on_nonfinite
    limit = MAX_ROLLBACKS_TO_A_CHECKPOINT if rule == "rollback" else MAX_SKIPS_IN_A_ROW
    progress.recoveries += 1
    if progress.recoveries > limit:
        _fail(
            setup, f"{line}, as in {limit} before it {'to the same checkpoint' if rule == 'rollback' else 'in a row'}"
        )
    action = "the step is skipped"
    if rule == "rollback":
        checkpoint = roll_back(setup, run.folder, step)
        action = (
            f"weights, optimizer and average are those of checkpoint-{checkpoint} again, the next batch is step"
            f" {step + 1}'s"
        )
    if setup.accelerator.is_main_process:
        warn(f"{line}; --on_nonfinite {rule}: {action}")


def _fail(setup: Setup, line: str, alternative: str = "") -> NoReturn:
    if not setup.accelerator.is_main_process:
        exit_without_message(1)
    text = advice(setup.config.optim, setup.accelerator.mixed_precision)
    raise RunError(f"{line}; try {text}{alternative}")


def roll_back(setup: Setup, folder: Path, step: int) -> int:
    """Load weights, optimizer and average from the newest checkpoint, and return its step.

    The learning rate stays that of ``step``. A missing or damaged checkpoint is a RunError.
    """
    snapshot = None
    with fail_together(setup.accelerator):
        if setup.accelerator.is_main_process:
            try:
                checkpoint = find_checkpoint(folder, "latest")
                assert checkpoint is not None
                snapshot = read_checkpoint(setup, folder, checkpoint)
            except (ConfigError, ValueError) as error:
                raise RunError(f"--on_nonfinite rollback: there is no checkpoint to go back to: {error}") from None
    with fail_together(setup.accelerator):
        progress = restore_snapshot(snapshot, training_objects(setup))
    for _ in range(step - progress.step):
        setup.lr_scheduler.step()
    return progress.step


def report_nonfinite(setup: Setup, folder: Path, meter: LossMeter, step: int) -> str:
    """One line on a step that was not finite; the main process writes its folder. Collective call."""
    accelerator = setup.accelerator
    own = [(accelerator.process_index, sample) for sample in meter.samples(step)]
    samples: list[RankedSample] = gather_object(own)
    norms = norm_of_modules(setup.trained.network, meter.norms(step))
    line = f"step {step}: {_describe_samples(samples, norms, setup.num_train_timesteps > 1)}"
    if accelerator.is_main_process:
        try:
            line += _write_event(setup, folder / CRASH_FOLDER, step, line, samples, norms)
        except (OSError, RunError) as error:
            warn(f"{folder / CRASH_FOLDER} could not be written ({error})")
    return line


def _describe_samples(samples: list[RankedSample], norms: dict[str, float], has_timesteps: bool) -> str:
    broken = [sample for _, sample in samples if not math.isfinite(sample.loss)]
    if not broken:
        module = next((name for name, norm in norms.items() if not math.isfinite(norm)), "")
        return f"the gradient was not finite ({module or 'its norm'}), the losses were"
    everything, timesteps = len(broken) == len(samples), sorted({sample.timestep for sample in broken})
    where = ["every sample"] if everything else []
    if has_timesteps:
        where.append(f"timesteps {', '.join(map(str, timesteps[:8]))}{', ...' if len(timesteps) > 8 else ''}")
    elif not everything:
        where.append(f"{len(broken)} of {len(samples)} samples")
    return f"the loss was {broken[0].loss} ({'; '.join(where)})"


def advice(options: OptimOptions, precision: str) -> str:
    """The options to change."""
    text = f"a lower --learning_rate than {options.learning_rate:g} or --max_grad_norm than {options.max_grad_norm:g}"
    if precision != "no":
        text += f", or --mixed_precision {'bf16' if precision == 'fp16' else 'no'}"
    return text


def norm_of_modules(network: nn.Module, norms: Iterable[float]) -> dict[str, float]:
    """The gradient's norm in each module that directly holds parameters, from the norms of those, in their order."""
    squares: dict[str, float] = {}
    for (name, _), norm in zip(network.named_parameters(), norms, strict=True):
        module = name.rpartition(".")[0]
        squares[module] = squares.get(module, 0.0) + norm * norm
    return {name: math.sqrt(square) if square >= 0 else square for name, square in squares.items()}


def _write_event(
    setup: Setup, parent: Path, step: int, line: str, samples: list[RankedSample], norms: dict[str, float]
) -> str:
    """Write the folder of an event; returns what to append to its line."""
    folder = parent / f"step-{step}"
    if not folder.is_dir() and parent.is_dir() and len(list(parent.iterdir())) >= MAX_CRASH_FOLDERS:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    images = setup.data.train
    rows = [
        (rank, sample.image, setup.data.name(sample.image), sample.timestep, sample.loss) for rank, sample in samples
    ]
    _write_csv(folder / "samples.csv", ("process", "image", "name", "timestep", "loss"), rows)
    _write_csv(folder / "gradients.csv", ("module", "norm_before_clipping"), norms.items())
    event = {
        "format": 1,
        "step": step,
        "what": line,
        "on_nonfinite": setup.config.loop.on_nonfinite,
        "processes": setup.plan.processes,
        "precision": setup.accelerator.mixed_precision,
        "versions": library_versions(),
    }
    write_text_atomically(folder / "event.json", json.dumps(event, indent=1) + "\n")
    setup.config.write_resolved(folder / CONFIG)
    if setup.data.stream is not None:
        return f", see {folder}"  # what was read is no longer in memory
    # Samples with a non-finite loss come first, so that the image grid shows them.
    order = sorted(samples, key=lambda ranked: math.isfinite(ranked[1].loss))
    chosen = torch.tensor([sample.image for _, sample in order[:MAX_IMAGES]])
    save_grid(images.pixels(chosen), folder / "inputs.png", pixels=setup.pixel_format)
    return f", see {folder}"


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_text_atomically(path, text.getvalue())
