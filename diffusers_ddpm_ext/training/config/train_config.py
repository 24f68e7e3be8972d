"""The configuration of a run: recipe, file and command line laid over each other, checked, and written down again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.checks import MODEL_SIZES, check_data_options, check_options
from diffusers_ddpm_ext.training.config.flags import Parser
from diffusers_ddpm_ext.training.config.foreign_flags import answer
from diffusers_ddpm_ext.training.config.options import (
    CANONICAL_NAMES,
    OPTIONS,
    SECTIONS,
    CheckpointOptions,
    DataOptions,
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
from diffusers_ddpm_ext.utils.lr_lambdas import WITHOUT_WARMUP
from diffusers_ddpm_ext.utils.option import option, options_of
from diffusers_ddpm_ext.utils.option_values import convert_value, unknown_option
from diffusers_ddpm_ext.utils.yaml_io import dump_options, load_options

# Ways to say the same thing. One source (file, command line) gives at most one; it replaces what the others said.
ALTERNATIVES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("num_epochs",), ("max_train_steps",)),
    (("train_data_dir",), ("dataset_name",)),
    (("validation_fraction",), ("validation_split",), ("validation_data_dir",)),
    (("model_config_name_or_path",), ("model_config",), MODEL_SIZES),
    (("save_images_epochs",), ("save_images_steps",)),
    (("resume_from_checkpoint",), ("resume_from_hub",)),
)
FOLLOWERS = {"dataset_name": ("dataset_config_name", "image_column")}  # set aside with their leader
# A written configuration says what a run is, not where it went: repeating it must not write over the first.
NOT_WRITTEN = (
    "output_dir", "overwrite_output_dir", "dry_run", "resume_from_checkpoint", "allow_config_change", "hub_token",
    "resume_from_hub",
)  # fmt: skip

HELP_HEAD = """Train a diffusion model on images, and save it as a pipeline that Diffusers opens.

With no data option it trains on 1,797 handwritten digits that ship with scikit-learn: nothing is downloaded, and the
settings are those of the recipe `digits`. Flags are those of Diffusers' train_unconditional.py, and CompVis' words
for what only CompVis has."""
HELP_TAIL = """first commands:
  ddpm-ext train                                          the digits, a few minutes on two cores
  ddpm-ext sample runs/digits --num_images 64             draw from the trained pipeline
  ddpm-ext train --train_data_dir photos --dry_run        the plan of a run on your own folder
  ddpm-ext train --train_data_dir photos --resolution 32 --block_out_channels 64 128 128 --prediction_type v_prediction
  ddpm-ext train --config run.yaml --learning_rate 5e-5   options from a file, the command line above them
  accelerate launch training/train.py ...                 the same, from a clone, on as many devices as configured

Every run writes its options to config.yaml in its folder; --config reads that file again. A switch --x takes true or
false, and --no_x is --x false. Lists are written with spaces: --block_out_channels 64 128."""


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run, in sections; a section's field is the flag of the same name.

    `parse_train_args` and `TrainConfig.from_flat` make checked ones.
    """

    data: DataOptions = field(default_factory=DataOptions)
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
        """A checked configuration from options by name, as a YAML file holds them.

        Args:
            options: flag names without dashes, and values; what is left out has its default (on the digits, the
                recipe's).

        Returns:
            The configuration.

        Raises:
            ConfigError: an unknown name, a wrong type, a value out of range, a contradiction.
        """
        return _resolve([_read_layer(options, "")], typed=set())

    @property
    def resumes(self) -> bool:
        """Whether the run may go on in a folder that is there."""
        return self.checkpoint.resume_from_checkpoint is not None or self.hub.resume_from_hub is not None

    @property
    def on_digits(self) -> bool:
        """Whether no data option was given."""
        return self.data.train_data_dir is None and self.data.dataset_name is None

    def to_flat_dict(self) -> dict[str, Any]:
        """Every option by name, as trackers and YAML want them: lists for tuples."""
        named = [(name, option) for name, option in OPTIONS.items() if name != "hub_token"]
        flat = {name: getattr(getattr(self, option.section), name) for name, option in named}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def write_resolved(self, path: str | os.PathLike[str]) -> None:
        """Write every option, by section, as a file for `--config`; the output folder is left out.

        Args:
            path: the YAML file to write.
        """
        flat = self.to_flat_dict()
        lines = ["# Every option of this run. To repeat it: ddpm-ext train --config THIS_FILE [--output_dir FOLDER]\n"]
        for section in SECTIONS:
            names = [name for name, o in OPTIONS.items() if o.section == section and name not in NOT_WRITTEN]
            lines.append(dump_options({section: {n: flat[n] for n in names}}))
        Path(path).write_text("".join(lines), encoding="utf-8")


