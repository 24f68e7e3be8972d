"""Configurations of CompVis' classes, translated to our options, with a report row for every key.

The last part of each ``target`` is looked up in a table; nothing is imported. Each key is translated, has no effect
here, or is refused: `read_compvis_config` never drops one silently. What only concerns training is refused where a run
is made of the configuration, and has no effect where a checkpoint is converted.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers_ddpm_ext.compvis.architecture import UNET_DEFAULTS, UNET_PARAMS_WITHOUT_EFFECT
from diffusers_ddpm_ext.compvis.config import targets
from diffusers_ddpm_ext.compvis.config.condition_dropout import number_of_classes, read_condition_dropout
from diffusers_ddpm_ext.compvis.config.references import resolve_references
from diffusers_ddpm_ext.compvis.config.run_keys import RunKeyReader, as_mapping
from diffusers_ddpm_ext.compvis.config.text_stage import read_text_stage
from diffusers_ddpm_ext.compvis.schema import (
    BOOLEAN,
    LEARNING_RATE_TYPES,
    MODEL_PARAM_TYPES,
    REFERENCE,
    REFERENCE_ERROR,
    TRAINING_PARAMS,
    ConfigRow,
    Fate,
    check_values,
    one_line,
)
from diffusers_ddpm_ext.utils.vocabulary import (
    CLASS_TOKEN_KEYS,
    CONDITIONING_KEYS,
    FROM_COMPVIS_BETA_SCHEDULE,
    FROM_COMPVIS_PREDICTION_TYPE,
    REQUIRED_CONDITIONS,
    ConcatThroughVae,
)
from diffusers_ddpm_ext.utils.yaml_io import load_compvis_yaml

FIRST_STAGE = "model.params.first_stage_config"
NO_KEY = ("none", "null", "~", "")  # a text in a file whose author meant nothing
LOSS_PARAMS = ("loss_type", "l_simple_weight", "original_elbo_weight")
UNCONDITIONAL_STAGE, FIRST_STAGE_AS_CONDITION = "__is_unconditional__", "__is_first_stage__"


@dataclass(frozen=True)
class SampleFormat:
    """Samples that a model generates.

    Attributes:
        latent: whether they are latents of a first stage.
        scale_factor: factor of the latents; None for images.
        scale_by_std: whether the factor was measured in training, so that only the checkpoint has it.
        image_size: height and width, or both in one value.
        channels: number of channels.
    """

    latent: bool
    scale_factor: float | None
    scale_by_std: bool
    image_size: Any
    channels: int


@dataclass(frozen=True)
class CompVisConfig:
    """A translated configuration.

    Attributes:
        target: last part of the model's class.
        unet_params: keyword arguments of its UNetModel.
        schedule: keyword arguments of `DDPMExtScheduler`.
        objective: keyword arguments of `DDPMObjective`.
        conditioning_key: as the class resolves it; None for an unconditional model.
        use_ema: whether it has an EMA.
        samples: format of its samples.
        first_stage: configuration of the first stage, as in the file; None if the samples are images.
        cond_stage: target of the conditioning stage.
        ucg: conditions dropped at random in training: by batch key, probability and null value.
        training: other options of our trainer, by name.
        rows: one per key of the configuration.
    """

    target: str
    unet_params: dict[str, Any]
    schedule: dict[str, Any]
    objective: dict[str, Any]
    conditioning_key: str | None
    use_ema: bool
    samples: SampleFormat
    first_stage: Mapping[str, Any] | None
    cond_stage: str | None
    ucg: dict[str, Any]
    training: dict[str, Any]
    rows: tuple[ConfigRow, ...] = ()

    def section(self, name: str) -> Any:
        """A section of ``model.params``, such as ``cond_stage_config``, as in the file; None if it has none."""
        return next((row.value for row in self.rows if row.key == f"model.params.{name}"), None)

    @property
    def embeds_classes(self) -> bool:
        """Whether a class becomes a token of cross attention, by CompVis' ``ClassEmbedder``."""
        return str(self.cond_stage).rpartition(".")[2] == "ClassEmbedder"

    @property
    def subclass(self) -> dict[str, Any]:
        """Target and own parameters of a class other than LatentDiffusion and its base class; else empty."""
        path = str(next(row.value for row in self.rows if row.key == "model.target"))
        if self.target in ("DDPM", "LatentDiffusion") and path.split(".")[-2:-1] != ["ddpm_edit"]:
            return {}
        own = {row.key.removeprefix("model.params."): row.value for row in self.rows}
        params = {name: own[name] for name in targets.SUBCLASS_PARAMS if name in own}
        # Null: the class would widen the input layer of a checkpoint that it is given.
        return {
            "target": path,
            "params": params | ({"finetune_keys": None} if self.target in targets.FINETUNED else {}),
        }

    @property
    def concat_through_vae(self) -> ConcatThroughVae | None:
        """How a concatenated condition goes through the first stage: its own, unscaled mode, or a scaled sample."""
        if not self.samples.latent or "concat_inputs" not in REQUIRED_CONDITIONS[self.conditioning_key]:
            return None
        if self.target == "LatentInpaintDiffusion":
            return "sample"
        path = next(str(row.value) for row in self.rows if row.key == "model.target")
        edits = path.split(".")[-2:-1] == ["ddpm_edit"]  # InstructPix2Pix' LatentDiffusion
        return "mode" if edits or self.cond_stage == FIRST_STAGE_AS_CONDITION else None


