"""`ddpm-ext push`: upload a trained folder to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers_ddpm_ext.cli.arguments import check_pipeline_folder
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.push import PushOptions, push
from diffusers_ddpm_ext.hub.upload import check_repo_id

PUSH_DESCRIPTION = """Push a trained folder to the Hugging Face Hub: the pipeline, its images and metrics, a model
card, and a proof that `ddpm-ext verify` checks. After the upload the commit's files are compared with the folder's."""
PUSH_EXAMPLES = """examples:
  ddpm-ext push runs/digits                                as digits, in your own account
  ddpm-ext push runs/digits --hub_model_id me/digits --hub_private_repo --license mit
  ddpm-ext push runs/digits --with_checkpoint              with the newest checkpoint, for --resume_from_hub
  HF_TOKEN=... ddpm-ext push runs/digits                   where `hf auth login` was never called

The same command finishes an upload that was interrupted; where everything is uploaded, it does nothing. A README.md
that you wrote is kept. The token is used and never written anywhere."""


def push_command(argv: Sequence[str]) -> str:
    """Run `ddpm-ext push`: upload a folder, with its newest checkpoint if requested; returns a line with the address.

    Raises:
        ConfigError: an option is wrong, no intact checkpoint exists, or the pipeline cannot be opened.
        RunError: the upload did not succeed; the message holds the command that finishes it.
    """
    options = parse_push_args(argv)
    return push(options, newest_checkpoint(options.folder) if options.with_checkpoint else None)


def parse_push_args(argv: Sequence[str]) -> PushOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(PushOptions, argv, "push", PUSH_EXAMPLES, PUSH_DESCRIPTION)
    check_pipeline_folder(str(options.folder))
    check_repo_id(options.repo_id)
    return options


def newest_checkpoint(folder: Path) -> Path:
    """The folder of a run's newest intact checkpoint.

    Raises:
        ConfigError: none exists.
    """
    from diffusers_ddpm_ext.training.checkpoints.folders import newest

    checkpoint = newest(folder).checkpoint
    if checkpoint is None:
        raise ConfigError(f"--with_checkpoint: {folder} has no intact checkpoint: leave it out")
    return checkpoint.path