def parse_train_args(argv: Sequence[str]) -> TrainConfig:
    """The configuration of a command line. Imports neither torch nor diffusers, writes nothing.

    Args:
        argv: the arguments after the command.

    Returns:
        A checked configuration. The command line overrides the file of `--config`, which overrides the recipe
        `digits` (used without a data option), which overrides the defaults.

    Raises:
        ConfigError: an option is wrong; one sentence with the way out.
        SystemExit: `--help` was requested.
    """
    epilog = f"{HELP_TAIL}\n\nrecipes for --config: {', '.join(recipes())}"
    parser = Parser(usage="ddpm-ext train [options]", description=HELP_HEAD, epilog=epilog)
    file_option = options_of(_ConfigFile)["config"]
    parser.add_options([file_option])
    for section, cls in SECTIONS.items():
        parser.add_options([o for o in OPTIONS.values() if o.section == section], section, cls.__doc__, negatable=True)
    typed = parser.parse_values(argv, explain=answer)
    file = typed.pop("config", None)
    layers = [] if file is None else [read_config(file)]
    return _resolve([*layers, _Layer("the command line", typed)], typed=set(typed))


def data_options(file: Path | None, typed: Mapping[str, Any], defaults: Mapping[str, Any]) -> DataOptions:
    """The images that a command looks at: those of a run's written configuration, under the command line.

    Args:
        file: ``config.yaml`` of the run, if there is one.
        typed: options of the section ``data`` from the command line, converted.
        defaults: what holds where neither says anything.

    Returns:
        The section, checked.

    Raises:
        ConfigError: the file or an option is wrong.
    """
    flat = {name: option.default for name, option in OPTIONS.items()} | dict(defaults)
    layers = [] if file is None else [read_config(str(file))]
    for layer in (*layers, _Layer("the command line", dict(typed))):
        flat |= _replaced(layer) | {n: value for n, value in layer.options.items() if OPTIONS[n].section == "data"}
    check_data_options(flat)
    return DataOptions(**{name: flat[name] for name, option in OPTIONS.items() if option.section == "data"})


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("diffusers_ddpm_ext.training").joinpath("recipes")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_config(name: str) -> _Layer:
    """Options from a YAML file, flat or by section.

    Args:
        name: a path, or the name of a recipe.

    Returns:
        The options, converted.

    Raises:
        ConfigError: the file is missing, is not YAML, or an option in it is wrong.
    """
    try:
        if name in recipes() and not Path(name).is_file():
            text = _recipe_text(name)
        else:
            text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {name} cannot be read: {error.strerror}; give a YAML file or a recipe") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {name} is not text: give a YAML file") from None
    return _read_text(text, name)


@dataclass(frozen=True)
class _ConfigFile:
    config: str | None = option(None, "YAML file of options, or the name of a recipe.", metavar="FILE")


@dataclass(frozen=True)
class _Layer:
    source: str
    options: dict[str, Any]


def _recipe_text(name: str) -> str:
    path = resources.files("diffusers_ddpm_ext.training").joinpath("recipes", f"{name}.yaml")
    return path.read_text(encoding="utf-8")


