"""Documented import path of the variational bound, which `diffusers_ddpm_ext.diffusion.likelihood` holds."""

from diffusers_ddpm_ext.diffusion.likelihood import *  # noqa: F403
