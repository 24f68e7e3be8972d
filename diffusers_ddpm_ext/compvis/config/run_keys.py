"""What stands around the model in an original configuration: the rate and its course, data, Lightning's settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers_ddpm_ext.compvis import schema as kinds
from diffusers_ddpm_ext.compvis.config import targets
from diffusers_ddpm_ext.compvis.schema import Fate, Row, short


class RunKeys:
    """Notes what becomes of each key, and collects what our trainer takes.

    Args:
        content: the whole configuration.

    Attributes:
        rows: one a key, so far.
        training: options of our trainer by name, so far.
        latent: whether the model works on latents.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.rows: list[Row] = []
        self.training: dict[str, Any] = {}
        self.latent = False

    def note(self, key: str, value: Any, fate: Fate, text: str) -> None:
        """Say what became of a key."""
        self.rows.append(Row(key, value, fate, text))

    def unlike_the_base(self) -> str:
        """What to add where `LatentDiffusion` does something that `DDPM` does not."""
        return "" if self.latent else " (the original's base class does nothing with it)"

    def training_keys(self, model: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        """The learning rate, its course, and the metric to follow.

        Args:
            model: section ``model``.
            params: ``params`` in it.

        Raises:
            ValueError: arguments of a course that it does not take.
        """
        if "base_learning_rate" in model:
            self.training["learning_rate"] = float(model["base_learning_rate"])
            rate = model["base_learning_rate"]
            self.note("model.base_learning_rate", rate, "translated", "learning_rate, and lr_scaling")
        scale = model.get("scale_lr", True) and "base_learning_rate" in model  # our own default is no rate an image
        self.training["lr_scaling"] = "linear" if scale else "none"
        if "scale_lr" in model:
            self.note("model.scale_lr", model["scale_lr"], "translated", "lr_scaling")
        if "monitor" in params:
            self._monitor(params["monitor"])
        if params.get("scheduler_config") is not None:
            self._course(mapping(params["scheduler_config"], "model.params.scheduler_config"))
        elif "scheduler_config" in params:
            self.note("model.params.scheduler_config", None, "translated", "lr_scheduler constant")

    def _monitor(self, name: Any) -> None:
        if name is None or re.fullmatch(r"(val|train)/loss(_simple|_vlb)?(_ema)?", str(name)):
            self.training["monitor"] = name
            self.note("model.params.monitor", name, "translated", "monitor")
        else:
            self.note("model.params.monitor", name, "refused", "it is not logged here; see --monitor")

    def _course(self, course: Mapping[str, Any]) -> None:
        name = str(course.get("target", "")).rpartition(".")[2]
        where = "model.params.scheduler_config.params"
        given = dict(mapping(course.get("params"), where))
        for key in course:
            if key not in ("target", "params"):
                self.note(f"model.params.scheduler_config.{key}", course[key], "refused", "no key of a course")
        if name not in targets.COURSES:
            known = ", ".join(targets.COURSES)
            self.note("model.params.scheduler_config.target", course.get("target"), "refused", f"known are {known}")
            self.note(where, given, "refused", "of a course that is not known")
            return
        note = f"lr_scheduler {name}{self.unlike_the_base()}"
        self.note("model.params.scheduler_config.target", course["target"], "translated", note)
        if "verbosity_interval" in given:
            verbosity = given.pop("verbosity_interval")
            self.note(f"{where}.verbosity_interval", verbosity, "without effect", "the rate is in metrics.jsonl")
        kinds.check_course(name, given, where)
        for key, value in given.items():
            self.note(f"{where}.{key}", value, "translated", "lr_scheduler_args")
        self.training |= {"lr_scheduler": name, "lr_scheduler_args": given}

    def around(self) -> None:
        """Sections ``data`` and ``lightning``, each entry."""
        for section in ("data", "lightning"):
            if section in self.content:
                for key, value in leaves(self.content[section], section):
                    self._leaf(key, value)

    def _leaf(self, key: str, value: Any) -> None:
        flag = targets.LEAVES.get(key)
        if flag is None:
            why = next((why for start, why in targets.AROUND.items() if key.startswith(start)), targets.ELSE)
            self.note(key, value, "without effect", why)
            return
        converted = targets.LEAF_VALUES.get(key, lambda given: given)(value)
        if converted is None:
            self.note(key, value, "without effect", f"{flag} takes other values here")
        else:
            self.training[flag] = converted
            self.note(key, value, "translated", flag)


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every entry of nested mappings that is no mapping itself, under its dotted key."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    else:
        yield path, value


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A part of a configuration that must be a mapping; an empty one for nothing.

    Args:
        value: of the part.
        where: its key.

    Returns:
        The mapping.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {short(value)}.")
    return value
