"""The text and image encoders in the folder of a pipeline: how they are written, and how they are loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from diffusers_ddpm_ext.models.text_encoder import TextEncoder
from diffusers_ddpm_ext.models.text_encoder_loading import load_encoder_folder, load_tokenizer, quiet_transformers
from diffusers_ddpm_ext.models.text_encoder_saving import prefix_names, write_vocabulary
from diffusers_ddpm_ext.models.text_kinds import ENCODER_SLOTS, VISION_KIND
from diffusers_ddpm_ext.pipelines.condition_encoders import ENCODER_COMPONENTS, checked_alias, library_and_class
from diffusers_ddpm_ext.pipelines.stock_text import LDM_TEXT
from diffusers_ddpm_ext.utils.input_files import JsonObject, read_json_object
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX
from diffusers_ddpm_ext.utils.wrappers import unwrap


def place_encoders(pipeline: Any, stock_name: str) -> None:
    """Put the encoders of a pipeline that is about to be saved into their slots, as they are saved.

    Args:
        pipeline: a copy, which is changed.
        stock_name: the class that the folder names instead of ours; empty for ours.
    """
    parts = {name: pipeline.__dict__.get(name) for name in ENCODER_COMPONENTS}
    if not any(part is not None for part in parts.values()):
        return
    text, tokenizer = parts["text_encoder"], parts["tokenizer"]
    if tokenizer is not None:
        parts["tokenizer"] = bounded_tokenizer(tokenizer, TextEncoder(text, tokenizer).max_length)
    if stock_name == LDM_TEXT:
        parts |= {"text_encoder": None, "bert": text}
    for name in (*ENCODER_SLOTS, "image_encoder", "concat_encoder"):
        parts[name] = None if parts[name] is None else unwrap(parts[name])
    pipeline.__dict__.update(parts)
    pipeline.register_to_config(
        **{name: (None, None) if part is None else library_and_class(part) for name, part in parts.items()}
    )


def bounded_tokenizer(tokenizer: Any, length: int) -> Any:
    """A tokenizer whose length is the one that is used: stock pipelines pad to it, and many tokenizers have none."""
    if tokenizer.model_max_length == length:
        return tokenizer
    bounded = copy.copy(tokenizer)
    bounded.model_max_length = length
    return bounded


def finish_encoders(folder: Path) -> None:
    """Rewrite what Transformers has written, so that all of its versions read it.

    Args:
        folder: of a pipeline that is being saved.
    """
    for name in (*ENCODER_SLOTS, "image_encoder"):
        if (folder / name / "config.json").is_file():
            prefix_names(folder / name)
    if (folder / "tokenizer").is_dir():
        write_vocabulary(folder / "tokenizer")


def quiet_saving(pipeline: Any) -> AbstractContextManager[None]:
    """Without the progress bars of Transformers, where a pipeline has one of its networks."""
    has_encoders = any(pipeline.__dict__.get(name) is not None for name in ENCODER_COMPONENTS)
    return quiet_transformers() if has_encoders else nullcontext()


def split_encoders(folder: Path, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``from_pretrained`` without text encoder and tokenizer, and these, loaded from the folder.

    Transformers itself would load random weights in the place of missing ones, with a warning.

    Args:
        folder: of a pipeline.
        kwargs: what the caller passed; a component that is None is left out.

    Returns:
        The arguments for Diffusers, and the components to assign afterwards.

    Raises:
        ConfigError: they are damaged, or have not all of their weights.
    """
    result = dict(kwargs)
    index = read_json_object(folder / MODEL_INDEX) if (folder / MODEL_INDEX).is_file() else JsonObject("", {})
    if not has_component(index, "image_encoder") and "feature_extractor" not in result:
        result["feature_extractor"] = None  # of a safety checker, which this pipeline does not have
    if kwargs.get("device_map") is not None or kwargs.get("quantization_config") is not None:
        return result, {}  # Diffusers distributes them
    is_given = any(name in result for name in ENCODER_SLOTS)
    text = checked_alias("text_encoder", result.pop("text_encoder", None), "bert", result.pop("bert", None))
    slot = next((name for name in ENCODER_SLOTS if has_component(index, name)), None)
    if slot is not None and not is_given:
        text = load_encoder_folder(folder / slot, kwargs.get("variant")).to(_dtype(kwargs))
    if has_component(index, "image_encoder") and "image_encoder" not in result:
        image = load_encoder_folder(folder / "image_encoder", kwargs.get("variant"), (VISION_KIND,))
        result["image_encoder"] = image
    has_own = text is not None and "tokenizer" not in result and has_component(index, "tokenizer")
    tokenizer = load_tokenizer(folder, "tokenizer") if has_own else result.pop("tokenizer", None)
    result |= dict.fromkeys((*ENCODER_SLOTS, "tokenizer"))
    return result, {"text_encoder": text, "tokenizer": tokenizer}


def has_component(index: JsonObject, name: str) -> bool:
    """Whether a ``model_index.json`` names a class for a component."""
    return any(index.list(name, []))


def _dtype(kwargs: Mapping[str, Any]) -> torch.dtype:
    """The precision that a dictionary of the caller asks for; float32 without one."""
    asked = kwargs.get("dtype", kwargs.get("torch_dtype"))
    dtype = asked.get("text_encoder") if isinstance(asked, dict) else None
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
