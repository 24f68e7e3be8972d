"""Attention of a run on a CPU: Diffusers' processor, or the faster one of this package, as in the checkpoint."""

from __future__ import annotations

from diffusers_ddpm_ext.models.fast_attention import use_fast_attention
from diffusers_ddpm_ext.training.loop.run import RunProgress
from diffusers_ddpm_ext.training.loop.setup import Setup


def settle_attention(setup: Setup, progress: RunProgress) -> None:
    """Choose the attention of a run, in place. A checkpoint of an earlier version goes on with Diffusers'.

    Args:
        setup: of the run.
        progress: whose ``fast_attention`` is that of the checkpoint, and becomes that of the run.
    """
    wanted = setup.config.loop.fast_attention == "auto" and progress.fast_attention is not False
    on_cpu = setup.accelerator.device.type == "cpu"
    progress.fast_attention = wanted and on_cpu and use_fast_attention(setup.trained.network) > 0
