"""Keys of an original configuration that describe a run: learning rate and schedule, data, Lightning's settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from diffusers_ddpm_ext.compvis.config import targets
from diffusers_ddpm_ext.compvis.schema import (
    LEARNING_RATE_TYPES,
    ConfigRow,
    Fate,
    check_lr_lambda,
    check_values,
    one_line,
)


class RunKeyReader:
    """Reads the keys of a run: adds a row for each, and collects options of our trainer.

    Args:
        content: the complete configuration.
        for_training: whether a run is made of it; otherwise keys of training alone are not read.

    Attributes:
        rows: one per key, so far.
        training: options of our trainer by name, so far.
        latent: whether the model works on latents.
        params: the checked ``model.params``.
    """

    def __init__(self, content: Mapping[str, Any], for_training: bool = True) -> None:
        self.content = content
        self.for_training = for_training
        self.rows: list[ConfigRow] = []
        self.training: dict[str, Any] = {}
        self.latent = False
        self.params: dict[str, Any] = {}

    def note(self, key: str, value: Any, fate: Fate, note: str) -> None:
        """Add the row of a key."""
        self.rows.append(ConfigRow(key, value, fate, note))

    def note_training(self, key: str, value: Any, note: str) -> None:
        """Add the row of a key that only concerns training: refused for a run, else without effect."""
        self.note(key, value, "refused" if self.for_training else "without effect", note)

    def unlike_base_class(self) -> str:
        """Suffix of a note on a parameter that `LatentDiffusion` uses and `DDPM` ignores."""
        return "" if self.latent else " (the original's base class ignores it)"

    def training_only(
        self,
        read: Callable[[], dict[str, Any]],
        default: dict[str, Any],
        prefix: str,
        names: Iterable[str],
        values: Any,
    ) -> dict[str, Any]:
        """Read keys that only concern training; where no run is made, wrong values there have no effect.

        Args:
            read: reads them, adds their rows, and raises ValueError or TypeError for wrong values.
            default: the result for wrong values.
            prefix: of the keys in their section.
            names: of the keys.
            values: the section.
        """
        count = len(self.rows)
        try:
            return read()
        except (TypeError, ValueError):
            if self.for_training:
                raise
        del self.rows[count:]
        for name in names:
            if name in values:
                self.note(f"{prefix}.{name}", values[name], "without effect", "only used in training")
        return default

    def read_training_keys(self, model: Mapping[str, Any]) -> None:
        """Read the learning rate, its schedule and the monitored metric, from section ``model`` and its params."""
        keys = ("monitor", "scheduler_config")
        self.training |= self.training_only(
            lambda: self._learning_rate(model), {}, "model", LEARNING_RATE_TYPES, model
        )
        self.training |= self.training_only(self._schedule_and_monitor, {}, "model.params", keys, self.params)

    def _learning_rate(self, model: Mapping[str, Any]) -> dict[str, Any]:
        model = check_values(model, LEARNING_RATE_TYPES, "model.")
        rate = model.get("base_learning_rate")
        options: dict[str, Any] = {}
        if "base_learning_rate" in model:
            options["learning_rate"] = float(model["base_learning_rate"])
            self.note("model.base_learning_rate", rate, "translated", "learning_rate, and lr_scaling")
        # Without a rate in the file our default applies, which is not a rate per image.
        scale = model.get("scale_lr", True) and "base_learning_rate" in model
        options["lr_scaling"] = "linear" if scale else "none"
        if "scale_lr" in model:
            self.note("model.scale_lr", model["scale_lr"], "translated", "lr_scaling")
        return options

    def _schedule_and_monitor(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if "monitor" in self.params:
            options |= self._monitor(self.params["monitor"])
        schedule = self.params.get("scheduler_config")
        if schedule is not None:
            options |= self._lr_lambda(as_mapping(schedule, "model.params.scheduler_config"))
        elif "scheduler_config" in self.params:
            self.note("model.params.scheduler_config", None, "translated", "lr_scheduler constant")
        return options

    def _monitor(self, name: Any) -> dict[str, Any]:
        if name is None or re.fullmatch(r"(val|train)/loss(_simple|_vlb)?(_ema)?", str(name)):
            self.note("model.params.monitor", name, "translated", "monitor")
            return {"monitor": name}
        self.note_training("model.params.monitor", name, "it is not logged here; see --monitor")
        return {}

    def _lr_lambda(self, config: Mapping[str, Any]) -> dict[str, Any]:
        name = str(config.get("target", "")).rpartition(".")[2]
        prefix = "model.params.scheduler_config"
        arguments = dict(as_mapping(config.get("params"), f"{prefix}.params"))
        for key in config:
            if key not in ("target", "params"):
                self.note_training(f"{prefix}.{key}", config[key], "not a key of a learning-rate schedule")
        if name not in targets.LR_LAMBDAS:
            known = ", ".join(targets.LR_LAMBDAS)
            self.note_training(f"{prefix}.target", config.get("target"), f"known are {known}")
            self.note_training(f"{prefix}.params", arguments, "of an unknown learning-rate schedule")
            return {}
        self.note(f"{prefix}.target", config["target"], "translated", f"lr_scheduler {name}{self.unlike_base_class()}")
        if "verbosity_interval" in arguments:
            verbosity = arguments.pop("verbosity_interval")
            note = "the learning rate is in metrics.jsonl"
            self.note(f"{prefix}.params.verbosity_interval", verbosity, "without effect", note)
        check_lr_lambda(name, arguments, f"{prefix}.params")
        for key, value in arguments.items():
            self.note(f"{prefix}.params.{key}", value, "translated", "lr_scheduler_args")
        return {"lr_scheduler": name, "lr_scheduler_args": arguments}

    def read_run_sections(self) -> None:
        """Read every entry of the sections ``data`` and ``lightning``."""
        for section in ("data", "lightning"):
            if section in self.content:
                for key, value in leaves(self.content[section], section):
                    self._run_key(key, value)

    def _run_key(self, key: str, value: Any) -> None:
        if key not in targets.OPTION_OF_KEY:
            self.note(key, value, "without effect", targets.why_without_effect(key))
            return
        option, convert = targets.OPTION_OF_KEY[key]
        converted = convert(value)
        if converted is None:
            self.note(key, value, "without effect", f"{option} takes other values here")
        else:
            self.training[option] = converted
            self.note(key, value, "translated", option)


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every entry of nested mappings that is not a mapping itself (or is an empty one), with its dotted key."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    else:
        yield path, value


def as_mapping(value: Any, key: str) -> Mapping[str, Any]:
    """Return a value that must be a mapping; an empty one for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be a mapping, got {one_line(value)}.")
    return value
