"""The micro-batches of a run, which follow its step when that goes back."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers_ddpm_ext.training.data.batches import Batch
from diffusers_ddpm_ext.training.loop.batches import Lanes, open_batches
from diffusers_ddpm_ext.training.loop.run import Run


class RunBatches(Iterator[Batch]):
    """This process's micro-batches from the run's present step on.

    Args:
        run: whose progress has the lanes of its stream after the last step.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._may_repeat = run.setup.config.loop.on_nonfinite == "rollback"
        self._lanes: dict[int, Lanes | None] = {}  # after the steps that may be repeated
        self._open()

    def _open(self) -> None:
        setup, progress = self._run.setup, self._run.progress
        self._step, self._newest = progress.step, progress.lanes
        workers = setup.config.data.dataloader_num_workers
        self._batches = open_batches(setup, progress.step, progress.lanes, num_workers=workers)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if batch.lanes is not None:
            self._newest = batch.lanes
        return batch

    def note_lanes(self) -> None:
        """Record in the progress where the lanes are after its step, whose micro-batches were taken."""
        progress = self._run.progress
        self._step = progress.step
        progress.lanes = self._newest
        if self._may_repeat:
            self._lanes[progress.step] = self._newest

    def rewind(self) -> bool:
        """Continue after the run's step; whether it is an earlier one than that of the micro-batches taken last."""
        progress = self._run.progress
        goes_back = progress.step != self._step
        if goes_back:
            progress.lanes = self._lanes[progress.step]
            self._open()
        self._lanes.clear()
        return goes_back
