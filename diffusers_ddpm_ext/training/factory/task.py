"""The denoising task: one module of everything with gradients: denoiser, objective with log-variances, text encoder.

``Accelerator.prepare`` receives this module, so that data-parallel training averages the gradient of logvar too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.diffusion.gaussian import q_sample
from diffusers_ddpm_ext.diffusion.timesteps import TimestepSampler
from diffusers_ddpm_ext.losses.objective import DDPMObjective, ObjectiveOutput
from diffusers_ddpm_ext.models.conditioning import Conditioning, Conditions
from diffusers_ddpm_ext.training.data.caption_encoder import CaptionEncoder


class DenoisingTask(nn.Module):
    """Noises clean samples, denoises them and computes the loss.

    Args:
        denoiser: a network called as ``denoiser(xt, t)`` whose output has ``.sample``, as UNet2DModel's has.
        objective: the loss, with its noise schedule.
        conditioning: how conditions reach the denoiser; by default unconditional.
        sampler: of the timesteps; a submodule, so that its statistics are part of the task's state.
        captions: encodes captions; its network is a submodule if it is trained.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        objective: DDPMObjective,
        conditioning: Conditioning | None = None,
        sampler: TimestepSampler | None = None,
        captions: CaptionEncoder | None = None,
    ) -> None:
        super().__init__()
        self.conditioning = conditioning or Conditioning()
        self.denoiser = denoiser
        self.objective = objective
        self.timestep_sampler = sampler
        self.captions = captions
        self.text_encoder = captions.module if captions is not None and captions.is_trained else None

    def forward(
        self, x0: Tensor, noise: Tensor, t: Tensor, conditions: Conditions | None = None, weights: Tensor | None = None
    ) -> ObjectiveOutput:
        """The training terms of one micro-batch, in float32.

        Only the network runs under a surrounding autocast: in bfloat16 the smallest noise levels would round to zero.

        Args:
            x0: clean samples, (B, ...), float32, data units.
            noise: standard normal, same shape.
            t: steps, (B,), integer.
            conditions: of the samples, exactly those that ``conditioning`` needs; captions in place of their tokens.
            weights: of the samples' steps, (B,); None where they are drawn uniformly.
        """
        with torch.autocast(x0.device.type, enabled=False):
            xt = q_sample(self.objective.schedule, x0.float(), noise.float(), t)
        output = self.predict(xt, t, conditions or Conditions())
        with torch.autocast(x0.device.type, enabled=False):
            return self.objective(output.float(), x0.float(), noise.float(), t, weights)

    def predict(self, xt: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The network's output for noisy samples, (B, C or 2C, ...), in its precision; see `forward`."""
        if self.captions is not None:
            conditions = self.captions.encode_conditions(conditions)
        inputs, named = self.conditioning(xt, conditions)
        output: Tensor = self.denoiser(inputs, t, **named).sample
        return output
