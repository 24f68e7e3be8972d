"""Random dropout of conditions in original configurations, as ``--conditioning_dropout``.

The original replaces the input of a stage, ours an input of the network: the same where the network gets the input
itself, a class of a ``ClassEmbedder``, a prompt, or an embedding that is zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_ddpm_ext.compvis.config.run_keys import RunKeyReader, as_mapping
from diffusers_ddpm_ext.compvis.config.targets import CONDITIONERS, TEXT_ENCODER
from diffusers_ddpm_ext.compvis.schema import UCG_TYPES, check_values, number, one_line
from diffusers_ddpm_ext.utils.vocabulary import CLASS_TOKEN_KEYS, REQUIRED_CONDITIONS

DEFAULT_CLASSES, MAX_CLASSES = 1000, 1_000_000  # of ClassEmbedder, and of --num_class_embeds
STAGE = "model.params.cond_stage_config.params"


def read_condition_dropout(reader: RunKeyReader, key: str | None, stage: str | None) -> dict[str, Any]:
    """Read what is dropped in training; adds rows, and the option ``conditioning_dropout``.

    Args:
        reader: of the configuration.
        key: the conditioning key, as the class resolves it.
        stage: target of the conditioning stage.

    Returns:
        ``ucg_training``, by key of a batch.

    Raises:
        ValueError: a value is not allowed.
    """
    ucg = dict(as_mapping(reader.params.get("ucg_training"), "model.params.ucg_training"))
    dropout: dict[str, Any] = {}
    for name, entry in ucg.items():
        full = f"model.params.ucg_training.{name}"
        entry = check_values(as_mapping(entry, full), UCG_TYPES, f"{full}.")
        if "p" not in entry:
            raise ValueError(f"{full} lacks p, the probability.")
        condition = _condition_of(reader, name, key, stage)
        why = _why_not(reader, condition, entry.get("val"))
        if condition is not None and not why:
            value = {} if condition == "captions" else {"val": entry.get("val")}
            dropout[condition] = {k: v for k, v in ({"p": entry["p"]} | value).items() if v is not None}
            reader.note(full, ucg[name], "translated", f"--conditioning_dropout of {condition}")
        elif condition is not None:
            reader.note_training(full, ucg[name], why)
        else:
            why = "it replaces the input of a stage; --conditioning_dropout replaces an input of the network"
            reader.note(full, ucg[name], "without effect", why if key else "there is no condition")
    if not ucg and "ucg_training" in reader.params:
        reader.note("model.params.ucg_training", reader.params["ucg_training"], "translated", "no dropout")
    _add_own_dropout(reader, key, stage, dropout)
    if dropout:
        reader.training["conditioning_dropout"] = dropout
    return ucg


def _condition_of(reader: RunKeyReader, name: str, key: str | None, stage: str | None) -> str | None:
    """The condition of a run that a key of a batch is; None if it is none, or does not reach the network so."""
    last, required = str(stage).rpartition(".")[2], REQUIRED_CONDITIONS[key]
    is_own = not reader.latent or name == reader.params.get("cond_stage_key", "image")
    if (not reader.latent or last == "Identity") and is_own and len(required) == 1:
        return required[0]
    if last == "ClassEmbedder" and key in CLASS_TOKEN_KEYS:
        return "class_labels" if name == class_embedder_params(reader).get("key", "class") else None
    is_text = CONDITIONERS.get(last) == TEXT_ENCODER and "encoder_hidden_states" in required
    return "captions" if is_text and is_own else None


def _why_not(reader: RunKeyReader, condition: str | None, value: Any) -> str:
    """Why a condition cannot be replaced by a value; empty if it can."""
    if condition == "captions":
        return "" if value in (None, "") else 'a caption is replaced by the empty prompt only: val ""'
    if isinstance(value, str):
        return "val is a text, which replaces no number"
    if condition == "class_labels" and "n_classes" in class_embedder_params(reader):
        last = number_of_classes(reader) - 1
        return "" if value in range(last + 1) else f"val must be the class that stands for none, from 0 to {last}"
    return ""


def _add_own_dropout(reader: RunKeyReader, key: str | None, stage: str | None, dropout: dict[str, Any]) -> None:
    """Add what classes drop by themselves: ``ucg_rate`` of a ClassEmbedder, ``embedding_dropout`` of a model."""
    params = class_embedder_params(reader) if str(stage).rpartition(".")[2] == "ClassEmbedder" else {}
    if "ucg_rate" in params and key in CLASS_TOKEN_KEYS:
        rate = check_values(params, {"ucg_rate": number(0, 1)}, f"{STAGE}.")["ucg_rate"]
        own, null = dropout.get("class_labels", {"p": 0.0}), number_of_classes(reader) - 1
        if own["p"] and rate and own.get("val") != null:
            why = f"ucg_training drops classes to {own.get('val')}, and ucg_rate to {null}: keep one"
            reader.note_training(f"{STAGE}.ucg_rate", rate, why)
        else:
            note = "--conditioning_dropout of class_labels, in training only"
            reader.note(f"{STAGE}.ucg_rate", rate, "translated", note)
        if rate:
            dropout["class_labels"] = {"p": 1 - (1 - own["p"]) * (1 - rate) if own["p"] else rate, "val": null}
    rate = reader.params.get("embedding_dropout")
    if rate is not None and "class_labels" in REQUIRED_CONDITIONS[key]:
        rate = check_values(reader.params, {"embedding_dropout": number(0, 1)}, "model.params.")["embedding_dropout"]
        reader.note("model.params.embedding_dropout", rate, "translated", "--conditioning_dropout of class_labels")
        if rate:
            dropout["class_labels"] = {"p": rate}


def class_embedder_params(reader: RunKeyReader) -> Mapping[str, Any]:
    """Arguments of the conditioning stage, a ClassEmbedder."""
    stage = reader.params.get("cond_stage_config")
    return as_mapping(stage.get("params"), STAGE) if isinstance(stage, Mapping) else {}


def number_of_classes(reader: RunKeyReader) -> int:
    """Rows of the class embedder's table.

    Raises:
        ValueError: ``n_classes`` is no number of classes.
    """
    classes = class_embedder_params(reader).get("n_classes", DEFAULT_CLASSES)
    if type(classes) is not int or not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"{STAGE}.n_classes is {one_line(repr(classes))}; it must be from 1 to {MAX_CLASSES:,}.")
    return classes
