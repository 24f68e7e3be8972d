"""CompVis' names for the forward process: the tables and methods of its ``DDPM`` class.

Shapes: ``x_start, x_t, noise, v`` are (B, ...), floating; ``t`` is (B,), integer, a list, or one for all, on the
chain of all T steps. Results are at least float32. The maths is in `diffusers_ddpm_ext.diffusion.gaussian`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.diffusion import gaussian
from diffusers_ddpm_ext.diffusion.arguments import Generators, check_samples
from diffusers_ddpm_ext.diffusion.gaussian import Steps
from diffusers_ddpm_ext.diffusion.reverse_step import draw_noise, per_sample_timesteps
from diffusers_ddpm_ext.diffusion.schedule import NoiseSchedule


class Float32Table:
    """A table of ``scheduler.schedule`` as a float32 CPU tensor, cast when first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        table = torch.tensor(getattr(scheduler.schedule, self.name), dtype=torch.float32)
        scheduler.__dict__[self.name] = table  # an instance attribute hides this descriptor
        return table


class CompVisAPI:
    """Mixin: CompVis' tables and methods for a class with a `NoiseSchedule`."""

    schedule: NoiseSchedule

    betas = Float32Table()
    alphas = Float32Table()
    alphas_cumprod = Float32Table()
    alphas_cumprod_prev = Float32Table()
    sqrt_alphas_cumprod = Float32Table()
    sqrt_one_minus_alphas_cumprod = Float32Table()
    log_one_minus_alphas_cumprod = Float32Table()
    sqrt_recip_alphas_cumprod = Float32Table()
    sqrt_recipm1_alphas_cumprod = Float32Table()
    posterior_variance = Float32Table()
    posterior_log_variance_clipped = Float32Table()
    posterior_mean_coef1 = Float32Table()
    posterior_mean_coef2 = Float32Table()
    lvlb_weights = Float32Table()

    def clear_cached_tables(self) -> None:
        """Drop the cast tables; called when ``schedule`` is replaced."""
        for name, member in vars(CompVisAPI).items():
            if isinstance(member, Float32Table):
                self.__dict__.pop(name, None)

    def q_sample(self, x_start: Tensor, t: Steps, noise: Tensor | None = None, generator: Generators = None) -> Tensor:
        """Noise ``x_start`` to step t; ``noise`` is drawn from ``generator`` if it is None."""
        check_samples(x_start=x_start)
        noise = draw_noise(x_start, generator) if noise is None else noise
        return gaussian.q_sample(self.schedule, x_start, noise, per_sample_timesteps(t, x_start))

    def q_mean_variance(self, x_start: Tensor, t: Steps) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of x_t given ``x_start``."""
        distribution = gaussian.q_mean_variance(self.schedule, x_start, per_sample_timesteps(t, x_start))
        return distribution.mean, distribution.variance, distribution.log_variance

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Steps) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of x_{t-1} given ``x_start`` and ``x_t``."""
        distribution = gaussian.posterior(self.schedule, x_start, x_t, per_sample_timesteps(t, x_start))
        return distribution.mean, distribution.variance, distribution.log_variance

    def predict_start_from_noise(self, x_t: Tensor, t: Steps, noise: Tensor) -> Tensor:
        """x0 from x_t and the noise in it."""
        return gaussian.x0_from_eps(self.schedule, x_t, noise, per_sample_timesteps(t, x_t))

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Steps, v: Tensor) -> Tensor:
        """x0 from x_t and its velocity."""
        return gaussian.x0_from_v(self.schedule, x_t, v, per_sample_timesteps(t, x_t))

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Steps, v: Tensor) -> Tensor:
        """The noise in x_t from its velocity."""
        return gaussian.eps_from_v(self.schedule, x_t, v, per_sample_timesteps(t, x_t))

    def get_v(self, x: Tensor, noise: Tensor, t: Steps) -> Tensor:
        """The velocity of x0 = ``x`` and ``noise``."""
        return gaussian.velocity(self.schedule, x, noise, per_sample_timesteps(t, x))
