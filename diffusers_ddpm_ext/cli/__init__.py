"""The command line, `ddpm-ext`: one module per command, each imported when it is called."""

from diffusers_ddpm_ext.cli.dispatch import main

__all__ = ["main"]
