"""`ddpm-ext convert-config`: a configuration of CompVis' classes as one of `ddpm-ext train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.cli.arguments import check_output_path
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.option import option, positional

CONVERT_CONFIG_EXAMPLES = """examples:
  ddpm-ext convert-config model.yaml                    print the counterpart of each key
  ddpm-ext convert-config model.yaml --out run.yaml
  ddpm-ext train --config run.yaml --train_data_dir photos

Nothing that the file names is imported. A key without a counterpart is an error, unless --allow_refused is given."""


@dataclass(frozen=True)
class ConvertConfigOptions:
    """Translate a YAML file of CompVis' latent-diffusion, stablediffusion or a fork to one of ddpm-ext train."""

    config: Path = positional("FILE", "The YAML file.")
    out: Path | None = option(None, "YAML file to write.", metavar="FILE", unset="print the table only")
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
        if out.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"--out {out} must end in .yaml or .yml")
        check_output_path("--out", out, "file")
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
    from diffusers_ddpm_ext.compvis.config.recipe import LATENT_NOTE, recipe, write_recipe
    from diffusers_ddpm_ext.compvis.report import format_columns

    try:
        config = read_compvis_config(options.config, strict=not options.allow_refused)
        content = recipe(config)
        if options.out is not None:
            write_recipe(config, options.out, options.config.name)
    except ValueError as error:
        raise ConfigError(f"{options.config}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
    network = content["model"]["model_config"]["_class_name"]
    lines = [
        format_columns(("key", "value", "fate", "here"), [row.cells() for row in config.rows]),
        f"{config.target}: a {network}, conditioning_key {config.conditioning_key}",
    ]
    if config.samples.latent:
        lines.append(f"note: {LATENT_NOTE}")
    if options.out is not None:
        lines.append(f"written to {options.out}: ddpm-ext train --config {options.out} --train_data_dir FOLDER")
    return "\n".join(lines)
