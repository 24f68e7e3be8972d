"""Timesteps of one's own for any Diffusers scheduler, also for a class whose ``set_timesteps`` takes none.

Such a class gets the chain of these steps alone as its training chain, with betas of its own, and uses all of it: its
steps are then numbered 0 to K-1, and the network gets the numbers of the training chain ([iDDPM] section 4). A class
for which this is another sampler is refused: one that evaluates between the steps, or repeats one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diffusers_ddpm_ext.diffusion.respacing import custom_timesteps
from diffusers_ddpm_ext.schedulers.adapter import MIN_TERMINAL_ABAR, SchedulerAdapter
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler


def with_timesteps(
    adapter: SchedulerAdapter, timesteps: Sequence[int], device: torch.device | str | None = None
) -> SchedulerAdapter:
    """Set the timesteps of an adapter's scheduler.

    Args:
        adapter: whose scheduler is changed, or replaced in the result.
        timesteps: of the training chain, descending, (K,).
        device: of the scheduler's timesteps.

    Returns:
        The adapter to step with.

    Raises:
        ValueError: the timesteps are not strictly descending or not of the training chain, or the class cannot use
            them; the message names those that can.
    """
    steps = custom_timesteps(timesteps, len(adapter.trained))
    if "timesteps" in inspect.signature(adapter.scheduler.set_timesteps).parameters:
        adapter.scheduler.set_timesteps(timesteps=steps.tolist(), device=device)
        return adapter
    respaced = _on_chain_of(adapter, steps[::-1], device)
    if respaced is None:
        names = ", ".join(scheduler_names_with_timesteps(adapter.trained))
        raise ValueError(f"timesteps is given, but {type(adapter.scheduler).__name__} takes none: use one of {names}.")
    return respaced


def scheduler_names_with_timesteps(trained: DDPMExtScheduler) -> list[str]:
    """Names of the compatible classes that `with_timesteps` can set."""
    names = []
    for kind in trained.compatibles:
        takes = "timesteps" in inspect.signature(kind.set_timesteps).parameters
        if not takes and _takes_betas(kind):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of NumPy about Diffusers' code
                adapter = SchedulerAdapter(kind.from_config(trained.config), trained, "epsilon", uses_variance=False)
                takes = _on_chain_of(adapter, np.arange(2), None) is not None
        if takes:
            names.append(kind.__name__)
    return sorted(names)


def _takes_betas(kind: type) -> bool:
    """Whether a class takes any betas; the placeholder of a class whose packages are missing does not."""
    return "trained_betas" in inspect.signature(kind.__init__).parameters  # type: ignore[misc]


def _on_chain_of(adapter: SchedulerAdapter, steps: Any, device: torch.device | str | None) -> SchedulerAdapter | None:
    """The adapter with a scheduler of the chain of ``steps``, ascending; None where the class would do otherwise."""
    scheduler, count = adapter.scheduler, len(steps)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or not _takes_betas(type(scheduler)):
        return None
    abar = np.maximum(adapter.trained.schedule.alphas_cumprod[steps], 0 if table[-1] == 0 else MIN_TERMINAL_ABAR)
    changes = {
        "num_train_timesteps": count,
        "trained_betas": (1 - abar / np.append(1.0, abar[:-1])).tolist(),
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
    respaced = type(scheduler).from_config(scheduler.config, **changes)
    try:
        respaced.set_timesteps(count, device=device)
    except (ValueError, IndexError, ZeroDivisionError):  # of a class that needs longer chains
        return None
    sigmas = getattr(respaced, "sigmas", None)
    ends_clean = sigmas is None or float(sigmas[-1]) == 0
    if respaced.timesteps.tolist() != list(range(count))[::-1] or not ends_clean:
        return None
    if getattr(scheduler, "final_alpha_cumprod", None) is not None:
        respaced.final_alpha_cumprod = scheduler.final_alpha_cumprod  # that of the training chain
    return replace(adapter, scheduler=respaced, kept=tuple(steps.tolist()))
