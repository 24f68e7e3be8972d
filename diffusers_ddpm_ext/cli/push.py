"""`ddpm-ext push`: upload a trained folder to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers_ddpm_ext.cli.arguments import check_pipeline_folder
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.push import PushOptions, check_repo_id, push
from diffusers_ddpm_ext.hub.upload import HUB_TIMEOUT, check_timeout
from diffusers_ddpm_ext.training.config.flags import Parser

HEAD = """Push a trained folder to the Hugging Face Hub: the pipeline, its pictures and numbers, a model card, and a
proof that `ddpm-ext verify` checks. After the upload the commit's files are compared with those of the folder."""
TAIL = """examples:
  ddpm-ext push runs/digits                                as digits, in your own account
  ddpm-ext push runs/digits --hub_model_id me/digits --hub_private_repo --license mit
  ddpm-ext push runs/digits --with_checkpoint              with the newest checkpoint: --resume_from_hub goes on there
  HF_TOKEN=... ddpm-ext push runs/digits                   where `hf auth login` was never called

The same line again finishes an upload that was cut off; where nothing is left to be done, it does nothing. A README.md
of your own is kept. The token is used and never written anywhere."""


def push_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    return push_folder(parse_push_args(argv))


def parse_push_args(argv: Sequence[str], prog: str = "ddpm-ext push") -> PushOptions:
    """The options of a command line, checked; arguments and errors are those of `Parser.parse_checked`."""
    parser = Parser(prog=prog, usage=f"{prog} FOLDER [options]", description=HEAD, epilog=TAIL)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="Output folder of a run, or a saved pipeline.")
    add("--hub_model_id", metavar="ID", help="Name of the repository, or user/name (default: the folder's name).")
    add("--hub_token", metavar="TOKEN", help="Of the Hub (default: HF_TOKEN, or what `hf auth login` has left).")
    add("--hub_private_repo", "--private", action="store_true", help="A repository that is made new is private.")
    add("--with_checkpoint", action="store_true", help="The newest checkpoint goes along, so that training can go on.")
    add("--license", metavar="NAME", help="Of the weights, in the card, e.g. mit, cc-by-4.0 (default: not said).")
    add("--commit_message", default="Upload by ddpm-ext", metavar="TEXT", help="(default: Upload by ddpm-ext)")
    add("--no_images", dest="draws", action="store_false", help="Draw no images for the card and for `verify`.")
    add(
        "--timeout",
        type=float,
        default=HUB_TIMEOUT,
        metavar="SECONDS",
        help=f"How long the Hub may stay silent (default: {HUB_TIMEOUT:g}).",
    )
    given = parser.parse_checked(argv)
    folder = check_pipeline_folder(given["folder"])
    given["hub_model_id"] = check_repo_id(given["hub_model_id"] or folder.resolve().name)
    check_timeout(given["timeout"])
    return PushOptions(**given | {"folder": folder})


def push_folder(options: PushOptions) -> str:
    """Upload a folder, with its newest checkpoint where the options ask for it.

    Args:
        options: from `parse_push_args`.

    Returns:
        One line that says what is where.

    Raises:
        ConfigError: there is no whole checkpoint to upload, or the pipeline cannot be opened.
        RunError: the upload did not succeed; its sentence holds the line that finishes it.
    """
    return push(options, newest_checkpoint(options.folder) if options.with_checkpoint else None)


def newest_checkpoint(folder: Path) -> Path:
    """The folder of a run's newest whole checkpoint.

    Raises:
        ConfigError: there is none.
    """
    from diffusers_ddpm_ext.training.checkpoints.folders import newest

    found = newest(folder).checkpoint
    if found is None:
        raise ConfigError(f"--with_checkpoint: {folder} holds no checkpoint that is whole: leave it out")
    return found.path
