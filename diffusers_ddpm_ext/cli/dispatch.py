"""The command line, `ddpm-ext`: every command is a module of its own, imported when it is called.

A user's mistake is one `error:` line and status 2; a run that could not go on is one line and status 1. Anything else
that goes wrong is ours, and shows its traceback.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from diffusers_ddpm_ext._version import __version__
from diffusers_ddpm_ext.errors import ConfigError, RunError

if TYPE_CHECKING:
    from diffusers_ddpm_ext.training.config.train_config import TrainConfig

USAGE = """usage: ddpm-ext COMMAND [options]

commands:
  train            train a diffusion model on images (with no option: on handwritten digits), save it as a pipeline
  sample           draw images from a saved pipeline
  evaluate         bits per dimension of held-out images, with an interval
  fit-variance     the best reverse variance and the best few steps of a trained network
  plot             schedule, weights, log-variances, bound and chosen steps of a folder, as pictures
  report           a run as one page for the browser: curves, samples, schedule, options
  push             a folder to the Hugging Face Hub, with a model card and a proof of what was pushed
  verify           a pushed pipeline: are its files whole, does it draw what its card shows
  convert          original checkpoints (CompVis, OpenAI) to pipelines, and back
  convert-config   a CompVis YAML file to a configuration of `ddpm-ext train`
  doctor           this machine and environment, or a folder: what is wrong, and what to do about it

  ddpm-ext COMMAND --help    every option of a command
  ddpm-ext --version
"""
# module -> distribution, what every training run needs beyond the base install
TRAIN_MODULES = {"accelerate": "accelerate", "matplotlib": "matplotlib", "yaml": "PyYAML"}
SECONDS_TO_SPEAK = 5  # a process that exits at once would have the launcher end the one that tells
EXTRA = "pip install diffusers-ddpm-ext[train]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0; 2 for a mistake of the user's; 1 for a run that could not go on; 130 for an interrupt.
    """
    _share_cores()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        _tell(error)
        return 2
    except RunError as error:
        _tell(error)
        return 1
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except SystemExit as stop:  # argparse, after --help
        return stop.code if isinstance(stop.code, int) else 0


def _share_cores() -> None:
    """Let threads that wait for each other sleep, where nobody has said otherwise; torch reads this when it loads.

    GNU OpenMP's threads spin while they wait. With anything else at work on the machine a spinning thread keeps the
    core that the awaited one needs: small networks then train ten times slower.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _tell(error: object) -> None:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "sample": _sample,
        "convert": _convert,
        "convert-config": _convert_config,
        "evaluate": _evaluate,
        "fit-variance": _fit_variance,
        "plot": _plot,
        "report": _report,
        "doctor": _doctor,
        "push": _push,
        "verify": _verify,
    }
    if argv and argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
    elif argv and argv[0] == "--version":
        sys.stdout.write(f"ddpm-ext {__version__}\n")
    elif argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        got = f"got {argv[0]!r}: " if argv else ""
        raise ConfigError(f"{got}the commands are {', '.join(commands)}; see ddpm-ext --help")
    return 0


def _train(argv: list[str]) -> None:
    from diffusers_ddpm_ext.training.signals import die_with_parent, was_launched

    if was_launched():
        die_with_parent()  # before the imports, which take seconds
    try:
        config = _configure(argv)
    except ConfigError:
        if os.environ.get("RANK", "0") != "0":  # every process of a run finds the same mistake: the first one tells
            time.sleep(SECONDS_TO_SPEAK)
            raise SystemExit(2) from None
        raise
    from diffusers_ddpm_ext.training.trainer import train

    train(config)


def _configure(argv: list[str]) -> TrainConfig:
    from diffusers_ddpm_ext.training.checkpoints.output_dir import check_output_dir
    from diffusers_ddpm_ext.training.config.checks import tracker_names
    from diffusers_ddpm_ext.training.config.train_config import parse_train_args

    if not {"-h", "--help"} & {*argv}:
        _need(TRAIN_MODULES)
    config = parse_train_args(argv)
    if os.environ.get("RANK", "0") == "0":  # the main process creates the folder; a later one may find it in use
        check_output_dir(config.output, config.resumes)
    _need({"sklearn": "scikit-learn"} if config.on_digits else {})
    _need({"datasets": "datasets"} if config.data.dataset_name else {})
    told = config.output.report_to
    for tracker in [] if config.loop.dry_run else tracker_names(told):
        if tracker != "all" and find_spec(tracker) is None:
            raise ConfigError(f"--report_to {told}: {tracker} is not installed: install it, or say --report_to none")
    return config


def _need(modules: dict[str, str]) -> None:
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"this command needs {', '.join(missing)}: {EXTRA}")


def _sample(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.sample_options import parse_sample_args

    options = parse_sample_args(argv)  # before anything heavy
    from diffusers_ddpm_ext.cli.sample import sample

    _say(sample(options))


def _convert(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.convert import convert, parse_convert_args

    sys.stdout.write(convert(parse_convert_args(argv)) + "\n")


def _convert_config(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.convert_config import convert_config, parse_convert_config_args

    sys.stdout.write(convert_config(parse_convert_config_args(argv)) + "\n")


def _evaluate(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.evaluate import evaluate, parse_evaluate_args

    options = parse_evaluate_args(argv)
    _need({**TRAIN_MODULES, "scipy": "scipy"})
    _say(evaluate(options))


def _fit_variance(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.fit_variance import fit_variance, parse_fit_args

    options = parse_fit_args(argv)
    _need(TRAIN_MODULES)
    _say(fit_variance(options))


def _plot(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.plot import parse_plot_args, plot

    options = parse_plot_args(argv)
    _need(TRAIN_MODULES)
    _say(plot(options))


def _report(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.report import parse_report_args, report

    options = parse_report_args(argv)
    _need(TRAIN_MODULES)
    _say(report(options))


def _doctor(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.doctor import doctor, parse_doctor_args

    doctor(parse_doctor_args(argv))


def _push(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.push import parse_push_args, push_folder

    _say(push_folder(parse_push_args(argv)))


def _verify(argv: list[str]) -> None:
    from diffusers_ddpm_ext.cli.verify import parse_verify_args, verify

    _say(verify(parse_verify_args(argv)))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n" if text else "")


if __name__ == "__main__":
    sys.exit(main())
