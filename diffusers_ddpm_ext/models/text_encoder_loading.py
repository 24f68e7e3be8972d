"""Loading of a text encoder and of a tokenizer, from a folder or a repository, their own or a pipeline's."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.models.component_folder import as_hub_error, find_component
from diffusers_ddpm_ext.models.text_kinds import ENCODER_SLOTS, KINDS, TextKind
from diffusers_ddpm_ext.utils.generations import read_one_generation
from diffusers_ddpm_ext.utils.input_files import JsonObject, file_name
from diffusers_ddpm_ext.utils.network_folder import as_folder_error
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX, TOKENIZER_FILES, is_weights, weights_variant
from diffusers_ddpm_ext.utils.text_encoder_folder import check_text_encoder_folder

SLOTS = {"text encoder": ENCODER_SLOTS, "tokenizer": ("tokenizer",)}
"""Names of a component in a pipeline."""
OF_TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""Files of which a tokenizer has at least one."""


def load_text_encoder(path_or_id: str | os.PathLike[str], subfolder: str | None = None) -> Any:
    """Load a text encoder: frozen, in evaluation mode, in float32.

    Args:
        path_or_id: a folder or Hub id, of the encoder itself or of a pipeline, whose ``text_encoder`` or ``bert`` is
            taken. Without a network, a repository is read from the cache.
        subfolder: where in it the encoder is.

    Returns:
        The encoder, for `TextEncoder`.

    Raises:
        ConfigError: it does not exist, cannot be read, is no text encoder, or lacks weights; one sentence.
    """
    files = ("config.json", "*.safetensors", "*.safetensors.index.json")
    return _load(path_or_id, subfolder, "text encoder", files, load_encoder_folder)


def load_tokenizer(path_or_id: str | os.PathLike[str], subfolder: str | None = None) -> Any:
    """Load a tokenizer of Transformers.

    Args:
        path_or_id: a folder or Hub id, of the tokenizer itself or of a pipeline, whose ``tokenizer`` is taken.
        subfolder: where in it the tokenizer is.

    Returns:
        The tokenizer, for `TextEncoder`.

    Raises:
        ConfigError: it does not exist or cannot be read; one sentence.
    """
    return _load(path_or_id, subfolder, "tokenizer", (*TOKENIZER_FILES, "config.json"), _load_tokenizer)


def transformers_class(library: str, name: str) -> Any:
    """A class of Transformers, or Diffusers' `LDMBertModel`, imported on first use.

    Raises:
        ConfigError: Transformers is not installed.
    """
    if library == "diffusers":
        library = "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion"
    try:
        importlib.import_module("transformers")
        return getattr(importlib.import_module(library), name)
    except ImportError:
        raise ConfigError(
            "text encoders and tokenizers need Transformers: pip install 'diffusers-ddpm-ext[text]'"
        ) from None


def _load(
    path_or_id: str | os.PathLike[str], subfolder: str | None, what: str, files: Sequence[str], load: Any
) -> Any:
    source, slots = os.fspath(path_or_id), SLOTS[what]
    if os.path.isdir(source):
        return read_one_generation(source, lambda folder: load(find_component(folder, subfolder, slots, what)))
    with as_hub_error(source):
        places = (subfolder,) if subfolder else (".", *slots)
        patterns = [MODEL_INDEX, *(os.path.normpath(f"{place}/{name}") for place in places for name in files)]
        folder = Path(snapshot_download(source, allow_patterns=patterns))
    return load(find_component(folder, subfolder, slots, what))


# ------------------------------------------------------------------ the encoder


