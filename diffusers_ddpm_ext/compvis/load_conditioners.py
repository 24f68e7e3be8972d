"""Conditioning stages of a checkpoint: which of them are converted, as which components, and their tokenizer."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusers_ddpm_ext.compvis.conditioner.architecture import find_kind, read_conditioner
from diffusers_ddpm_ext.compvis.conditioner.clip import CLIP, TEXT_CONFIG, TEXT_HEADS
from diffusers_ddpm_ext.compvis.conditioner.kinds import (
    STAGE_PREFIXES,
    Component,
    ConditionerConfig,
    ConvertedConditioner,
)
from diffusers_ddpm_ext.compvis.conditioner.sizes import folder_config
from diffusers_ddpm_ext.compvis.conditioner.weights import convert_conditioner
from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig
from diffusers_ddpm_ext.compvis.load_options import LoadOptions
from diffusers_ddpm_ext.compvis.schema import ConfigRow, one_line
from diffusers_ddpm_ext.compvis.state_dict import LeftOut
from diffusers_ddpm_ext.compvis.weights import ConvertedTensor
from diffusers_ddpm_ext.compvis.wrapper_names import plain_keys
from diffusers_ddpm_ext.models.text_encoder import load_tokenizer
from diffusers_ddpm_ext.models.tokenizers import check_tokenizer
from diffusers_ddpm_ext.utils.vocabulary import REQUIRED_CONDITIONS

# Component of a pipeline -> the conditions that it makes, of which the network must take one.
MADE_CONDITIONS: dict[Component, tuple[str, ...]] = {
    "text_encoder": ("encoder_hidden_states",),
    "concat_encoder": ("concat_inputs",),
    "image_encoder": ("encoder_hidden_states", "class_labels"),
}


@dataclass(frozen=True)
class ConditioningStages:
    """The conditioning stages of a checkpoint that are converted.

    Attributes:
        configs: by section.
        tensors: by prefix of the keys, by keys without it.
        tokenizer: of the text encoder; None without one.
        remarks: sentences for the user on stages that are left out, and on the tokenizer.
    """

    configs: Mapping[str, ConditionerConfig]
    tensors: Mapping[str, Mapping[str, Tensor]]
    tokenizer: Any
    remarks: list[str]

    @cached_property
    def converted(self) -> dict[str, ConvertedConditioner]:
        """The stages as modules, by section."""
        return {name: self._convert(STAGE_PREFIXES[name], config) for name, config in self.configs.items()}

    def _convert(self, prefix: str, config: ConditionerConfig) -> ConvertedConditioner:
        try:
            return convert_conditioner(self.tensors[prefix], config)
        except ValueError as error:
            raise ValueError(f"{config.kind.name}: {leave_out(error, prefix)}") from None

    @property
    def components(self) -> dict[str, Any]:
        """Components of a pipeline, by name."""
        modules: dict[str, Any] = {
            self.configs[name].kind.component: each.module for name, each in self.converted.items()
        }
        return modules if self.tokenizer is None else modules | {"tokenizer": self.tokenizer}

    @property
    def facts(self) -> dict[str, Any]:
        """What going back to an original checkpoint needs, by section."""
        return {
            name: {"section": self.configs[name].section, "layout": dict(each.plan.layout)}
            for name, each in self.converted.items()
        }

    @property
    def notes(self) -> list[str]:
        """Sentences for the user on what is assumed, and what is left out."""
        return self.remarks + [note for each in self.converted.values() for note in each.plan.notes]

    @property
    def rows(self) -> dict[str, list[ConvertedTensor]]:
        """One row per tensor, by component."""
        return {self.configs[name].kind.component: each.rows for name, each in self.converted.items()}

    @property
    def config_rows(self) -> list[ConfigRow]:
        """One row per argument."""
        return [row for config in self.configs.values() for row in config.rows]

    @property
    def left_out(self) -> list[LeftOut]:
        """Tensors that are not converted."""
        return [
            LeftOut(prefix + key, tuple(self.tensors[prefix][key].shape), why)
            for prefix, plan in ((STAGE_PREFIXES[name], each.plan) for name, each in self.converted.items())
            for key, why in plan.left_out.items()
        ]


def conditioner_configs(
    config: CompVisConfig, keys: Iterable[str], options: LoadOptions
) -> tuple[dict[str, ConditionerConfig], list[str]]:
    """The conditioning stages of a checkpoint that are converted, by their section, and notes on others.

    Args:
        config: translated.
        keys: of the file.
        options: which may leave a stage out.

    Raises:
        ValueError: an argument of a stage is not allowed.
    """
    configs: dict[str, ConditionerConfig] = {}
    notes: list[str] = []
    plain = list(plain_keys(keys))
    for name, prefix in STAGE_PREFIXES.items():
        if options.load_only_unet or prefix.startswith(options.ignore_keys):
            continue
        in_file = any(key.startswith(prefix) and not key.startswith(options.ignore_keys) for key in plain)
        kind = find_kind(config.section(name))
        if kind is None or (kind.has_tensors is None and not in_file):
            continue
        try:
            conditioner = read_conditioner(config.section(name), f"model.params.{name}")
        except ValueError as error:
            raise ValueError(leave_out(error, prefix)) from None
        assert conditioner is not None
        if not in_file and kind.has_tensors is not None and kind.has_tensors(conditioner.params):
            continue
        reason = conditioner.reason_to_leave_out or _other_method(config, name)
        made = MADE_CONDITIONS[conditioner.kind.component]
        if not reason and not set(made) & set(REQUIRED_CONDITIONS[config.conditioning_key]):
            reason = f"conditioning_key {config.conditioning_key} takes no {' nor '.join(made)}"
        if reason:
            notes.append(f"{conditioner.kind.name} is left out, its embeddings can be given: {one_line(reason, 200)}.")
        else:
            configs[name] = conditioner
    return _with_heads(configs, options.text_heads), notes


def leave_out(error: ValueError, prefix: str) -> str:
    """The message of an error in a stage, with the way out that remains."""
    return f"{str(error).removesuffix('.')}; or leave the stage out: ignore_keys {prefix}"


def _with_heads(configs: dict[str, ConditionerConfig], heads: int | None) -> dict[str, ConditionerConfig]:
    """The same, with the number of attention heads that the caller gives."""
    if heads is None:
        return configs
    if not any(_is_clip_text(config) for config in configs.values()):
        raise ValueError(
            f"text_heads {heads} has no effect: the checkpoint has no text encoder of CLIP: leave it out."
        )
    return _with_params(configs, TEXT_HEADS, heads)


def _with_params(configs: Mapping[str, ConditionerConfig], key: str, value: Any) -> dict[str, ConditionerConfig]:
    return {
        name: replace(config, params={**config.params, key: value}) if _is_clip_text(config) else config
        for name, config in configs.items()
    }


def _is_clip_text(config: ConditionerConfig) -> bool:
    return config.kind.module_class == CLIP.module_class


def with_config_of_tokenizer(configs: dict[str, ConditionerConfig], tokenizer: Any) -> dict[str, ConditionerConfig]:
    """The same, with the encoder's ``config.json`` in the tokenizer's folder, or in ``text_encoder`` beside it.

    Raises:
        ValueError: the file cannot be read.
    """
    source = getattr(tokenizer, "name_or_path", None)
    if not source or not Path(source).is_dir() or not any(map(_is_clip_text, configs.values())):
        return configs
    for folder in (Path(source), Path(source).parent / "text_encoder"):
        config = folder_config(folder, "text_config")
        if "hidden_size" in config:
            return _with_params(configs, TEXT_CONFIG, config)
    return configs


def _other_method(config: CompVisConfig, name: str) -> str:
    """Why a stage is left out whose output is that of a method of another name; empty if it is not."""
    method = config.section("cond_stage_forward") if name == "cond_stage_config" else None
    if method in (None, "encode", "forward"):
        return ""
    return f"cond_stage_forward {one_line(method, 60)} is another method than encode"


def prepare_tokenizer(tokenizer: Any, configs: Mapping[str, ConditionerConfig]) -> tuple[Any, list[str]]:
    """Load a tokenizer and let it pad and cut as the original does; also notes for the user.

    Args:
        tokenizer: of Transformers, a folder, an id on the Hub, or None.
        configs: of the conditioning stages, by their section.

    Raises:
        ValueError: it cannot be loaded, or there is no text encoder that uses it.
    """
    if tokenizer is None:
        return None, []
    text = next((each for each in configs.values() if each.kind.component == "text_encoder"), None)
    rule = None if text is None else text.kind.tokenizer_rule(text.params)
    if rule is None:
        why = "the checkpoint has no text encoder that is converted"
        if text is not None:
            why = f"{text.kind.name} takes token ids, input_ids, without a tokenizer"
        raise ValueError(f"tokenizer is {one_line(repr(tokenizer), 100)}, but {why}: leave it out.")
    is_path = isinstance(tokenizer, str | os.PathLike)
    loaded: Any = load_tokenizer(tokenizer) if is_path else copy.deepcopy(tokenizer)
    check_tokenizer(loaded, sys.maxsize)  # the pipeline checks its ids
    notes = []
    if rule.pad_token_id not in (None, loaded.pad_token_id):
        loaded.pad_token = loaded.convert_ids_to_tokens(rule.pad_token_id)
        notes.append(f"The tokenizer pads with token {rule.pad_token_id}, {loaded.pad_token!r}, as the original does.")
    loaded.model_max_length = rule.length
    return loaded, notes