def read_compvis_config(
    source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True, for_training: bool = True
) -> CompVisConfig:
    """Translate a CompVis configuration.

    Args:
        source: a YAML file, or its content.
        strict: raise an error for refused keys; otherwise they are only in ``rows``.
        for_training: whether a run is made of it; otherwise keys that only concern training are neither checked nor
            refused.

    Raises:
        ValueError: the file is not a configuration of a diffusion model, or (strict) a key is refused.
    """
    content = load_compvis_yaml(source) if not isinstance(source, Mapping) else source
    config = _ConfigReader(resolve_references(content), for_training).read()
    for row in config.rows:
        if row.fate == "translated" and not isinstance(row.value, Mapping) and REFERENCE in str(row.value):
            raise ValueError(f"{one_line(row.key, 200)} {one_line(row.value)!r} {REFERENCE_ERROR}")
    refused = [row for row in config.rows if row.fate == "refused"]
    if strict and refused:
        raise ValueError(
            f"{one_line(refused[0].key, 200)} {one_line(refused[0].value)} is not supported: {refused[0].note}."
        )
    return config


class _ConfigReader(RunKeyReader):
    """Reads a configuration once, and adds a row for each key."""

    def read(self) -> CompVisConfig:
        model = self.content.get("model")
        if not isinstance(model, Mapping) or not isinstance(model.get("target"), str):
            raise ValueError("The configuration has no section model with a target: it is not one of CompVis'.")
        target = model["target"].rpartition(".")[2]
        if target not in targets.IS_LATENT:
            raise ValueError(targets.unknown_model(one_line(model["target"], 200), target))
        params = as_mapping(model.get("params"), "model.params")
        types = MODEL_PARAM_TYPES
        if not self.for_training:
            types = {name: allowed for name, allowed in types.items() if name not in TRAINING_PARAMS}
        self.params = check_values(params, types, "model.params.")
        self.note("model.target", model["target"], "translated", "the pipeline, its scheduler and objective")
        self.latent = targets.IS_LATENT[target]
        translated = self._read_params()
        self.read_training_keys(model)
        for key in model:
            if key not in ("target", "params", *LEARNING_RATE_TYPES):
                self.note_training(f"model.{key}", model[key], "not a known key of a model")
        for key in self.content:
            if key not in ("model", "data", "lightning"):
                self.note_training(str(key), self.content[key], "sections are model, data and lightning")
        self.read_run_sections()
        return CompVisConfig(target=target, **translated, training=self.training, rows=tuple(self.rows))

    # ---- model.params

    def param(self, name: str, default: Any, note: str, fate: Fate = "translated") -> Any:
        """Return a parameter; add a row if the file has it."""
        if name not in self.params:
            return default
        self.note(f"model.params.{name}", self.params[name], fate, note)
        return self.params[name]

    def _read_params(self) -> dict[str, Any]:
        unet_params = self._unet(as_mapping(self.params.get("unet_config"), "model.params.unet_config"))
        schedule, key = self._schedule(), self._conditioning_key()
        objective = self.training_only(self._losses, {}, "model.params", LOSS_PARAMS, self.params) | self._logvar()
        use_ema = bool(self.param("use_ema", True, "--use_ema; ema_decay 0.9999"))
        self.training["use_ema"] = use_ema
        samples = SampleFormat(
            self._has_first_stage(),
            self.param("scale_factor", 1.0 if self.latent else None, "scaling_factor of pipeline.vae"),
            bool(self.param("scale_by_std", False, "scale_factor of the checkpoint")) and self.latent,
            self.param("image_size", 256, "sample_size; --resolution"),
            self.param("channels", 3, "channels of a sample; --channels"),
        )
        self._stage("first_stage_config")
        cond_stage = self._stage("cond_stage_config")
        read_ucg = partial(read_condition_dropout, self, key, cond_stage)
        ucg = self.training_only(read_ucg, {}, "model.params", ("ucg_training",), self.params)
        if str(cond_stage).rpartition(".")[2] == "ClassEmbedder" and key in CLASS_TOKEN_KEYS and self.for_training:
            self.training["num_class_embeds"] = number_of_classes(self)
        self._read_other_params(key)
        return {
            "unet_params": unet_params,
            "schedule": schedule,
            "objective": objective,
            "conditioning_key": key,
            "use_ema": use_ema,
            "samples": samples,
            "first_stage": as_mapping(self.params.get("first_stage_config"), FIRST_STAGE) if samples.latent else None,
            "cond_stage": cond_stage,
            "ucg": ucg,
        }

    def _read_other_params(self, conditioning_key: str | None) -> None:
        """Add a row for each parameter that has none yet."""
        noted = {row.key.split(".")[2] for row in self.rows if row.key.startswith("model.params.")}
        for name, value in self.params.items():
            if name in noted or name in ("monitor", "scheduler_config", "ucg_training"):
                continue
            fate: Fate = "without effect"
            if not self.for_training and name in TRAINING_PARAMS:
                note = "only used in training"
            elif name == "num_timesteps_cond":
                fate, note = self._num_timesteps_cond(value, conditioning_key)
            elif name == "cond_stage_trainable":
                fate, note = self._stage_training(value)
            elif name in targets.NEEDS_CKPT_PATH and not self.params.get("ckpt_path"):
                note = "there is no ckpt_path"
            elif name in targets.START_PARAMS:
                self.training[name] = bool(value) if MODEL_PARAM_TYPES[name] is BOOLEAN else value
                fate, note = "translated", f"--{name}"
            elif name == "embedder_config" and _class_name(value) in targets.CONDITIONERS:
                fate, note = "translated", targets.CONDITIONERS[_class_name(value)]
            elif name in targets.PARAMS_WITHOUT_EFFECT:
                note = targets.PARAMS_WITHOUT_EFFECT[name]
            elif name in targets.PARAMS_REFUSED_UNLESS_EMPTY:
                fate = "refused" if value and self.for_training else fate
                note = targets.PARAMS_REFUSED_UNLESS_EMPTY[name]
            else:
                fate, note = "refused", suggestion(name, targets.KNOWN_PARAMS, "not a parameter of these classes")
            self.note(f"model.params.{name}", value, fate, note)

    def _stage_training(self, is_trained: Any) -> tuple[Fate, str]:
        """Fate of training the conditioning stage with the network."""
        section = self.params.get("cond_stage_config")
        stage = read_text_stage(section)
        if stage is None:
            target = str(section.get("target")) if isinstance(section, Mapping) else ""
            if target.endswith("ClassEmbedder"):
                return "without effect", "--class_column: the tokens of classes are always trained"
            return "without effect", "only text encoders are trained here"
        if is_trained and stage.is_frozen:
            return "without effect", "the class freezes its weights (freeze)"
        if is_trained:
            self.training["train_text_encoder"] = True
        return "translated", "--train_text_encoder"

    def _num_timesteps_cond(self, count: Any, conditioning_key: str | None) -> tuple[Fate, str]:
        """Fate of the number of steps at which LatentDiffusion noises the condition, in training and sampling."""
        if count in (None, 1):
            return "without effect", "the condition is not noised"
        if not self.latent or conditioning_key is None:
            return "without effect", "there is no condition"
        return "refused", "it noises the condition at each step, which nothing here does: only 1 is supported"

    def _unet(self, unet: Mapping[str, Any]) -> dict[str, Any]:
        target = str(unet.get("target", ""))
        name = target.rpartition(".")[2]
        if name != "UNetModel":
            raise ValueError(
                f"model.params.unet_config.target {one_line(repr(target))} is not supported: "
                + targets.OTHER_NETWORKS.get(name, "the network must be a UNetModel.")
            )
        self.note("model.params.unet_config.target", target, "translated", "a Diffusers UNet")
        params = dict(as_mapping(unet.get("params"), "model.params.unet_config.params"))
        for key, value in params.items():
            full = f"model.params.unet_config.params.{key}"
            if key in UNET_PARAMS_WITHOUT_EFFECT:
                self.note(full, value, "without effect", UNET_PARAMS_WITHOUT_EFFECT[key])
            elif key in UNET_DEFAULTS:
                self.note(full, value, "translated", "the network's configuration")
            else:
                self.note(full, value, "refused", suggestion(key, UNET_DEFAULTS, "not an option of UNetModel"))
        for key in unet:
            if key not in ("target", "params"):
                self.note_training(f"model.params.unet_config.{key}", unet[key], "not a key of a network")
        return params

    def _schedule(self) -> dict[str, Any]:
        given_betas = self.param("given_betas", None, "trained_betas")
        name = self.param("beta_schedule", "linear", "beta_schedule, under Diffusers' name")
        _check_choice("beta_schedule", name, FROM_COMPVIS_BETA_SCHEDULE)
        parameterization = self.param("parameterization", "eps", "prediction_type")
        _check_choice("parameterization", parameterization, FROM_COMPVIS_PREDICTION_TYPE)
        clip = self.param("clip_denoised", True, "clip_sample" + (" (never, for latents)" if self.latent else ""))
        schedule: dict[str, Any] = {
            "num_train_timesteps": self.param("timesteps", 1000, "num_train_timesteps"),
            "beta_start": self.param("linear_start", 1e-4, "beta_start"),
            "beta_end": self.param("linear_end", 2e-2, "beta_end"),
            "beta_schedule": FROM_COMPVIS_BETA_SCHEDULE[name],
            "v_posterior": float(self.param("v_posterior", 0.0, "v_posterior")),
            "prediction_type": FROM_COMPVIS_PREDICTION_TYPE[parameterization],
            "clip_sample": bool(clip) and not self.latent,
        }
        cosine_s = self.param("cosine_s", 8e-3, "cosine_s")
        if name == "cosine":
            schedule["cosine_s"] = cosine_s
        if given_betas is not None:
            betas = [float(beta) for beta in given_betas]
            schedule |= {"trained_betas": betas, "num_train_timesteps": len(betas)}
        return schedule

    def _losses(self) -> dict[str, Any]:
        loss_type = self.param("loss_type", "l2", "loss_type")
        _check_choice("loss_type", loss_type, ("l1", "l2"))
        elbo_note = "original_elbo_weight, with elbo_weights compvis"
        return {
            "loss_type": loss_type,
            "l_simple_weight": float(self.param("l_simple_weight", 1.0, "l_simple_weight")),
            "original_elbo_weight": float(self.param("original_elbo_weight", 0.0, elbo_note)),
            "elbo_weights": "compvis",
        }

    def _logvar(self) -> dict[str, Any]:
        return {
            "learn_logvar": bool(self.param("learn_logvar", False, "learn_logvar" + self.unlike_base_class())),
            "logvar_init": float(self.param("logvar_init", 0.0, "logvar_init")),
        }

    def _conditioning_key(self) -> str | None:
        """The key as DDPM and LatentDiffusion resolve it."""
        key: str | None = self.param("conditioning_key", None, "conditioning_key")
        concat = self.param("concat_mode", True, "conditioning_key concat, if none is set")
        force = self.param("force_null_conditioning", False, "conditioning_key, even without a stage")
        stage = self.params.get("cond_stage_config")
        dropped = self.latent and stage == UNCONDITIONAL_STAGE and not force
        if key is not None and key.lower() in NO_KEY and (dropped or not self.latent or stage is None):
            key = None
        if key is not None:
            _check_choice("conditioning_key", key, CONDITIONING_KEYS)
        if not self.latent or (stage is None and "cond_stage_config" in self.params):
            return key
        return None if dropped else key or ("concat" if concat else "crossattn")

    def _has_first_stage(self) -> bool:
        """Whether the samples are latents of an autoencoder, not images."""
        stage = self.params.get("first_stage_config")
        target = str(stage.get("target")) if isinstance(stage, Mapping) else ""
        empty = stage is None and "first_stage_config" in self.params
        return self.latent and not empty and target.rpartition(".")[2] != targets.IDENTITY_FIRST_STAGE

    def _stage(self, name: str) -> str | None:
        stage = self.params.get(name)
        if stage is None:
            if name in self.params:
                self.note(f"model.params.{name}", None, "translated", "there is no such stage")
            return None
        target = stage.get("target") if isinstance(stage, Mapping) else stage
        if not isinstance(target, str):
            raise ValueError(f"model.params.{name} has no target.")
        last = target.rpartition(".")[2]
        fate: Fate = "translated"
        if name == "first_stage_config":
            note = "pipeline.vae; --vae" if self._has_first_stage() else "the samples are images"
        elif last == "ClassEmbedder":
            note = "pipeline.class_embedder; class_labels choose rows"
        elif target in (UNCONDITIONAL_STAGE, FIRST_STAGE_AS_CONDITION):
            note = "conditioning_key"
        elif last in targets.CONDITIONERS:
            note = targets.CONDITIONERS[last]
        else:
            fate, note = "without effect", f"{last} is not part of the pipeline: pass its output as a condition"
        self.note(f"model.params.{name}", stage, fate, note)
        return target


def _class_name(section: Any) -> str:
    """The last part of the target of a section."""
    return str(section.get("target")).rpartition(".")[2] if isinstance(section, Mapping) else ""


def suggestion(name: object, known: Mapping[str, Any] | tuple[str, ...], otherwise: str) -> str:
    """A note with the known name that is most similar to an unknown one."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]}" if near else otherwise


def _check_choice(name: str, value: Any, allowed: Mapping[str, Any] | tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {one_line(repr(value))} is not one of {', '.join(allowed)}.")
