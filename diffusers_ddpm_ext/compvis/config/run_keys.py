"""Keys of an original configuration that describe a run: learning rate and schedule, data, Lightning's settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers_ddpm_ext.compvis.config import targets
from diffusers_ddpm_ext.compvis.schema import ConfigRow, Fate, check_lr_lambda, one_line


class RunKeyReader:
    """Reads the keys of a run: adds a row for each, and collects options of our trainer.

    Args:
        content: the complete configuration.

    Attributes:
        rows: one per key, so far.
        training: options of our trainer by name, so far.
        latent: whether the model works on latents.
        params: the checked ``model.params``.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.rows: list[ConfigRow] = []
        self.training: dict[str, Any] = {}
        self.latent = False
        self.params: dict[str, Any] = {}

    def note(self, key: str, value: Any, fate: Fate, note: str) -> None:
        """Add the row of a key."""
        self.rows.append(ConfigRow(key, value, fate, note))

    def unlike_base_class(self) -> str:
        """Suffix of a note on a parameter that `LatentDiffusion` uses and `DDPM` ignores."""
        return "" if self.latent else " (the original's base class ignores it)"

    def read_training_keys(self, model: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        """Read the learning rate, its schedule and the monitored metric, from section ``model`` and its params."""
        rate = model.get("base_learning_rate")
        if "base_learning_rate" in model:
            self.training["learning_rate"] = float(model["base_learning_rate"])
            self.note("model.base_learning_rate", rate, "translated", "learning_rate, and lr_scaling")
        # Without a rate in the file our default applies, which is not a rate per image.
        scale = model.get("scale_lr", True) and "base_learning_rate" in model
        self.training["lr_scaling"] = "linear" if scale else "none"
        if "scale_lr" in model:
            self.note("model.scale_lr", model["scale_lr"], "translated", "lr_scaling")
        if "monitor" in params:
            self._monitor(params["monitor"])
        if params.get("scheduler_config") is not None:
            self._lr_lambda(as_mapping(params["scheduler_config"], "model.params.scheduler_config"))
        elif "scheduler_config" in params:
            self.note("model.params.scheduler_config", None, "translated", "lr_scheduler constant")

    def _monitor(self, name: Any) -> None:
        if name is None or re.fullmatch(r"(val|train)/loss(_simple|_vlb)?(_ema)?", str(name)):
            self.training["monitor"] = name
            self.note("model.params.monitor", name, "translated", "monitor")
        else:
            self.note("model.params.monitor", name, "refused", "it is not logged here; see --monitor")

    def _lr_lambda(self, config: Mapping[str, Any]) -> None:
        name = str(config.get("target", "")).rpartition(".")[2]
        prefix = "model.params.scheduler_config"
        arguments = dict(as_mapping(config.get("params"), f"{prefix}.params"))
        for key in config:
            if key not in ("target", "params"):
                self.note(f"{prefix}.{key}", config[key], "refused", "not a key of a learning-rate schedule")
        if name not in targets.LR_LAMBDAS:
            known = ", ".join(targets.LR_LAMBDAS)
            self.note(f"{prefix}.target", config.get("target"), "refused", f"known are {known}")
            self.note(f"{prefix}.params", arguments, "refused", "of an unknown learning-rate schedule")
            return
        self.note(f"{prefix}.target", config["target"], "translated", f"lr_scheduler {name}{self.unlike_base_class()}")
        if "verbosity_interval" in arguments:
            verbosity = arguments.pop("verbosity_interval")
            note = "the learning rate is in metrics.jsonl"
            self.note(f"{prefix}.params.verbosity_interval", verbosity, "without effect", note)
        check_lr_lambda(name, arguments, f"{prefix}.params")
        for key, value in arguments.items():
            self.note(f"{prefix}.params.{key}", value, "translated", "lr_scheduler_args")
        self.training |= {"lr_scheduler": name, "lr_scheduler_args": arguments}

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