def load_encoder_folder(folder: Path, variant: str | None = None, kinds: Sequence[TextKind] = KINDS) -> Any:
    """Load an encoder from its own folder; see `load_text_encoder`.

    Args:
        folder: with ``config.json`` and weights.
        variant: of the weights, where the folder has it.
        kinds: that it may be of; the first one's are those of a text encoder.
    """
    config = check_text_encoder_folder(folder, variant)
    kind, class_name = _class_of(config, kinds)
    cls = transformers_class(kind.library, class_name)
    weights = [path.name for path in folder.iterdir() if is_weights(path.name)]
    if not weights:
        raise ConfigError(f"{file_name(folder)} has no weights (model.safetensors): copy the folder again")
    has_variant = variant is not None and any(weights_variant(name) == variant for name in weights)
    with as_component_error(folder), quiet_transformers():
        encoder, info = cls.from_pretrained(
            os.fspath(folder),
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error below, which names one
            **({"variant": variant} if has_variant else {}),
        )
    check_all_loaded(info, kind, folder)
    if not all(bool(torch.isfinite(weight).all()) for weight in encoder.parameters()):
        raise ConfigError(f"{file_name(folder)}: the encoder's weights are not finite (NaN or infinity)")
    return encoder.eval().requires_grad_(False)


@contextmanager
def as_component_error(folder: Path) -> Iterator[None]:
    """`as_folder_error` for Transformers, which also raises errors that are of no common class."""
    try:
        with as_folder_error(folder):
            yield
    except (ConfigError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"{file_name(folder)} needs code of its own, which is never run: give another") from None
        if file_name(folder) in str(error):
            raise
        raise ConfigError(f"{file_name(folder)} cannot be loaded: {error}") from error
    except Exception as error:
        text = printable(" ".join(str(error).split()), 300)
        raise ConfigError(f"{file_name(folder)} cannot be loaded: {text}") from error


def check_all_loaded(info: Any, kind: TextKind, folder: Path) -> None:
    """Raise ConfigError if the weights lack tensors of an encoder, or have others than a whole model of its kind.

    Args:
        info: ``output_loading_info`` of Transformers.
        kind: of the encoder.
        folder: for the message.
    """
    missing = sorted(name for name in info["missing_keys"] if not name.endswith("position_ids"))
    others = (*kind.others, *(f"text_model.{name}" for name in kind.others))
    extra = sorted(
        name
        for name in info["unexpected_keys"]
        if not name.endswith("position_ids") and not name.startswith(tuple(f"{other}" for other in others))
    )
    if missing:
        raise ConfigError(
            f"{file_name(folder)}: the weights lack {len(missing)} tensors of the encoder, e.g. {missing[0]}: "
            "they are damaged, or of another model"
        )
    if extra or info["mismatched_keys"]:
        name = printable(str([*extra, *sorted(each[0] for each in info["mismatched_keys"])][0]), 120)
        raise ConfigError(
            f"{file_name(folder)}: the weights have tensors that do not fit the encoder of config.json, e.g. {name}: "
            "they are damaged, or of another model"
        )


def _class_of(config: JsonObject, kinds: Sequence[TextKind]) -> tuple[TextKind, str]:
    """The class of an encoder by its configuration: the one that it names, or the one of its kind of model."""
    names = config.content.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    for kind in kinds:
        if name in kind.classes:
            return kind, name
    model_type = config.content.get("model_type")
    for kind in kinds:
        if model_type in kind.model_types:
            return kind, kind.classes[kind.model_types.index(model_type) if kind.name == "t5" else 0]
    shown, known = printable(str(name or model_type), 80), ", ".join(name for kind in kinds for name in kind.classes)
    raise ConfigError(f"{config.name} is of a {shown}; it must be one of {known}")


# ------------------------------------------------------------------ the tokenizer


def _load_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in OF_TOKENIZER):
        raise ConfigError(
            f"{file_name(folder)} has no tokenizer (one of {', '.join(OF_TOKENIZER)}): give the folder of a "
            "tokenizer, or of a pipeline with one"
        )
    auto = transformers_class("transformers", "AutoTokenizer")
    with as_component_error(folder), quiet_transformers():
        return auto.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the progress bars and warnings of Transformers: what is wrong is an error here."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
