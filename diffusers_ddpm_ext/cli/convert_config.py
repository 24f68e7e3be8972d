"""`ddpm-ext convert-config`: a configuration of CompVis' classes as one of `ddpm-ext train`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_ddpm_ext.cli.arguments import check_output_file
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.option import option, positional
from diffusers_ddpm_ext.utils.vocabulary import REQUIRED_CONDITIONS

if TYPE_CHECKING:
    from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig

COLUMN_FLAGS = {"concat_inputs": "--concat_column COLUMN", "encoder_hidden_states": "--context_column COLUMN"}

CONVERT_CONFIG_EXAMPLES = """examples:
  ddpm-ext convert-config model.yaml                    print the counterpart of each key
  ddpm-ext convert-config model.yaml --out run.yaml
  ddpm-ext train --config run.yaml --train_data_dir photos

Nothing that the file names is imported. A key without a counterpart is an error, unless --allow_refused is given."""


@dataclass(frozen=True)
class ConvertConfigOptions:
    """Translate a YAML file of CompVis' latent-diffusion, stablediffusion or a fork to one of ddpm-ext train."""

    config: Path = positional("FILE", "The YAML file.")
    out: Path | None = option(None, "YAML file to write.", metavar="FILE.yaml", unset="print the table only")
    overwrite: bool = option(False, "Replace --out.")
    allow_refused: bool = option(False, "Leave out keys that have no counterpart here.")


def convert_config_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    return translate_config(parse_convert_config_args(argv))


def parse_convert_config_args(argv: Sequence[str]) -> ConvertConfigOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(ConvertConfigOptions, argv, "convert-config", CONVERT_CONFIG_EXAMPLES)
    config, out = options.config, options.out
    if not config.is_file():
        raise ConfigError(f"{config} {'is a folder' if config.is_dir() else 'does not exist'}: give the YAML file")
    if out is not None:
        check_output_file("--out", out, (".yaml", ".yml"))
        if out.exists() and out.samefile(config):
            raise ConfigError(f"--out {out} is the input file: name another")
        if out.exists() and not options.overwrite:
            raise ConfigError(f"--out {out} exists: name another place, or use --overwrite")
    return options


def translate_config(options: ConvertConfigOptions) -> str:
    """Translate the configuration, write it if ``--out`` is set, and return a line to print for every key.

    Args:
        options: of the command.

    Raises:
        ConfigError: the file is not such a configuration, or a key is refused.
    """
    from diffusers_ddpm_ext.compvis.config.ddpm import read_compvis_config
    from diffusers_ddpm_ext.compvis.config.recipe import recipe, recipe_notes, write_recipe
    from diffusers_ddpm_ext.compvis.report import format_columns
    from diffusers_ddpm_ext.training.config.layers import convert_options

    try:
        config = read_compvis_config(options.config, strict=not options.allow_refused)
        content = recipe(config)
        convert_options(content)  # whatever `train` would refuse is refused here
        if options.out is not None:
            write_recipe(config, options.out, options.config.name)
    except ValueError as error:
        named = str(error).startswith(printable(options.config.name))
        raise ConfigError(str(error) if named else f"{options.config}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
    network = content["model"]["model_config"]["_class_name"]
    lines = [
        format_columns(("key", "value", "fate", "here"), [row.cells() for row in config.rows]),
        f"{config.target}: a {network}, conditioning_key {config.conditioning_key}",
    ]
    lines += [f"note: {text}" for text in recipe_notes(config) if text]
    if options.out is not None:
        lines.append(f"written to {options.out}: {_next_command(config, options.out)}")
    return "\n".join(lines)


def _next_command(config: CompVisConfig, out: Path) -> str:
    """The command that trains with a recipe; the words in capitals are to be replaced."""
    from diffusers_ddpm_ext.compvis.config.recipe import image_size, text_flags

    needed = REQUIRED_CONDITIONS[config.conditioning_key]
    flags = COLUMN_FLAGS | ({"encoder_hidden_states": "--class_column COLUMN"} if config.embeds_classes else {})
    if captions := text_flags(config):
        flags = flags | {"encoder_hidden_states": captions}
    columns = [f" {flag}" for condition, flag in flags.items() if condition in needed]
    if config.samples.latent:
        columns.append(" --vae FOLDER" + ("" if image_size(config) is not None else " --resolution PIXELS"))
    return f"ddpm-ext train --config {shlex.quote(str(out))} --train_data_dir FOLDER{''.join(columns)}"
