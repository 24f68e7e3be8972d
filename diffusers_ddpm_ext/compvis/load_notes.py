"""What a checkpoint and its configuration do not agree on: notes for the user, and one refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_ddpm_ext.compvis.config.ddpm import CompVisConfig
from diffusers_ddpm_ext.compvis.config.targets import AUTOENCODERS
from diffusers_ddpm_ext.compvis.schema import one_line
from diffusers_ddpm_ext.compvis.state_dict import CheckpointContents


def logvar_notes(logvar: Tensor | None, objective: Mapping[str, Any]) -> list[str]:
    """Notes where the file has another logvar than the configuration tells."""
    if objective["learn_logvar"]:
        return [] if logvar is not None else ["The configuration learns a logvar, but the checkpoint has none."]
    if logvar is None or bool((logvar == objective["logvar_init"]).all()):
        return []
    return [
        f"The checkpoint's logvar (mean {float(logvar.float().mean()):.4f}) is not part of the pipeline, since the "
        "configuration does not learn it: if it was learned, set learn_logvar: true."
    ]


def check_classes(config: CompVisConfig, table: Tensor | None) -> None:
    """Refuse class embeddings of another number of classes than the configuration names.

    Args:
        config: translated.
        table: (classes, dim), or None.

    Raises:
        ValueError: they differ.
    """
    stage = config.section("cond_stage_config")
    params = stage.get("params") if isinstance(stage, Mapping) else None
    classes = params.get("n_classes") if isinstance(params, Mapping) else None
    if table is not None and classes is not None and table.shape[:1] != (classes,):
        raise ValueError(
            f"model.params.cond_stage_config.params.n_classes is {one_line(classes)}, but the checkpoint's class "
            f"embeddings have shape {tuple(table.shape)}: give the configuration that belongs to it."
        )


def foreign_first_stage(config: CompVisConfig) -> str:
    """The class of a first stage that is none of CompVis' autoencoders; empty for these."""
    target = str((config.first_stage or {}).get("target"))
    return "" if target.rpartition(".")[2] in AUTOENCODERS else target


def stage_notes(config: CompVisConfig, contents: CheckpointContents) -> list[str]:
    """Notes on stages that the configuration has and the pipeline has not."""
    notes = []
    if config.first_stage and not contents.first_stage:
        notes.append("The pipeline has no first stage: its samples are latents.")
    if (config.cond_stage or "").rpartition(".")[2] == "ClassEmbedder" and contents.class_embedding is None:
        notes.append("The pipeline has no class embeddings: pass encoder_hidden_states.")
    return notes


def foreign_classes(config: CompVisConfig) -> list[str]:
    """Notes on classes that are read as CompVis' classes of the same name."""
    return [
        f"{row.key} {one_line(row.value, 100)} is not a class of CompVis' ldm: it is read as ldm's class of that name."
        for row in config.rows
        if row.key.endswith(".target") and row.fate == "translated" and not str(row.value).startswith("ldm.")
    ]
