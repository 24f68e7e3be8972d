"""Batches of a run: of images that were loaded before it, or of a stream, whose lanes are in its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object

from diffusers_ddpm_ext.errors import printable, warn
from diffusers_ddpm_ext.training.data.batches import Batch, batch_stream
from diffusers_ddpm_ext.training.data.copy_stream import copied_beside_steps
from diffusers_ddpm_ext.training.data.streaming.batches import BatchLayout, stream_batches
from diffusers_ddpm_ext.training.data.streaming.lanes import LanePlan, LanePosition
from diffusers_ddpm_ext.training.loop.setup import Setup

Lanes = Mapping[int, Sequence[int]]


def open_batches(
    setup: Setup, step: int, lanes: Lanes | None = None, *, layout: BatchLayout | None = None, num_workers: int = 0
) -> Iterator[Batch]:
    """This process's micro-batches from optimizer step ``step`` on.

    Args:
        setup: of the run.
        step: the first one.
        lanes: of a stream, where they are before it; None: at their beginning.
        layout: split of the effective batch; the run's by default.
        num_workers: processes that load images.
    """
    accelerator, data = setup.accelerator, setup.data
    layout = layout or run_layout(setup)
    if data.stream is None:
        batches = batch_stream(
            data.train, setup.seed, layout.batch, layout.accumulation, layout.rank, layout.world, step, num_workers,
            accelerator.device,
        )  # fmt: skip
        return copied_beside_steps(batches, accelerator.device)
    streamed = stream_batches(
        data.stream.decoder(data.train),
        data.stream.plan(layout.effective_batch),
        layout,
        setup.seed,
        start_step=step,
        lanes={number: LanePosition(*position) for number, position in (lanes or {}).items()},
        replaces_bad=data.stream.replaces_bad,
        num_workers=num_workers,
        device=accelerator.device,
    )
    return copied_beside_steps(streamed, accelerator.device)


def run_layout(setup: Setup) -> BatchLayout:
    """Split of a run's effective batch, and this process' part of it."""
    plan, accelerator = setup.plan, setup.accelerator
    return BatchLayout(plan.batch, plan.accumulation, accelerator.process_index, plan.processes)


def stream_state(setup: Setup, lanes: Lanes | None) -> dict[str, Any] | None:
    """State of a run's stream for its checkpoint; None without a stream. Collective call.

    Args:
        setup: of the run.
        lanes: of this process, after the last step; None before the first one.
    """
    stream = setup.data.stream
    if stream is None:
        return None
    plan = stream.plan(setup.plan.effective_batch)
    merged = {number: LanePosition() for number in range(plan.lanes)}
    for own in gather_object([dict(lanes or {})]):
        merged |= {number: LanePosition(*position) for number, position in own.items()}
    positions = [list(merged[number]) for number in range(plan.lanes)]
    return {"parts": plan.parts, "block": plan.block, "lanes": positions}


def restored_lanes(setup: Setup, records: Mapping[str, Any]) -> Lanes | None:
    """Lanes of a checkpoint's stream; None without a stream.

    Where the run now divides its stream in another way, which only `--allow_config_change` permits, it begins anew.

    Raises:
        ValueError: the state is missing, or not one that a run writes.
    """
    stream = setup.data.stream
    if stream is None:
        return None
    state = records.get("stream")
    if not isinstance(state, dict) or not isinstance(state.get("lanes"), list):
        raise ValueError("progress.records.stream is missing")
    for number, position in enumerate(state["lanes"]):
        is_position = isinstance(position, list) and len(position) == len(LanePosition._fields)
        if not is_position or not all(type(value) is int and 0 <= value < 2**62 for value in position):
            raise ValueError(
                f"progress.records.stream.lanes[{number}] is {printable(repr(position), 60)}, not"
                f" {len(LanePosition._fields)} numbers of 0 or more"
            )
    plan = stream.plan(setup.plan.effective_batch)
    own = (plan.lanes, plan.parts, plan.block)
    if (len(state["lanes"]), state.get("parts"), state.get("block")) != own:
        if not setup.config.checkpoint.allow_config_change:
            raise ValueError("progress.records.stream divides the images in another way than this run")
        if setup.accelerator.is_main_process:
            warn("the stream begins anew: its images are divided in another way than in the checkpoint")
        return None
    return {number: tuple(position) for number, position in enumerate(state["lanes"])}


def describe_stream(plan: LanePlan, layout: BatchLayout) -> str:
    """How the processes of a run share its stream, for the printed plan."""
    lanes = f"{plan.lanes} lane{'s' if plan.lanes > 1 else ''}"
    text = f"{lanes} of {plan.block:,} image{'s' if plan.block > 1 else ''} in the buffer"
    if layout.world == 1:
        return text
    shares = [layout.lanes(plan, rank) for rank in range(layout.world)]
    readers = [sum(lane in share for share in shares) for lane in range(plan.lanes)]
    if max(readers) == 1:
        return f"{text}, each read by one of the {layout.world} processes"
    return (
        f"{text}, up to {max(readers)} processes read the same one, since the images are in {plan.parts} part"
        f"{'s' if plan.parts > 1 else ''}: the run is the same, more is read"
    )
