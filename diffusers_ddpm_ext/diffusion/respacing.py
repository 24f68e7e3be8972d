"""Respacing: the training steps that a shorter chain keeps.

Symbols:

    T    steps of the full chain, numbered 0 to T-1        K    steps kept, 1 <= K <= T

Every rule returns K distinct steps in [0, T) or raises: a duplicate, or a step -1, would silently be another chain.
Where Diffusers' own rule is correct, the steps are the same.

Sources: [iDDPM] Nichol & Dhariwal 2021, section 4; [ZTSNR] Lin et al. 2023, table 2 (the names of the spacings).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from diffusers_ddpm_ext.utils.checks import check_one_of, checked_integer, describe

Steps = npt.NDArray[np.int64]

TimestepSpacing = Literal["linspace", "leading", "trailing"]
TIMESTEP_SPACINGS: tuple[TimestepSpacing, ...] = get_args(TimestepSpacing)


def spaced_timesteps(
    num_inference_steps: int,
    num_train_timesteps: int,
    timestep_spacing: TimestepSpacing = "leading",
    steps_offset: int = 0,
) -> Steps:
    """K evenly spaced steps.

    Args:
        num_inference_steps: K, in [1, T].
        num_train_timesteps: T.
        timestep_spacing: ``leading``: multiples of ``T // K``; ``linspace``: from 0 to T-1, both included;
            ``trailing``: down from T-1 in steps of ``T / K``.
        steps_offset: added to the steps of ``leading``; not used by the others.

    Returns:
        int64, (K,), descending.

    Raises:
        ValueError: K is not an integer in [1, T], the spacing is unknown, or the offset moves a step out of [0, T).
    """
    steps: npt.NDArray[Any]
    count, total = checked_integer("num_inference_steps", num_inference_steps), num_train_timesteps
    if not 1 <= count <= total:
        raise ValueError(
            f"num_inference_steps={count} must be in [1, {total}]: a chain cannot keep more steps than the "
            f"num_train_timesteps={total} it was trained with."
        )
    check_one_of("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
    if timestep_spacing == "linspace":
        steps = np.linspace(0, total - 1, count).round()[::-1]
    elif timestep_spacing == "leading":
        first = checked_integer("steps_offset", steps_offset, "an integer of at most T", -total, total)
        steps = np.arange(count)[::-1] * (total // count) + first
    else:
        # Rounding errors of the division can add an element just above 0, which would become step -1: take K.
        steps = np.arange(total, 0, -(total / count))[:count].round() - 1
    if steps[-1] < 0 or steps[0] >= total:
        raise ValueError(
            f"steps_offset={steps_offset} with num_inference_steps={count} gives steps {int(steps[-1])} to "
            f"{int(steps[0])}, outside [0, {total}): use steps_offset=0, fewer steps, or another timestep_spacing."
        )
    return np.ascontiguousarray(steps, dtype=np.int64)


def custom_timesteps(timesteps: Sequence[int] | npt.NDArray[Any], num_train_timesteps: int) -> Steps:
    """Check steps that the caller chose: strictly descending integers in [0, T), at least one.

    Returns:
        int64, (K,), descending.

    Raises:
        ValueError: no steps, not integers, not strictly descending, or outside [0, T).
    """
    if isinstance(timesteps, Sequence) and len(timesteps) > num_train_timesteps:
        raise ValueError(f"timesteps has {len(timesteps)} entries; the chain has {num_train_timesteps} steps.")
    try:
        values = np.asarray(timesteps)
    except (TypeError, ValueError) as error:  # rows of different lengths
        raise ValueError(f"timesteps must be a list of integers, got {describe(timesteps)}.") from error
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"timesteps must be a list of at least one step, got shape {values.shape}.")
    integers = values.dtype.kind in "iu" and not any(isinstance(step, (bool, np.bool_)) for step in timesteps)
    if not integers and not (values.dtype.kind == "f" and (values == np.round(values)).all()):
        raise ValueError(f"timesteps must be integers (whole steps), got {values.tolist()[:4]}.")
    if values.min() < 0 or values.max() >= num_train_timesteps:
        raise ValueError(f"timesteps must be in [0, {num_train_timesteps}), got {values.min()} to {values.max()}.")
    steps = values.astype(np.int64)
    if (np.diff(steps) >= 0).any():
        at = int(np.argmax(np.diff(steps) >= 0))
        raise ValueError(f"timesteps must be strictly descending; {steps[at + 1]} follows {steps[at]}.")
    return steps
