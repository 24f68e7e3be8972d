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
    text_encoder_config: dict[str, Any] | None = option(
        None,
        "Configuration of a text encoder that is trained from random weights, as a JSON object; its _class_name is"
        " CLIPTextModel, T5EncoderModel, LDMBertModel or another of --text_encoder.",
        unset="--text_encoder",
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
    encoder, key, captions = flat["text_encoder"], flat["conditioning_key"], flat["caption_column"]
    label = "--text_encoder_config" if encoder is None else f"--text_encoder {printable(encoder, 200)}"
    if encoder is None and (flat["text_encoder_config"] is None or captions is None):
        _check_unused(flat, typed)
        return
    if captions is None:
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
    if flat["tokenizer"] is not None:
        check_model_folder("tokenizer", flat["tokenizer"])
    if encoder is None:
        for name, why in (("train_text_encoder", "its weights are random"), ("tokenizer", "it has none")):
            if not flat[name]:
                raise ConfigError(f"--text_encoder_config needs --{name}: {why}")
        return
    check_model_folder("text_encoder", encoder, flat["text_encoder_subfolder"])


def _check_unused(flat: Mapping[str, Any], typed: Set[str]) -> None:
    """Refuse options that have no effect in a run without a text encoder."""
    captions = flat["caption_column"]
    if captions is not None:
        raise ConfigError(
            f"--caption_column {printable(captions, 60)} needs --text_encoder: the folder or Hub id of the network"
            " that turns captions into tokens"
        )
    for item in fields(TextOptions):
        if item.name in typed and flat[item.name] not in (False, None):
            missing = "--caption_column" if item.name == "text_encoder_config" else "--text_encoder"
            value = printable(str(flat[item.name]), 200)
            raise ConfigError(
                f"--{item.name} {value} has no effect without {missing}: add that, or leave --{item.name} out"
            )


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
    if flat["caption_column"] is None:
        return derived
    start = explicit.get("ckpt_path")
    if flat["text_encoder"] is None and start is not None and has_text_encoder(Path(start)):
        derived |= {"text_encoder": start, "text_encoder_config": None}
    if flat["train_text_encoder"] and "cache_text_embeddings" not in explicit:
        derived["cache_text_embeddings"] = False
    return derived


def has_text_encoder(folder: Path) -> bool:
    """Whether it is the folder of a pipeline with a text encoder."""
    return any((folder / name / "config.json").is_file() for name in TEXT_ENCODER_FOLDERS)