def _read_text(text: str, name: str) -> _Layer:
    try:
        options = load_options(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return _read_layer(options, name)


def _read_layer(options: Mapping[str, Any], source: str) -> _Layer:
    read: dict[str, Any] = {}
    for key, value in _flatten(options, source):
        name = CANONICAL_NAMES.get(key)
        label = f"{key} (in {source})" if source else key
        if name is None:
            error = unknown_option(key, [*CANONICAL_NAMES, *SECTIONS], dashes="", explain=answer)
            raise ConfigError(f"{error} (in {source})" if source else str(error))
        if name == "hub_token" and source:
            raise ConfigError(f"{label}: a token does not belong in a file; give HF_TOKEN, or call `hf auth login`")
        if name in read:
            raise ConfigError(f"{label} is given twice: keep one of them")
        read[name] = convert_value(OPTIONS[name], value, label)
    return _Layer(source or "the options", read)


def _flatten(options: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    where = f" (in {source})" if source else ""
    for key, value in options.items():
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r}{where} is not the name of an option")
        if key not in SECTIONS:
            yield key, value
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{key}{where} is a section: write its options below it, indented")
        for name, inner in value.items():
            if name in CANONICAL_NAMES and OPTIONS[CANONICAL_NAMES[name]].section != key:
                raise ConfigError(
                    f"{name}{where} belongs to section {OPTIONS[CANONICAL_NAMES[name]].section}, not {key}"
                )
            if not isinstance(name, str):
                raise ConfigError(f"key {name!r}{where} is not the name of an option")
            yield name, inner


def _resolve(layers: Sequence[_Layer], typed: set[str]) -> TrainConfig:
    said = {name: value for layer in layers for name, value in layer.options.items()}
    if said.get("train_data_dir") is None and said.get("dataset_name") is None:
        layers = [_read_text(_recipe_text("digits"), "digits.yaml"), *layers]
    flat = {name: option.default for name, option in OPTIONS.items()}
    for layer in layers:
        flat |= _replaced(layer) | layer.options
    check_options({**flat, **_derived(flat, said)}, typed)
    flat |= _derived(flat, said)
    sections: dict[str, Any] = {
        section: cls(**{name: flat[name] for name, option in OPTIONS.items() if option.section == section})
        for section, cls in SECTIONS.items()
    }
    return TrainConfig(**sections)


def _replaced(layer: _Layer) -> dict[str, None]:
    """Options of other layers that this one's choice of an alternative sets aside."""
    gone: dict[str, None] = {}
    for ways in ALTERNATIVES:
        chosen = [(way, name) for way in ways for name in way if layer.options.get(name) is not None]
        if not chosen:
            continue
        way, name = chosen[0]
        for other_way, other in chosen:
            if other_way is not way:
                raise ConfigError(f"--{name} and --{other} (both in {layer.source}) contradict: give one of them")
        for other in (other for rest in ways if rest is not way for other in rest):
            gone |= dict.fromkeys((other, *FOLLOWERS.get(other, ())))
    return gone


def _derived(flat: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that follow other options, where nobody said otherwise."""
    derived: dict[str, Any] = {}
    if flat["trained_betas"] is not None and "num_train_timesteps" not in said:
        derived["num_train_timesteps"] = len(flat["trained_betas"])
    if flat["loss_type"] == "vlb" and "learn_logvar" not in said:
        derived["learn_logvar"] = False  # the digits' recipe learns it, and the bound has no place for it
    steps = derived.get("num_train_timesteps", flat["num_train_timesteps"])
    if "ddpm_num_inference_steps" not in said:
        derived["ddpm_num_inference_steps"] = min(flat["ddpm_num_inference_steps"], steps)
    if "lr_warmup_steps" not in said and flat["lr_scheduler"] in WITHOUT_WARMUP:
        derived["lr_warmup_steps"] = 0
    widths, levels = flat["block_out_channels"], flat["attention_levels"]
    stale = levels is None or (widths and max(levels, default=0) >= len(widths))
    if widths and stale and said.get("attention_levels") is None:
        derived["attention_levels"] = (max(len(widths) - 2, 0),)
    return derived
