"""Whether an optimizer step is applied, where ``--on_nonfinite`` checks every step: known at once, or on the device.

Where reading is free the verdict is read, and a step that is not finite does nothing. On an accelerator a read would
wait for the whole step. There the verdict stays a number on the device, 1 where the step is skipped: the fused
optimizer leaves weights and moments as they are, the average gets the weight 0, and the losses of a learning sampler
are left out. The host reads the number with the losses, every ``--logging_steps``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.distributed import any_rank, sum_over_ranks
from diffusers_ddpm_ext.training.tracking.step_losses import StepOutput
from diffusers_ddpm_ext.utils.host_reads import reads_are_free


@dataclass(frozen=True)
class Verdict:
    """Whether a step is applied.

    Attributes:
        applied: False where the host knows that it is not; True where it is, or only the device knows.
        skipped: 0-dim, float32, on the device, 1 where the step is not applied; None where the host knows.
    """

    applied: bool = True
    skipped: Tensor | None = None

    def step_average(self, ema: LitEMA, network: nn.Module) -> None:
        """Update an average, unless the step is skipped."""
        if self.skipped is not None:
            ema.step(network, skipped=self.skipped)
        elif self.applied:
            ema.step(network)

    def without_skipped(self, losses: Tensor) -> Tensor:
        """The losses, or NaN where the step is skipped and only the device knows."""
        return losses if self.skipped is None else torch.where(self.skipped > 0, math.nan, losses)


APPLIED = Verdict()


@torch.no_grad()
def judge(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, outputs: Sequence[StepOutput], norms: Tensor
) -> Verdict:
    """The verdict on a step: it is applied if every loss and gradient is finite in all processes. Collective call.

    ``norms``, of the gradients, are ignored under a loss scaler, which skips steps with non-finite gradients itself.
    """
    losses = torch.stack([output.loss.detach() for output in outputs])
    values = losses if accelerator.scaler is not None else torch.cat([losses, norms.to(losses)])
    is_finite = torch.isfinite(values).all()
    if reads_are_free(values.device) or accelerator.scaler is not None or not skips_on_device(optimizer):
        return Verdict(applied=not any_rank(accelerator, not bool(is_finite)))
    return Verdict(skipped=sum_over_ranks(accelerator, 1 - is_finite.float()).clamp(max=1))


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer takes its ``found_inf`` from the device, as torch's fused ones do."""
    return bool(getattr(_unwrapped(optimizer), "_step_supports_amp_scaling", False))


def step_optimizer(accelerator: Accelerator, optimizer: torch.optim.Optimizer, verdict: Verdict) -> None:
    """Update the weights, unless the step is skipped; of a step whose gradients are complete."""
    if accelerator.scaler is not None:
        if verdict.applied:
            optimizer.step()
        else:
            accelerator.scaler.update()  # or it would mistake the next step for this one
        return
    own = _unwrapped(optimizer)  # Accelerate's wrapper searches for a package at every step
    if verdict.skipped is not None:
        own.found_inf = verdict.skipped  # type: ignore[attr-defined]
        try:
            own.step()
        finally:
            del own.found_inf  # type: ignore[attr-defined]
    elif verdict.applied:
        own.step()


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
