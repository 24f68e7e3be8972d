"""The command line `ddpm-ext`: the table of commands, and the exit status.

A mistake in the input is one `error:` line and status 2; a run that could not continue is one line and status 1;
`failures` has the others. Any other exception is a bug of this package and shows its traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

from diffusers_ddpm_ext._version import __version__
from diffusers_ddpm_ext.cli.failures import describe_failure
from diffusers_ddpm_ext.cli.process import tune_process
from diffusers_ddpm_ext.errors import ConfigError, print_error, print_lines, printable
from diffusers_ddpm_ext.utils.next_command import next_command

# command -> its line in --help. `fit-variance` is the function `fit_variance_command(argv) -> str` of cli/fit_variance
COMMANDS = {
    "train": "train a diffusion model on images (with no option: on handwritten digits), save it as a pipeline",
    "train-vae": "train a first stage on images: the autoencoder whose latents `train --vae` learns to draw",
    "sample": "draw images from a saved pipeline",
    "data": "what a folder of images or a dataset holds: sizes, values, classes, duplicates, and the flags that fit",
    "evaluate": "bits per dimension of held-out images, or metrics of samples (--metrics), with intervals",
    "fit-variance": "the best reverse variance and the best few steps of a trained network",
    "fit-steps": "the few steps of a sampler whose samples are closest to those of many steps",
    "plot": "schedule, weights, log-variances, bound and chosen steps of a folder, as plots",
    "report": "a run as one page for the browser: curves, samples, schedule, options",
    "push": "upload a folder to the Hugging Face Hub, with a model card and a proof of its files",
    "verify": "check a pushed pipeline: are its files intact, does it draw the images of its card",
    "convert": "original checkpoints (CompVis, OpenAI) to pipelines, and back",
    "convert-config": "a CompVis YAML file to a configuration of `ddpm-ext train`",
    "doctor": "check this machine, this environment or a folder: what is wrong, and how to fix it",
}
SYNONYMS = {"generate": "sample", "inference": "sample", "upload": "push", "fit": "fit-variance", "check": "doctor"}
USAGE = """usage: ddpm-ext COMMAND [options]

commands:
{commands}

  ddpm-ext COMMAND --help    every option of a command
  ddpm-ext --version

exit status: 0; 2 for a mistake in the input; 1 for a run that could not continue; 130 after an interrupt
""".format(commands="\n".join(f"  {name:<16} {summary}" for name, summary in COMMANDS.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0; 2 for a mistake in the input; 1 for a run that could not continue; 130 after an interrupt;
        141 if the output was closed, as by ``| head``.
    """
    tune_process()
    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        print_lines(_dispatch(list(sys.argv[1:] if argv is None else argv)))
    except SystemExit as exit_request:  # argparse, after --help
        code = exit_request.code
        return code if isinstance(code, int) else 0 if code is None else _report_error(code, 1)
    except (Exception, KeyboardInterrupt) as error:
        failure = describe_failure(error)
        if failure is None:
            raise
        if isinstance(error, OSError) and error.filename is None:  # of a write, maybe to standard output
            _discard_output()
        return _report_error(*failure)
    return 0


def _discard_output() -> None:
    """Let what is still to be written go nowhere: Python flushes at its exit."""
    with suppress(OSError, ValueError):  # not a file, in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_error(error: object, status: int) -> int:
    with suppress(OSError, AttributeError):  # standard error is closed, too
        print_error(error)
    return status


def _dispatch(argv: list[str]) -> str:
    """Run the command of a command line; its text for standard output."""
    if not argv or argv[0] in ("-h", "--help") or argv == ["help"]:
        return USAGE
    if argv[0] in ("-V", "--version", "version"):
        return f"ddpm-ext {__version__}\n"
    if argv[0] == "help":
        argv = [argv[1], "--help"]
    if argv[0] not in COMMANDS:
        raise _unknown_command(argv[0])
    _check_system()
    _check_current_folder()
    name = argv[0].replace("-", "_")
    command = getattr(import_module(f"diffusers_ddpm_ext.cli.{name}"), f"{name}_command")
    text = command(argv[1:])
    return f"{text}\n" if text else ""


def _check_system() -> None:
    """Refuse to run where folders cannot be locked, which is Windows without its Linux."""
    if find_spec("fcntl") is None:
        raise ConfigError(f"{sys.platform} is not supported, since it has no fcntl to lock folders with: use WSL 2")


def _check_current_folder() -> None:
    """Refuse to start in a folder that was deleted, where no relative path means anything."""
    try:
        os.getcwd()
    except OSError:
        raise ConfigError("the current folder does not exist any more: change to another one") from None


def _unknown_command(word: str) -> ConfigError:
    """The error for a word that is not a command: the nearest one, or the command that takes such a file."""
    shown, known = printable(word, 100), "ddpm-ext --help lists the commands"
    if word.startswith("-"):
        return ConfigError(f"{shown} stands before the command: ddpm-ext COMMAND [options]; {known}")
    if os.path.isdir(word):
        return ConfigError(f"{shown} is a folder: ddpm-ext sample {shown}, or another command; {known}")
    command = next_command(word)
    if command:
        return ConfigError(f"{shown} is not a command{command}")
    name = word.lower().replace("_", "-")
    near = [SYNONYMS[name]] if name in SYNONYMS else difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return ConfigError(f"{shown} is not a command: {hint}; {known}" if near else f"{shown} is not a command: {hint}")
