"""Documented import path of timestep samplers, which `diffusers_ddpm_ext.diffusion.timesteps` holds."""

from diffusers_ddpm_ext.diffusion.timesteps import *  # noqa: F403
