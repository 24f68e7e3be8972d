"""Configuration of a training run, merged from recipe, file and command line, checked, and written as YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.checks import check_data_options, check_options
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.flags import Parser
from diffusers_ddpm_ext.training.config.latent_options import (
    LATENT_WIDTHS,
    LatentOptions,
    check_latent_options,
    latent_defaults,
)
from diffusers_ddpm_ext.training.config.layers import (
    OptionLayer,
    convert_options,
    explain_unknown,
    read_config,
    read_recipe,
    recipes,
    replaced_options,
)
from diffusers_ddpm_ext.training.config.option_table import TRAIN, OptionTable
from diffusers_ddpm_ext.training.config.options import (
    OPTIONS,
    CheckpointOptions,
    EmaOptions,
    HubOptions,
    LoopOptions,
    ModelOptions,
    MonitorOptions,
    ObjectiveOptions,
    OptimOptions,
    OutputOptions,
    ScheduleOptions,
    StartOptions,
    ValidationOptions,
)
from diffusers_ddpm_ext.training.config.streaming_checks import streaming_defaults
from diffusers_ddpm_ext.training.config.text_options import TextOptions, check_text_options, text_defaults
from diffusers_ddpm_ext.utils.files import write_text_atomically
from diffusers_ddpm_ext.utils.lr_lambdas import WITHOUT_WARMUP
from diffusers_ddpm_ext.utils.option import option, options_of
from diffusers_ddpm_ext.utils.yaml_io import dump_options

ConfigType = TypeVar("ConfigType", bound="TrainConfig")

# Not part of a written configuration: a run that repeats it must not overwrite the first one.
NOT_WRITTEN = (
    "output_dir", "overwrite_output_dir", "dry_run", "resume_from_checkpoint", "allow_config_change", "hub_token",
    "resume_from_hub",
)  # fmt: skip

TRAIN_DESCRIPTION = """Train a diffusion model on images, and save it as a pipeline for Diffusers.

Without a data option it trains on the 1,797 handwritten digits that ship with scikit-learn: nothing is downloaded, and
the settings are those of the recipe `digits`. Flags are those of Diffusers' train_unconditional.py, or CompVis' names
where Diffusers has none."""
TRAIN_EXAMPLES = """first commands:
  ddpm-ext train                                          the digits, about two minutes on two cores
  ddpm-ext sample runs/digits --num_images 64             draw from the trained pipeline
  ddpm-ext train --train_data_dir photos --dry_run        the plan of a run on your own folder
  ddpm-ext train --train_data_dir photos --resolution 32 --block_out_channels 64 128 128 --prediction_type v_prediction
  ddpm-ext train --config run.yaml --learning_rate 5e-5   options from a file, overridden by the command line
  accelerate launch training/train.py ...                 the same, from a clone, on all configured devices

