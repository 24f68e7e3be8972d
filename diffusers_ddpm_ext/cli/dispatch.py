"""The command line `ddpm-ext`: the table of commands, and the exit status.

A mistake in the input is one `error:` line and status 2; a run that could not continue is one line and status 1. Any
other exception is a bug of this package and shows its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from diffusers_ddpm_ext._version import __version__
from diffusers_ddpm_ext.errors import ConfigError, RunError, print_error, printable_lines

# command -> its line in --help. `fit-variance` is the function `fit_variance_command(argv) -> str` of cli/fit_variance
COMMANDS = {
    "train": "train a diffusion model on images (with no option: on handwritten digits), save it as a pipeline",
    "sample": "draw images from a saved pipeline",
    "evaluate": "bits per dimension of held-out images, with an interval",
    "fit-variance": "the best reverse variance and the best few steps of a trained network",
    "plot": "schedule, weights, log-variances, bound and chosen steps of a folder, as plots",
    "report": "a run as one page for the browser: curves, samples, schedule, options",
    "push": "upload a folder to the Hugging Face Hub, with a model card and a proof of its files",
    "verify": "check a pushed pipeline: are its files intact, does it draw the images of its card",
    "convert": "original checkpoints (CompVis, OpenAI) to pipelines, and back",
    "convert-config": "a CompVis YAML file to a configuration of `ddpm-ext train`",
    "doctor": "check this machine, this environment or a folder: what is wrong, and how to fix it",
}
USAGE = """usage: ddpm-ext COMMAND [options]

commands:
{commands}

  ddpm-ext COMMAND --help    every option of a command
  ddpm-ext --version
""".format(commands="\n".join(f"  {name:<16} {summary}" for name, summary in COMMANDS.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0; 2 for a mistake in the input; 1 for a run that could not continue; 130 after an interrupt.
    """
    _set_wait_policy()
    try:
        text = printable_lines(_dispatch(list(sys.argv[1:] if argv is None else argv)))
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    except ConfigError as error:
        return _report_error(error, 2)
    except RunError as error:
        return _report_error(error, 1)
    except KeyboardInterrupt:
        return _report_error("interrupted", 130)
    except SystemExit as exit_request:  # argparse, after --help
        return exit_request.code if isinstance(exit_request.code, int) else 0
    return 0


def _set_wait_policy() -> None:
    """Let OpenMP threads that wait for each other sleep, unless the user chose otherwise; torch reads it on import.

    GNU OpenMP's threads spin while they wait. With other programs on the machine, a spinning thread occupies the core
    that the awaited thread needs: small networks then train ten times slower.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _report_error(error: object, status: int) -> int:
    print_error(error)
    return status


def _dispatch(argv: list[str]) -> str:
    """Run the command of a command line; its text for standard output."""
    if argv and argv[0] in ("-h", "--help", "help"):
        return USAGE
    if argv and argv[0] == "--version":
        return f"ddpm-ext {__version__}\n"
    if not argv or argv[0] not in COMMANDS:
        got = f"got {argv[0]!r}: " if argv else ""
        raise ConfigError(f"{got}the commands are {', '.join(COMMANDS)}; see ddpm-ext --help")
    name = argv[0].replace("-", "_")
    command = getattr(import_module(f"diffusers_ddpm_ext.cli.{name}"), f"{name}_command")
    text = command(argv[1:])
    return f"{text}\n" if text else ""
