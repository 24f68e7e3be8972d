"""`ddpm-ext train`: train a diffusion model on images."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.cli.imports import garbage_collector_paused
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.checks import tracker_names
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_train_args

SECONDS_BEFORE_EXIT = 5  # a process that exits at once makes the launcher end the main process before it reports


def train_command(argv: Sequence[str]) -> str:
    """Parse the command line and train; returns nothing to print, since the run prints its progress.

    Args:
        argv: the arguments after the command.

    Raises:
        ConfigError: an option, the data or a missing package; raised on the main process alone.
        RunError: the run could not continue.
    """
    return run_training_command(argv, parse_train_args)


def run_training_command(argv: Sequence[str], parse: Callable[[Sequence[str]], TrainConfig]) -> str:
    """`train_command` for any command that trains, by the function that parses its options."""
    from diffusers_ddpm_ext.training.signals import die_with_parent, was_launched

    if was_launched():
        die_with_parent()  # before the imports, which take seconds
    main_process = os.environ.get("RANK", "0") == "0"
    try:
        config = _configure(argv, parse, main_process)
    except ConfigError:
        if main_process:
            raise
        time.sleep(SECONDS_BEFORE_EXIT)  # every process finds the same mistake, the main process reports it
        raise SystemExit(2) from None
    with garbage_collector_paused():
        from diffusers_ddpm_ext.training.trainer import train

    train(config)
    return ""


def _configure(argv: Sequence[str], parse: Callable[[Sequence[str]], TrainConfig], main_process: bool) -> TrainConfig:
    """The checked configuration, its packages installed and its output folder free."""
    if not {"-h", "--help"} & {*argv}:
        require_modules(TRAIN_MODULES)
    config = parse(argv)
    if main_process:  # it creates the folder; a process that looks later may see it in use
        from diffusers_ddpm_ext.training.checkpoints.identity import check_resume
        from diffusers_ddpm_ext.training.checkpoints.output_dir import check_output_dir

        check_output_dir(config.output, config.resumes)
        check_resume(config)
        from diffusers_ddpm_ext.training.data.early_checks import check_input_files

        check_input_files(config)
    require_modules({"sklearn": "scikit-learn"} if config.on_digits else {})
    require_modules({"datasets": "datasets"} if config.data.dataset_name else {}, "hub-datasets")
    require_modules({"transformers": "transformers"} if config.perceptual_model else {}, "perceptual")
    report_to = config.output.report_to
    for tracker in tracker_names(report_to):
        if tracker != "all" and find_spec(tracker) is None:
            raise ConfigError(f"--report_to {report_to}: {tracker} is not installed: install it, or use none")
    return config