Every run writes its options to config.yaml in its folder, a file for --config. A switch --x takes true or false, and
--no_x is --x false. Lists are separated by spaces: --block_out_channels 64 128."""


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run, by section; each field of a section is the flag of the same name.

    `parse_train_args` and `TrainConfig.from_flat` return checked configurations.
    """

    table: ClassVar[OptionTable] = TRAIN
    folder_suffix: ClassVar[str] = ""
    data: DataOptions = field(default_factory=DataOptions)
    latents: LatentOptions = field(default_factory=LatentOptions)
    text: TextOptions = field(default_factory=TextOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    start: StartOptions = field(default_factory=StartOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    monitoring: MonitorOptions = field(default_factory=MonitorOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    hub: HubOptions = field(default_factory=HubOptions)

    @classmethod
    def from_flat(cls, options: Mapping[str, Any]) -> TrainConfig:
        """Create a checked configuration from options by name, as in a YAML file.

        Args:
            options: flag names without dashes, and values; others have their default (on the digits, the recipe's).

        Raises:
            ConfigError: an unknown name, a wrong type, a value out of range, or a contradiction.
        """
        return cls.resolve([convert_options(options, table=cls.table)], typed=set())

    @classmethod
    def resolve(cls, layers: Sequence[OptionLayer], typed: set[str]) -> Self:
        """Merge and check the layers of options, the last of which counts; ``typed`` are those on the command line.

        Raises:
            ConfigError: a contradiction.
        """
        explicit = {name: value for layer in layers for name, value in layer.options.items()}
        if explicit.get("train_data_dir") is None and explicit.get("dataset_name") is None:
            layers = [cls.digits_layer(), *layers]
        flat = {name: option.default for name, option in cls.table.options.items()}
        for layer in layers:
            flat |= replaced_options(layer) | layer.options
        flat |= cls.derived_defaults(flat, explicit)
        cls.check(flat, typed)
        by_section: dict[str, dict[str, Any]] = {section: {} for section in cls.table.sections}
        for name, declared in cls.table.options.items():
            by_section[declared.section][name] = flat[name]
        sections: dict[str, Any] = {name: cls.table.sections[name](**values) for name, values in by_section.items()}
        return cls(**sections)

    @classmethod
    def digits_layer(cls) -> OptionLayer:
        """The options of a run without a data option."""
        return read_recipe("digits")

    @classmethod
    def derived_defaults(cls, flat: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that depend on other options, for options that are not set explicitly."""
        derived = latent_defaults(flat, explicit) | text_defaults(flat, explicit) | streaming_defaults(flat, explicit)
        return derived | _derived_defaults({**flat, **derived}, explicit)

    @classmethod
    def check(cls, flat: Mapping[str, Any], typed: set[str]) -> None:
        """Check all options against each other; a ConfigError for the first contradiction."""
        check_text_options(flat, typed)
        check_options(flat, typed)
        check_latent_options(flat, typed)

    @property
    def perceptual_model(self) -> str | None:
        """Backbone of the perceptual loss; None for another loss."""
        return self.objective.perceptual_model if self.objective.loss_type == "perceptual" else None

    @property
    def resumes(self) -> bool:
        """Whether the run may resume in an existing folder."""
        return self.checkpoint.resume_from_checkpoint is not None or self.hub.resume_from_hub is not None

    @property
    def on_digits(self) -> bool:
        """Whether the run trains on scikit-learn's digits."""
        return self.data.train_data_dir is None and self.data.dataset_name is None

    def to_flat_dict(self) -> dict[str, Any]:
        """Return every option by name, for trackers and YAML: tuples as lists."""
        named = [(name, option) for name, option in self.table.options.items() if name != "hub_token"]
        flat = {name: getattr(getattr(self, option.section), name) for name, option in named}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def write_resolved(self, path: str | os.PathLike[str]) -> None:
        """Write every option, by section, to a YAML file for `--config`; the output folder is left out."""
        flat = self.to_flat_dict()
        command = f"ddpm-ext {self.table.command} --config THIS_FILE [--output_dir FOLDER]"
        lines = [f"# Every option of this run. To repeat it: {command}\n"]
        for section in self.table.sections:
            declared = self.table.options.items()
            names = [name for name, o in declared if o.section == section and name not in NOT_WRITTEN]
            lines.append(dump_options({section: {n: flat[n] for n in names}}))
        write_text_atomically(path, "".join(lines))


def parse_train_args(argv: Sequence[str]) -> TrainConfig:
    """Parse the arguments of `ddpm-ext train` into a checked configuration, without importing torch or diffusers.

    The command line overrides the file of `--config`, which overrides the recipe `digits` (used without a data
    option), which overrides the defaults.

    Raises:
        ConfigError: an option is invalid; one sentence with the way out.
        SystemExit: `--help` was requested.
    """
    examples = f"{TRAIN_EXAMPLES}\n\nrecipes for --config: {', '.join(recipes())}"
    return parse_run_args(TrainConfig, argv, TRAIN_DESCRIPTION, examples)


def parse_run_args(cls: type[ConfigType], argv: Sequence[str], description: str, examples: str) -> ConfigType:
    """Parse the arguments of a command that trains into a checked configuration.

    Args:
        cls: whose table has the options.
        argv: the arguments after the command.
        description: text above the options in ``--help``.
        examples: text under them.

    Raises:
        ConfigError: an option is invalid; one sentence with the way out.
        SystemExit: `--help` was requested.
    """
    table = cls.table
    parser = Parser(usage=f"ddpm-ext {table.command} [options]", description=description, epilog=examples)
    parser.add_options([options_of(_ConfigFile)["config"]])
    for section, declared in table.sections.items():
        options = [each for each in table.options.values() if each.section == section]
        parser.add_options(options, section, declared.__doc__, negatable=True)
    typed = parser.parse_values(argv, explain=lambda name: explain_unknown(name, table))
    file = typed.pop("config", None)
    layers = [] if file is None else [read_config(file, table)]
    return cls.resolve([*layers, OptionLayer("the command line", typed)], typed=set(typed))


def data_options(file: Path | None, typed: Mapping[str, Any], defaults: Mapping[str, Any]) -> DataOptions:
    """Return the checked data options of a command that reads the images of a run.

    Args:
        file: ``config.yaml`` of the run, if there is one.
        typed: options of the section ``data`` from the command line, converted; they override the file.
        defaults: options that apply if neither has them.

    Raises:
        ConfigError: the file or an option is invalid.
    """
    flat = {name: option.default for name, option in OPTIONS.items()} | dict(defaults)
    layers = [] if file is None else [read_config(str(file))]
    for layer in (*layers, OptionLayer("the command line", dict(typed))):
        flat |= replaced_options(layer) | {
            n: value for n, value in layer.options.items() if OPTIONS[n].section == "data"
        }
    for name in ("dataset_weights", "class_balance"):
        if typed.get(name):
            raise ConfigError(f"--{name} has no effect on a measurement, which takes each image once: leave it out")
    flat["dataset_weights"] = None  # the run's; the measurement may be of one source of its mixture
    if not flat["streaming"] and "class_names" not in typed:
        flat["class_names"] = None  # of the run's stream
    flat |= streaming_defaults(flat, typed)
    check_data_options(flat)
    return DataOptions(**{name: flat[name] for name, option in OPTIONS.items() if option.section == "data"})


@dataclass(frozen=True)
class _ConfigFile:
    config: str | None = option(None, "YAML file of options, or the name of a recipe.", metavar="FILE", path=True)


def _derived_defaults(flat: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that depend on other options, for options that are not set explicitly."""
    derived: dict[str, Any] = {}
    if flat["caption_column"] is not None and flat["conditioning_key"] is None:
        derived["conditioning_key"] = "crossattn"
    if flat["trained_betas"] is not None and "num_train_timesteps" not in explicit:
        derived["num_train_timesteps"] = len(flat["trained_betas"])
    if flat["loss_type"] == "vlb" and "learn_logvar" not in explicit:
        derived["learn_logvar"] = False  # the recipe `digits` learns it, but the bound does not use it
    steps = derived.get("num_train_timesteps", flat["num_train_timesteps"])
    if "ddpm_num_inference_steps" not in explicit:
        derived["ddpm_num_inference_steps"] = min(flat["ddpm_num_inference_steps"], steps)
    if "lr_warmup_steps" not in explicit and flat["lr_scheduler"] in WITHOUT_WARMUP:
        derived["lr_warmup_steps"] = 0
    widths = flat["block_out_channels"]
    if (
        flat["vae"] is not None
        and widths == OPTIONS["block_out_channels"].default
        and not explicit.get("block_out_channels")
    ):
        derived["block_out_channels"] = widths = LATENT_WIDTHS
    if widths and flat["attention_levels"] is None:
        derived["attention_levels"] = (max(len(widths) - 2, 0),)
    return derived
