"""What the conversion of an original conditioning stage consists of, whatever its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.key_map import TensorMapping
from diffusers_ddpm_ext.compvis.schema import ConfigRow, Fate, ValueType

Component = Literal["text_encoder", "concat_encoder", "image_encoder"]
# Section of a model's parameters -> prefix of the stage's keys in a checkpoint.
STAGE_PREFIXES = {"cond_stage_config": "cond_stage_model.", "embedder_config": "embedder."}


@dataclass(frozen=True)
class Argument:
    """An argument of an original class.

    Attributes:
        note: its counterpart here, or the reason why it has no effect.
        allowed: its values; None if it has no effect, so that they are not checked.
        default: of the original's class.
        fate: for the report.
        required: whether it has no default.
    """

    note: str
    allowed: ValueType | None = None
    default: Any = None
    fate: Fate = "translated"
    required: bool = False


def unused(note: str) -> Argument:
    """An argument without effect, and the reason."""
    return Argument(note, fate="without effect")


@dataclass(frozen=True)
class TokenizerRule:
    """How an original stage makes tokens of a prompt.

    Attributes:
        length: to which prompts are padded, and at which they are cut.
        pad_token_id: with which they are padded; None for the tokenizer's own.
    """

    length: int
    pad_token_id: int | None = None


@dataclass(frozen=True)
class ConditionerPlan:
    """How the tensors of a stage become a module.

    Attributes:
        build: makes the module; called inside ``torch.device("meta")``.
        mappings: one per tensor of the module; sources are the stage's keys without its prefix.
        left_out: keys of the stage that are not converted, and why.
        finish: called with the module after its weights are loaded.
        layout: how its file is arranged, if that is not always the same; for the way back, as JSON.
        notes: sentences for the user.
    """

    build: Callable[[], nn.Module]
    mappings: tuple[TensorMapping, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Any], None] = lambda module: None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConditionerKind:
    """An original class of conditioning stages.

    Attributes:
        name: last part of its path.
        component: of the pipeline that it becomes.
        module_class: name of the component's class.
        mark: beginning of a key that only its files have, among those of one ``module_class``.
        arguments: of the class, by name.
        plan: from arguments, with their defaults, and tensors; ValueError if they do not belong together.
        export: the stage's tensors of a module, given their layout and the tensors of another checkpoint's stage; the
            inverse of the conversion. ValueError if the class cannot express the module.
        params_of: arguments of the class for a module, given the recorded ones, if there are any.
        layout_of: layout of a file's tensors, for modules without a recorded one.
        reason_to_leave_out: why a stage with these arguments is not converted; empty if it is.
        tokenizer_rule: how a stage with these arguments tokenizes; None if it does not.
        has_tensors: whether a stage with these arguments has any, so that a file without them has no such stage. None:
            it always has.
    """

    name: str
    component: Component
    module_class: str
    mark: str
    arguments: Mapping[str, Argument]
    plan: Callable[[Mapping[str, Any], Mapping[str, Tensor]], ConditionerPlan]
    export: Callable[[nn.Module, Mapping[str, Any], Mapping[str, Tensor]], dict[str, Tensor]]
    params_of: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]]
    layout_of: Callable[[Mapping[str, Tensor]], dict[str, Any]] = lambda tensors: {}
    reason_to_leave_out: Callable[[Mapping[str, Any]], str] = lambda params: ""
    tokenizer_rule: Callable[[Mapping[str, Any]], TokenizerRule | None] = lambda params: None
    has_tensors: Callable[[Mapping[str, Any]], bool] | None = None

    @property
    def path(self) -> str:
        """The whole path of the class, written where no other is recorded."""
        return f"ldm.modules.encoders.modules.{self.name}"


@dataclass(frozen=True)
class ConditionerConfig:
    """An original conditioning stage, checked.

    Attributes:
        kind: its class.
        section: ``target`` and ``params``, as in the file.
        params: its arguments, with their defaults.
        rows: one per key of the section.
    """

    kind: ConditionerKind
    section: Mapping[str, Any]
    params: Mapping[str, Any]
    rows: tuple[ConfigRow, ...] = ()

    @property
    def reason_to_leave_out(self) -> str:
        """Why the stage is not converted; empty if it is."""
        return self.kind.reason_to_leave_out(self.params)


@dataclass(frozen=True)
class ConvertedConditioner:
    """A converted stage.

    Attributes:
        module: float32, in eval mode, its weights not trained.
        rows: one per tensor; see `ConvertedTensor`.
        plan: how it was converted.
    """

    module: nn.Module
    rows: list[Any]
    plan: ConditionerPlan
