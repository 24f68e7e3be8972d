"""Options of training with captions, and their checks, before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.input_files import exists
from diffusers_ddpm_ext.utils.option import option
from diffusers_ddpm_ext.utils.vocabulary import REQUIRED_CONDITIONS

TEXT_CACHE = "runs/text_embeddings"
TEXT_ENCODER_FOLDERS = ("text_encoder", "bert")


@dataclass(frozen=True)
class TextOptions:
    """Captions: a text encoder turns them into tokens of cross attention. It stays as it is, unless it is trained."""

    text_encoder: str | None = option(
        None,
        "Text encoder of --caption_column: the folder of one of Transformers (CLIP, T5) or of Diffusers' LDMBertModel,"
        " or of a pipeline with one, or a Hub id. With --ckpt_path FOLDER of such a pipeline: by default its own.",
        unset="train without captions",
        path=True,
    )
    text_encoder_subfolder: str | None = option(
        None, "Subfolder of --text_encoder with the encoder.", unset="`text_encoder` or `bert`"
    )
    tokenizer: str | None = option(
        None,
        "Tokenizer of the text encoder: its folder, or that of a pipeline with one, or a Hub id.",
        unset="that of --text_encoder",
        path=True,
    )
    train_text_encoder: bool = option(
        False,
        "Train the text encoder, too (CompVis' `cond_stage_trainable`), at the learning rate of the network. The"
        " average (EMA) leaves it out.",
    )
    cache_text_embeddings: bool = option(
        True,
        "Encode each caption once instead of each time, and keep its embedding: in memory, or, from 1 GiB on, in"
        f" files in {TEXT_CACHE}. Off where the text encoder is trained.",
    )
    preview_prompts: tuple[str, ...] | None = option(
        None,
        "Prompts of the preview images: texts in quotes, separated by spaces.",
        unset="captions of the validation images",
        phrases=True,
    )


def check_text_options(flat: Mapping[str, Any], typed: Set[str]) -> None:
    """Check the options of the section ``text`` against all others.

    Args:
        flat: every option by name.
        typed: names of those on the command line.

    Raises:
        ConfigError: the first contradiction, with the option, its value and the way out.
    """
    encoder, key = flat["text_encoder"], flat["conditioning_key"]
    if encoder is None:
        for item in fields(TextOptions):
            if flat[item.name] != item.default and (item.name in typed or item.name != "cache_text_embeddings"):
                value = printable(str(flat[item.name]), 200)
                raise ConfigError(
                    f"--{item.name} {value} has no effect without --text_encoder: add that, or leave --{item.name} out"
                )
        if flat["caption_column"] is not None:
            raise ConfigError(
                f"--caption_column {printable(flat['caption_column'], 60)} needs --text_encoder: the folder or Hub id"
                " of the network that turns captions into tokens"
            )
        return
    label = f"--text_encoder {printable(encoder, 200)}"
    if flat["caption_column"] is None:
        raise ConfigError(f"{label} needs --caption_column: the column with the captions of the images")
    if "encoder_hidden_states" not in REQUIRED_CONDITIONS[key]:
        raise ConfigError(
            f"{label} makes tokens of cross attention, and --conditioning_key {key} has none: use crossattn, or leave"
            " --conditioning_key out"
        )
    if flat["train_text_encoder"] and flat["cache_text_embeddings"]:
        raise ConfigError(
            "--cache_text_embeddings has no effect with --train_text_encoder, whose embeddings change in each step:"
            " leave one of them out"
        )
    check_model_folder("text_encoder", encoder, flat["text_encoder_subfolder"])
    if flat["tokenizer"] is not None:
        check_model_folder("tokenizer", flat["tokenizer"])


def check_model_folder(name: str, path: str, subfolder: str | None = None) -> None:
    """Refuse a component of a model on this machine that does not exist.

    Args:
        name: of the option, whose ``_subfolder`` is the subfolder's.
        path: its value, which may also be a Hub id.
        subfolder: of the path.

    Raises:
        ConfigError: a path that is not there, or a checkpoint that is not converted.
    """
    label = f"--{name} {printable(path, 200)}"
    if Path(path).suffix in (".ckpt", ".safetensors", ".pt", ".yaml"):
        raise ConfigError(
            f"{label} is a file, and must be a folder: make one of a CompVis checkpoint with `ddpm-ext convert`"
        )
    if not exists(path):
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ConfigError(f"{label} does not exist: name a folder that Diffusers or Transformers wrote")
        return
    if subfolder is not None and not (Path(path) / subfolder).is_dir():
        raise ConfigError(f"--{name}_subfolder {printable(subfolder, 200)} does not exist in {printable(path, 200)}")


def text_defaults(flat: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of options that are others with captions, for those that are not set explicitly.

    Args:
        flat: every option by name, before these defaults.
        explicit: the options that are set.
    """
    derived: dict[str, Any] = {}
    encoder, start = flat["text_encoder"], explicit.get("ckpt_path")
    if encoder is None and flat["caption_column"] is not None and start is not None and has_text_encoder(Path(start)):
        derived["text_encoder"] = encoder = start
    if encoder is None:
        return {}
    if flat["train_text_encoder"] and "cache_text_embeddings" not in explicit:
        derived["cache_text_embeddings"] = False
    return derived


def has_text_encoder(folder: Path) -> bool:
    """Whether it is the folder of a pipeline with a text encoder."""
    return any((folder / name / "config.json").is_file() for name in TEXT_ENCODER_FOLDERS)
