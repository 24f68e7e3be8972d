"""`ddpm-ext convert-config`: a configuration of CompVis' classes as one of `ddpm-ext train`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.flags import Parser

HEAD = "Translate a YAML file of CompVis' latent-diffusion, stablediffusion or a fork into one of ddpm-ext train."
TAIL = """examples:
  ddpm-ext convert-config model.yaml                    what becomes of each key
  ddpm-ext convert-config model.yaml --out run.yaml
  ddpm-ext train --config run.yaml --train_data_dir photos

Nothing that the file names is imported. What has no place here is an error; --allow_refused writes the rest."""


@dataclass(frozen=True)
class ConvertConfigOptions:
    """What `ddpm-ext convert-config` was asked for; checked."""

    config: Path
    out: Path | None
    overwrite: bool
    allow_refused: bool


def convert_config_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    return convert_config(parse_convert_config_args(argv))


def parse_convert_config_args(argv: Sequence[str], prog: str = "ddpm-ext convert-config") -> ConvertConfigOptions:
    """The options of a command line, checked; arguments and errors are those of `Parser.parse_checked`."""
    parser = Parser(prog=prog, usage=f"{prog} FILE [options]", description=HEAD, epilog=TAIL)
    parser.add_argument("config", metavar="FILE", help="The YAML file.")
    parser.add_argument("--out", metavar="FILE", help="Where it goes (default: print the table only).")
    parser.add_argument("--overwrite", action="store_true", help="Replace --out.")
    parser.add_argument("--allow_refused", action="store_true", help="Leave keys out that have no place here.")
    given = parser.parse_checked(argv)
    config, out = Path(given["config"]), None if given["out"] is None else Path(given["out"])
    if not config.is_file():
        raise ConfigError(f"{config} {'is a folder' if config.is_dir() else 'does not exist'}: give the YAML file")
    if out is not None:
        _check_out(out, config, given["overwrite"])
    return ConvertConfigOptions(config, out, given["overwrite"], given["allow_refused"])


def _check_out(out: Path, config: Path, overwrite: bool) -> None:
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out} must end in .yaml or .yml")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file")
    if out.exists() and out.samefile(config):
        raise ConfigError(f"--out {out} is the file that is read: name another")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out {out} exists: name another place, or say --overwrite")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} lies in a folder that does not exist or cannot be written to")


def convert_config(options: ConvertConfigOptions) -> str:
    """Translate, and write.

    Args:
        options: what was asked for.

    Returns:
        What to print: a line for every key.

    Raises:
        ConfigError: the file is no such configuration, or a key has no place here.
    """
    from diffusers_ddpm_ext.compvis.config.ddpm import read_config
    from diffusers_ddpm_ext.compvis.config.recipe import LATENT_NOTE, recipe, write_recipe
    from diffusers_ddpm_ext.compvis.report import format_columns

    try:
        config = read_config(options.config, strict=not options.allow_refused)
        content = recipe(config)
        if options.out is not None:
            write_recipe(config, options.out, options.config.name)
    except ValueError as error:
        raise ConfigError(f"{options.config}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
    rows = [(row.key, " ".join(str(row.value).split())[:40], row.fate, row.note) for row in config.rows]
    network = content["model"]["model_config"]["_class_name"]
    told = f"{config.target}: a {network}, conditioning_key {config.conditioning_key}"
    told += f"\nnote: {LATENT_NOTE}" if config.samples.latent else ""
    where = f"\nwritten to {options.out}: ddpm-ext train --config {options.out} --train_data_dir FOLDER"
    return (
        f"{format_columns(('key', 'value', 'fate', 'here'), rows)}\n{told}{where if options.out is not None else ''}"
    )
