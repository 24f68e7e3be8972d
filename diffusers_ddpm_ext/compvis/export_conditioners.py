"""Conditioning stages of a pipeline, in the terms of the original's classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.conditioner.architecture import read_conditioner
from diffusers_ddpm_ext.compvis.conditioner.kinds import STAGE_PREFIXES, Argument, ConditionerConfig, ConditionerKind
from diffusers_ddpm_ext.compvis.conditioner.registry import KINDS
from diffusers_ddpm_ext.compvis.conditioner.weights import export_conditioner
from diffusers_ddpm_ext.compvis.config.run_keys import as_mapping
from diffusers_ddpm_ext.compvis.schema import CONDITIONERS, REPORT_FILE
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.utils.wrappers import network_class

COMPONENTS = ("text_encoder", "concat_encoder", "image_encoder")
DEFAULT_SECTION = "cond_stage_config"
NONE = Argument("")


@dataclass(frozen=True)
class ExportedStage:
    """A component of a pipeline that becomes a conditioning stage.

    Attributes:
        name: of its section.
        kind: class of the original.
        module: the component.
        recorded: its configuration when it was converted; None if it was not.
        layout: of its tensors then; None if it was not converted.
        length: of prompts, of the pipeline's tokenizer; None without one.
    """

    name: str
    kind: ConditionerKind
    module: nn.Module
    recorded: ConditionerConfig | None
    layout: Mapping[str, Any] | None
    length: int | None = None

    @property
    def section(self) -> dict[str, Any]:
        """``target`` and ``params`` of the original."""
        given = {} if self.recorded is None else as_mapping(self.recorded.section.get("params"), self.name)
        target = self.kind.path if self.recorded is None else self.recorded.section["target"]
        params = self.kind.params_of(self.module, given)
        if self.recorded is None and self.length is not None and self.kind.arguments.get("max_length", NONE).allowed:
            params["max_length"] = self.length
        return {"target": target, "params": params}


def conditioning_stages(
    pipeline: DDPMExtPipeline, facts: Mapping[str, Any], base: Mapping[str, Tensor]
) -> list[ExportedStage]:
    """The conditioning stages that a pipeline's components become.

    Args:
        pipeline: to export.
        facts: what its conversion recorded.
        base: tensors of another original checkpoint, whose class a component of unknown origin takes.

    Raises:
        ValueError: the original has no class for a component, or the facts are damaged.
    """
    recorded = _recorded(facts)
    stages = []
    for component in COMPONENTS:
        module = getattr(pipeline, component, None)
        if module is None:
            continue
        known = next((each for each in recorded if each[1].kind.component == component), None)
        if known is not None and known[1].kind.module_class == network_class(module).__name__:
            name, config, layout = known
            stages.append(ExportedStage(name, config.kind, module, config, layout))
        else:
            kind, text = _kind_of(component, module, base), pipeline.text_encoder_stage
            length = text.max_length if text is not None and text.tokenizer is not None else None
            stages.append(ExportedStage(DEFAULT_SECTION, kind, module, None, None, length))
    return stages


def conditioner_tensors(
    pipeline: DDPMExtPipeline, facts: Mapping[str, Any], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of a pipeline's conditioning stages by the original's keys.

    Args:
        pipeline: to export.
        facts: what its conversion recorded.
        base: tensors of another original checkpoint, for what a component does not have.

    Raises:
        ValueError: the original's classes cannot express a component, or tensors of ``base`` are needed.
    """
    state: dict[str, Tensor] = {}
    for stage in conditioning_stages(pipeline, facts, base):
        prefix = STAGE_PREFIXES[stage.name]
        own = _inner(base, prefix)
        if own and not any(key.startswith(stage.kind.mark) for key in own):
            raise ValueError(
                f"base has another conditioning stage than the pipeline's {stage.kind.name}: no key of it starts with "
                f"{prefix}{stage.kind.mark}: give the checkpoint that the pipeline was converted from."
            )
        layout = stage.kind.layout_of(own) if stage.layout is None else stage.layout
        tensors = export_conditioner(stage.module, stage.kind.name, layout, own)
        state |= {prefix + name: tensor for name, tensor in tensors.items()}
    return state


def _inner(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _kind_of(component: str, module: nn.Module, base: Mapping[str, Tensor]) -> ConditionerKind:
    """The original's class for a component: that of ``base``, if it fits, else the first that does."""
    name = network_class(module).__name__
    fitting = [kind for kind in KINDS.values() if kind.component == component and kind.module_class == name]
    if not fitting:
        known = ", ".join(sorted({kind.module_class for kind in KINDS.values() if kind.component == component}))
        raise ValueError(
            f"The pipeline's {component} is {name}, which cannot be exported: the original's classes are {known}."
        )
    own = _inner(base, STAGE_PREFIXES[DEFAULT_SECTION])
    return next((kind for kind in fitting if any(key.startswith(kind.mark) for key in own)), fitting[0])


def _recorded(facts: Mapping[str, Any]) -> list[tuple[str, ConditionerConfig, Mapping[str, Any]]]:
    """Section, configuration and layout of the conditioning stages that a conversion recorded."""
    where, stages = f"{REPORT_FILE} facts.{CONDITIONERS}", []
    for name, entry in as_mapping(facts.get(CONDITIONERS), where).items():
        entry = as_mapping(entry, f"{where}.{name}")
        config = read_conditioner(entry.get("section"), f"{where}.{name}.section")
        layout = as_mapping(entry.get("layout"), f"{where}.{name}.layout")
        if name not in STAGE_PREFIXES or config is None:
            raise ValueError(f"{where}.{name} is not a conditioning stage: convert the checkpoint again.")
        stages.append((name, config, layout))
    return stages
