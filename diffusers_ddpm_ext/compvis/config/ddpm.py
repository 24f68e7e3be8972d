"""Configurations of CompVis' classes: their words in, ours out, and a row for every key.

Names under ``target`` are looked up in a table by their last part; nothing is imported. Each key is translated, or
without effect here, or refused: `read_config` never drops one.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers_ddpm_ext.compvis import schema as kinds
from diffusers_ddpm_ext.compvis.architecture import DEFAULTS, WITHOUT_EFFECT
from diffusers_ddpm_ext.compvis.config import targets
from diffusers_ddpm_ext.compvis.config.run_keys import RunKeys, leaves, mapping
from diffusers_ddpm_ext.compvis.schema import Fate, Row, short
from diffusers_ddpm_ext.models.conditioning import REQUIRED_CONDITIONS
from diffusers_ddpm_ext.utils.vocabulary import (
    CONDITIONING_KEYS,
    FROM_COMPVIS_BETA_SCHEDULE,
    FROM_COMPVIS_PREDICTION_TYPE,
)
from diffusers_ddpm_ext.utils.yaml_io import load_compvis_yaml

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
    content = load_compvis_yaml(source) if not isinstance(source, Mapping) else source
    try:
        entries = list(leaves(content, ""))
    except RecursionError:
        raise ValueError("The configuration contains itself: write its values out.") from None
    for key, value in entries:
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{key.lstrip('.')} {short(value)!r} refers to another key: write the value itself.")
    reader = _Reader(content)
    config = reader.read()
    refused = [row for row in config.rows if row.fate == "refused"]
    if strict and refused:
        raise ValueError(
            f"{short(refused[0].key, 200)} {short(refused[0].value)} is not supported: {refused[0].note}."
        )
    return config


class _Reader(RunKeys):
    """Goes through a configuration once, and notes what becomes of each key."""

    def read(self) -> CompVisConfig:
        model = self.content.get("model")
        if not isinstance(model, Mapping) or not isinstance(model.get("target"), str):
            raise ValueError("The configuration has no section model with a target: it is none of CompVis'.")
        target = model["target"].rpartition(".")[2]
        if target not in targets.MODELS:
            raise ValueError(targets.unknown_model(short(model["target"], 200), target))
        model = kinds.checked(model, kinds.RATE, "model.")
        params = kinds.checked(mapping(model.get("params"), "model.params"), kinds.MODEL, "model.params.")
        self.note("model.target", model["target"], "translated", "the pipeline, its scheduler and objective")
        self.latent = targets.MODELS[target]
        self.params = params
        made = self._model(target, params)
        self.training_keys(model, params)
        for key in model:
            if key not in ("target", "params", "base_learning_rate", "scale_lr"):
                self.note(f"model.{key}", model[key], "refused", "no key of a model that is known here")
        for key in self.content:
            if key not in ("model", "data", "lightning"):
                self.note(key, self.content[key], "refused", "sections are model, data and lightning")
        self.around()
        return CompVisConfig(**made, training=self.training, rows=tuple(self.rows))

    # ---- model.params

    def take(self, name: str, default: Any, note: str, fate: Fate = "translated") -> Any:
        """Return a parameter, and note it where it stands in the file."""
        value = self.params.get(name, MISSING)
        if value is MISSING:
            return default
        self.note(f"model.params.{name}", value, fate, note)
        return value

    def _model(self, target: str, params: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {"target": target, "latent": self.latent}
        made["unet_params"] = self._unet(mapping(params.get("unet_config"), "model.params.unet_config"))
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
        made["ucg"] = self._dropout(made["conditioning_key"], made["cond_stage"])
        handled = {row.key.split(".")[2] for row in self.rows if row.key.startswith("model.params.")}
        for name in params:
            if name in handled or name in ("monitor", "scheduler_config", "ucg_training"):
                continue
            if name in targets.START and name in targets.OF_A_START and not params.get("ckpt_path"):
                self.note(f"model.params.{name}", params[name], "without effect", "there is no ckpt_path")
            elif name in targets.START:
                switch = kinds.MODEL[name] is kinds.SWITCH
                self.training[name] = bool(params[name]) if switch else params[name]
                self.note(f"model.params.{name}", params[name], "translated", f"--{name}")
            elif name in targets.NO_EFFECT:
                self.note(f"model.params.{name}", params[name], "without effect", targets.NO_EFFECT[name])
            elif name in targets.REFUSED_UNLESS_NONE:
                fate: Fate = "without effect" if not params[name] else "refused"
                self.note(f"model.params.{name}", params[name], fate, targets.REFUSED_UNLESS_NONE[name])
            else:
                near = difflib.get_close_matches(str(name), targets.KNOWN_PARAMS, n=1)
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
        params = dict(mapping(unet.get("params"), "model.params.unet_config.params"))
        for key, value in params.items():
            full = f"model.params.unet_config.params.{key}"
            if key in WITHOUT_EFFECT:
                self.note(full, value, "without effect", WITHOUT_EFFECT[key])
            elif key in DEFAULTS:
                self.note(full, value, "translated", "the network's configuration")
            else:
                near = difflib.get_close_matches(str(key), DEFAULTS, n=1)
                self.note(full, value, "refused", f"did you mean {near[0]}" if near else "no option of UNetModel")
        for key in unet:
            if key not in ("target", "params"):
                self.note(f"model.params.unet_config.{key}", unet[key], "refused", "no key of a network")
        return params

    def _schedule(self) -> dict[str, Any]:
        given = self.take("given_betas", None, "trained_betas")
        name = self.take("beta_schedule", "linear", "beta_schedule, in Diffusers' words")
        if name not in FROM_COMPVIS_BETA_SCHEDULE:
            raise ValueError(f"beta_schedule {name!r} is not one of {', '.join(FROM_COMPVIS_BETA_SCHEDULE)}.")
        parameterization = self.take("parameterization", "eps", "prediction_type")
        if parameterization not in FROM_COMPVIS_PREDICTION_TYPE:
            raise ValueError(
                f"parameterization {parameterization!r} is not one of {', '.join(FROM_COMPVIS_PREDICTION_TYPE)}."
            )
        clip = bool(self.take("clip_denoised", True, "clip_sample" + (" (never, for latents)" if self.latent else "")))
        schedule: dict[str, Any] = {
            "num_train_timesteps": self.take("timesteps", 1000, "num_train_timesteps"),
            "beta_start": self.take("linear_start", 1e-4, "beta_start"),
            "beta_end": self.take("linear_end", 2e-2, "beta_end"),
            "beta_schedule": FROM_COMPVIS_BETA_SCHEDULE[name],
            "v_posterior": float(self.take("v_posterior", 0.0, "v_posterior")),
            "prediction_type": FROM_COMPVIS_PREDICTION_TYPE[parameterization],
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
            "learn_logvar": bool(self.take("learn_logvar", False, "learn_logvar" + self.unlike_the_base())),
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

    def _dropout(self, key: str | None, stage: str | None) -> dict[str, Any]:
        """Conditions left out: here of what the network is given, there of what a conditioning stage is given."""
        given = dict(mapping(self.params.get("ucg_training"), "model.params.ucg_training"))
        direct = not self.latent or str(stage).rpartition(".")[2] == "Identity"
        dropout = {}
        for name, entry in given.items():
            full = f"model.params.ucg_training.{name}"
            entry = kinds.checked(mapping(entry, full), kinds.DROPOUT, f"{full}.")
            if "p" not in entry:
                raise ValueError(f"{full} lacks p, the probability.")
            own = not self.latent or name == self.params.get("cond_stage_key", "image")
            if direct and own and len(REQUIRED_CONDITIONS[key]) == 1 and not isinstance(entry.get("val"), str):
                dropout[REQUIRED_CONDITIONS[key][0]] = {k: entry[k] for k in ("p", "val") if entry.get(k) is not None}
                self.note(full, given[name], "translated", f"--conditioning_dropout of {REQUIRED_CONDITIONS[key][0]}")
            else:
                why = "there it replaces what a stage is given; --conditioning_dropout what the network is given"
                self.note(full, given[name], "without effect", why if key else "there is no condition")
        if not given and "ucg_training" in self.params:
            self.note("model.params.ucg_training", self.params["ucg_training"], "translated", "no dropout")
        if dropout:
            self.training["conditioning_dropout"] = dropout
        return given

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
