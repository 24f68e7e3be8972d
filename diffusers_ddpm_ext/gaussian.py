"""Documented import path of the Gaussian maths, which `diffusers_ddpm_ext.diffusion.gaussian` holds."""

from diffusers_ddpm_ext.diffusion.gaussian import *  # noqa: F403
