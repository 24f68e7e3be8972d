"""Configurations of CompVis' classes: their words in, ours out, and a row for every key.

Names under ``target`` are looked up in a table by their last part; nothing is imported. Each key is translated, or
without effect here, or refused: `read_config` never drops one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers_ddpm_ext.compvis import targets
from diffusers_ddpm_ext.compvis.architecture import DEFAULTS, WITHOUT_EFFECT
from diffusers_ddpm_ext.compvis.rows import Row
from diffusers_ddpm_ext.compvis.yaml_file import load_yaml
from diffusers_ddpm_ext.stock_config import COMPVIS_SCHEDULES

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
CONDITIONING_KEYS = ("concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")
MISSING = object()


@dataclass(frozen=True)
class CompVisConfig:
    """A configuration, translated.

    Attributes:
        target: last part of the model's class.
        unet_params: keyword arguments of its UNetModel.
        schedule: keyword arguments of `DDPMExtScheduler`.
        objective: keyword arguments of `DDPMObjective`.
        conditioning_key: as the class resolves it; None for an unconditional model.
        use_ema: whether it keeps a moving average.
        latent: whether it works on latents of a first stage.
        scale_factor: by which latents are multiplied.
        image_size: of the samples, in their pixels.
        channels: of the samples.
        first_stage: target of the first stage.
        cond_stage: target of the conditioning stage.
        ucg: conditions left out at random while training: by batch key, probability and null value.
        training: the rest of what our trainer takes, by its flags' names.
        rows: what became of each key.
    """

    target: str
    unet_params: dict[str, Any]
    schedule: dict[str, Any]
    objective: dict[str, Any]
    conditioning_key: str | None
    use_ema: bool
    latent: bool
    scale_factor: float | None
    image_size: Any
    channels: int
    first_stage: str | None
    cond_stage: str | None
    ucg: dict[str, Any]
    training: dict[str, Any]
    rows: tuple[Row, ...] = ()


def read_config(source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True) -> CompVisConfig:
    """Translate a configuration.

    Args:
        source: a YAML file, or its content.
        strict: refuse what cannot be kept, by name; without it that stands in the rows.

    Returns:
        The translation.

    Raises:
        ValueError: the file is no configuration of a diffusion model, or (strict) a key is refused.
    """
    content = load_yaml(source) if not isinstance(source, Mapping) else source
    for key, value in leaves(content, ""):
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{key.lstrip('.')} {_short(value)!r} refers to another key: write the value itself.")
    reader = _Reader(content)
    config = reader.read()
    refused = [row for row in config.rows if row.fate == "refused"]
    if strict and refused:
        raise ValueError(f"{refused[0].key} {_short(refused[0].value)} is not supported: {refused[0].note}.")
    return config


class _Reader:
    """Goes through a configuration once, and notes what becomes of each key."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.rows: list[Row] = []
        self.training: dict[str, Any] = {}

    def note(self, key: str, value: Any, fate: Any, text: str) -> None:
        self.rows.append(Row(key, value, fate, text))

    def read(self) -> CompVisConfig:
        model = self.content.get("model")
        if not isinstance(model, Mapping) or not isinstance(model.get("target"), str):
            raise ValueError("The configuration has no section model with a target: it is none of CompVis'.")
        target = model["target"].rpartition(".")[2]
        params = _mapping(model.get("params"), "model.params")
        if target not in targets.MODELS:
            raise ValueError(targets.unknown_model(model["target"], target))
        self.note("model.target", model["target"], "translated", "the pipeline, its scheduler and objective")
        self.latent = targets.MODELS[target]
        self.params = params
        made = self._model(target, params)
        self._training_keys(model, params)
        for key in model:
            if key not in ("target", "params", "base_learning_rate", "scale_lr"):
                self.note(f"model.{key}", model[key], "refused", "no key of a model that is known here")
        for key in self.content:
            if key not in ("model", "data", "lightning"):
                self.note(key, self.content[key], "refused", "sections are model, data and lightning")
        self._around()
        return CompVisConfig(**made, training=self.training, rows=tuple(self.rows))

    # ---- model.params

    def take(self, name: str, default: Any, note: str, fate: str = "translated") -> Any:
        """Return a parameter, and note it where it stands in the file."""
        value = self.params.get(name, MISSING)
        if value is MISSING:
            return default
        self.note(f"model.params.{name}", value, fate, note)
        return value

    def _model(self, target: str, params: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {"target": target, "latent": self.latent}
        made["unet_params"] = self._unet(_mapping(params.get("unet_config"), "model.params.unet_config"))
        made["schedule"] = self._schedule()
        made["objective"] = self._objective()
        made["conditioning_key"] = self._conditioning()
        made["use_ema"] = bool(self.take("use_ema", True, "--use_ema; ema_decay 0.9999"))
        self.training["use_ema"] = made["use_ema"]
        made["scale_factor"] = self.take("scale_factor", 1.0 if self.latent else None, "kept in conversion.json")
        made["image_size"] = self.take("image_size", 256, "sample_size; --resolution")
        made["channels"] = self.take("channels", 3, "channels of a sample; --channels")
        made["first_stage"] = self._stage("first_stage_config", "decode latents with it")
        made["cond_stage"] = self._stage("cond_stage_config", "give its output as a condition")
        made["ucg"] = dict(_mapping(self.take("ucg_training", None, "--conditioning_dropout"), "ucg_training"))
        handled = {row.key.split(".")[2] for row in self.rows if row.key.startswith("model.params.")}
        for name in params:
            if name in handled or name in ("monitor", "scheduler_config"):
                continue
            if name in targets.START:
                self.training[name] = params[name]
                self.note(f"model.params.{name}", params[name], "translated", f"--{name}")
            elif name in targets.NO_EFFECT:
                self.note(f"model.params.{name}", params[name], "without effect", targets.NO_EFFECT[name])
            elif name in targets.REFUSED_UNLESS_NONE:
                fate = "without effect" if not params[name] else "refused"
                self.note(f"model.params.{name}", params[name], fate, targets.REFUSED_UNLESS_NONE[name])
            else:
                near = difflib.get_close_matches(name, targets.KNOWN_PARAMS, n=1)
                hint = f"did you mean {near[0]}" if near else "no parameter of these classes"
                self.note(f"model.params.{name}", params[name], "refused", hint)
        return made

    def _unet(self, unet: Mapping[str, Any]) -> dict[str, Any]:
        target = str(unet.get("target", ""))
        name = target.rpartition(".")[2]
        if name != "UNetModel":
            raise ValueError(
                f"model.params.unet_config.target {target!r} is not supported: "
                + targets.OTHER_NETWORKS.get(name, "the network must be a UNetModel.")
            )
        self.note("model.params.unet_config.target", target, "translated", "a Diffusers UNet")
        params = dict(_mapping(unet.get("params"), "model.params.unet_config.params"))
        for key, value in params.items():
            full = f"model.params.unet_config.params.{key}"
            if key in WITHOUT_EFFECT:
                self.note(full, value, "without effect", WITHOUT_EFFECT[key])
            elif key in DEFAULTS:
                self.note(full, value, "translated", "the network's configuration")
            else:
                near = difflib.get_close_matches(key, DEFAULTS, n=1)
                self.note(full, value, "refused", f"did you mean {near[0]}" if near else "no option of UNetModel")
        for key in unet:
            if key not in ("target", "params"):
                self.note(f"model.params.unet_config.{key}", unet[key], "refused", "no key of a network")
        return params

    def _schedule(self) -> dict[str, Any]:
        given = self.take("given_betas", None, "trained_betas")
        name = self.take("beta_schedule", "linear", "beta_schedule, in Diffusers' words")
        if name not in COMPVIS_SCHEDULES:
            raise ValueError(f"beta_schedule {name!r} is not one of {', '.join(COMPVIS_SCHEDULES)}.")
        parameterization = self.take("parameterization", "eps", "prediction_type")
        if parameterization not in PREDICTIONS:
            raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PREDICTIONS)}.")
        clip = bool(self.take("clip_denoised", True, "clip_sample" + (" (never, for latents)" if self.latent else "")))
        schedule: dict[str, Any] = {
            "num_train_timesteps": self.take("timesteps", 1000, "num_train_timesteps"),
            "beta_start": self.take("linear_start", 1e-4, "beta_start"),
            "beta_end": self.take("linear_end", 2e-2, "beta_end"),
            "beta_schedule": COMPVIS_SCHEDULES[name],
            "v_posterior": float(self.take("v_posterior", 0.0, "v_posterior")),
            "prediction_type": PREDICTIONS[parameterization],
            "clip_sample": clip and not self.latent,
        }
        cosine_s = self.take("cosine_s", 8e-3, "cosine_s")
        if name == "cosine":
            schedule["cosine_s"] = cosine_s
        if given is not None:
            schedule |= {"trained_betas": [float(beta) for beta in given], "num_train_timesteps": len(given)}
        return schedule

    def _objective(self) -> dict[str, Any]:
        kind = self.take("loss_type", "l2", "loss_type")
        if kind not in ("l1", "l2"):
            raise ValueError(f"loss_type {kind!r} is not one of l1, l2.")
        return {
            "loss_type": kind,
            "l_simple_weight": float(self.take("l_simple_weight", 1.0, "l_simple_weight")),
            "original_elbo_weight": float(
                self.take("original_elbo_weight", 0.0, "original_elbo_weight, with elbo_weights compvis")
            ),
            "elbo_weights": "compvis",
            "learn_logvar": bool(self.take("learn_logvar", False, "learn_logvar")),
            "logvar_init": float(self.take("logvar_init", 0.0, "logvar_init")),
        }

    def _conditioning(self) -> str | None:
        """The key as DDPM and LatentDiffusion resolve it."""
        key = self.take("conditioning_key", None, "conditioning_key")
        mode = self.take("concat_mode", True, "conditioning_key concat, where none is given")
        force = self.take("force_null_conditioning", False, "conditioning_key though there is no stage")
        if key is not None and key not in CONDITIONING_KEYS:
            raise ValueError(f"conditioning_key {key!r} is not one of {', '.join(CONDITIONING_KEYS)}.")
        if not self.latent:
            return key
        key = ("concat" if mode else "crossattn") if key is None else key
        unconditional = self.params.get("cond_stage_config") == "__is_unconditional__"
        return None if unconditional and not force else key

    def _stage(self, name: str, use: str) -> str | None:
        stage = self.params.get(name)
        if stage is None:
            return None
        target = stage.get("target") if isinstance(stage, Mapping) else stage
        if not isinstance(target, str):
            raise ValueError(f"model.params.{name} has no target.")
        last = target.rpartition(".")[2]
        if last == "ClassEmbedder":
            self.note(f"model.params.{name}", stage, "translated", "pipeline.class_embedder; class_labels choose rows")
        elif target in ("__is_unconditional__", "__is_first_stage__"):
            self.note(f"model.params.{name}", stage, "translated", "conditioning_key")
        else:
            self.note(f"model.params.{name}", stage, "without effect", f"{last} is no part of the pipeline: {use}")
        return target

    # ---- training

    def _training_keys(self, model: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        if "base_learning_rate" in model:
            self.training["learning_rate"] = float(model["base_learning_rate"])
            rate = model["base_learning_rate"]
            self.note("model.base_learning_rate", rate, "translated", "learning_rate, and lr_scaling")
        scale = model.get("scale_lr", True)
        self.training["lr_scaling"] = "linear" if scale else "none"
        if "scale_lr" in model:
            self.note("model.scale_lr", scale, "translated", "lr_scaling")
        if "monitor" in params:
            self._monitor(params["monitor"])
        if params.get("scheduler_config") is not None:
            self._course(_mapping(params["scheduler_config"], "model.params.scheduler_config"))
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
        given = dict(_mapping(course.get("params"), "model.params.scheduler_config.params"))
        verbosity = given.pop("verbosity_interval", None)
        if name not in targets.COURSES:
            known = ", ".join(targets.COURSES)
            self.note("model.params.scheduler_config.target", course.get("target"), "refused", f"known are {known}")
            return
        self.note("model.params.scheduler_config.target", course["target"], "translated", f"lr_scheduler {name}")
        for key, value in given.items():
            self.note(f"model.params.scheduler_config.params.{key}", value, "translated", "lr_scheduler_args")
        if verbosity is not None:
            key = "model.params.scheduler_config.params.verbosity_interval"
            self.note(key, verbosity, "without effect", "the rate is in metrics.jsonl")
        self.training |= {"lr_scheduler": name, "lr_scheduler_args": given}

    # ---- data, lightning

    def _around(self) -> None:
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


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {_short(value)}.")
    return value


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
