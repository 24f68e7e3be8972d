"""First and conditioning stages of a pipeline, in the terms of the original's LatentDiffusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.config.ddpm import FIRST_STAGE_AS_CONDITION, UNCONDITIONAL_STAGE
from diffusers_ddpm_ext.compvis.config.run_keys import as_mapping
from diffusers_ddpm_ext.compvis.config.targets import IS_LATENT
from diffusers_ddpm_ext.compvis.export_conditioners import conditioner_tensors, conditioning_stages
from diffusers_ddpm_ext.compvis.first_stage.arguments import original_config
from diffusers_ddpm_ext.compvis.first_stage.checkpoint_keys import CONDITION_PREFIX, FIRST_STAGE_PREFIX
from diffusers_ddpm_ext.compvis.first_stage.weights import export_first_stage
from diffusers_ddpm_ext.compvis.reader.archive import PathLike
from diffusers_ddpm_ext.compvis.schema import (
    CONDITION_STAGE,
    FIRST_STAGE_SECTION,
    MODEL_CLASS,
    REPORT_FILE,
    SCALE_FACTOR_BUFFER,
    one_line,
)
from diffusers_ddpm_ext.compvis.state_dict import CLASS_EMBEDDING_KEY
from diffusers_ddpm_ext.models.first_stage import load_first_stage
from diffusers_ddpm_ext.models.fold_scale import fold_scale, reason_not_to_fold
from diffusers_ddpm_ext.models.latent_scale import SCALE_KEYS
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.utils.input_files import exists, read_json_object
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX
from diffusers_ddpm_ext.utils.wrappers import unwrap

CLASS_EMBEDDER, IDENTITY_STAGE = "ldm.modules.encoders.modules.ClassEmbedder", "torch.nn.Identity"
IDENTITY_FIRST_STAGE = "ldm.models.autoencoder.IdentityFirstStage"
CLASS_KEY, CAPTION_KEY = "class_label", "caption"


def read_facts(folder: Path) -> dict[str, Any]:
    """What a conversion recorded besides the tensors; empty if the folder is not a converted checkpoint."""
    path = folder / REPORT_FILE
    return read_json_object(path).object("facts").content if exists(path) else {}


def bare_first_stage(source: DDPMExtPipeline | nn.Module | PathLike) -> tuple[nn.Module, Any] | None:
    """An autoencoder to export alone, and the configuration recorded when it was converted; None for a pipeline.

    Args:
        source: a pipeline, an autoencoder, or the folder of either.

    Raises:
        ValueError: the folder's autoencoder cannot be read.
    """
    if isinstance(source, AutoencoderKL | VQModel):
        return source, None
    if isinstance(source, DDPMExtPipeline | nn.Module):
        return None
    folder = Path(source)
    if (folder / MODEL_INDEX).is_file() or not (folder / "config.json").is_file():
        return None
    return load_first_stage(folder), read_facts(folder).get(FIRST_STAGE_SECTION)


def stage_tensors(
    pipeline: DDPMExtPipeline, facts: Mapping[str, Any], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The first stage, again where it is the conditioning stage too, other conditioning stages, and the factor.

    Args:
        pipeline: to export.
        facts: what its conversion recorded.
        base: tensors of another original checkpoint, for what a conditioning stage here does not have.

    Raises:
        ValueError: the original's classes cannot express a stage, or tensors of ``base`` are needed.
    """
    state: dict[str, Tensor] = {}
    factor = pipeline.config.get("latent_scaling_factor")
    if pipeline.vae is not None:
        autoencoder = _with_scale_alone(pipeline)
        weights = export_first_stage(autoencoder, facts.get(FIRST_STAGE_SECTION))
        state |= {FIRST_STAGE_PREFIX + name: tensor for name, tensor in weights.items()}
        if _condition_stage(pipeline, facts) == FIRST_STAGE_AS_CONDITION:
            state |= {CONDITION_PREFIX + name: tensor for name, tensor in weights.items()}
        factor = float(autoencoder.config.scaling_factor)
    state |= conditioner_tensors(pipeline, facts, base)
    if pipeline.class_embedder is not None:
        state[CLASS_EMBEDDING_KEY] = pipeline.class_embedder
    if facts.get(SCALE_FACTOR_BUFFER) and factor is not None:
        state["scale_factor"] = torch.tensor(factor, dtype=torch.float32)
    return state


def has_stages(pipeline: DDPMExtPipeline, facts: Mapping[str, Any], base: Mapping[str, Tensor]) -> bool:
    """Whether a pipeline is a LatentDiffusion of the original, not its base class; arguments as `stage_params`."""
    return pipeline.vae is not None or bool(conditioning_stages(pipeline, facts, base))


def subclass(facts: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Target and own parameters of the recorded class, if it is another one than LatentDiffusion.

    Raises:
        ValueError: the record is damaged.
    """
    where = f"{REPORT_FILE} facts.{MODEL_CLASS}"
    recorded = as_mapping(facts.get(MODEL_CLASS), where)
    if not recorded:
        return None
    target = str(recorded.get("target"))
    if not IS_LATENT.get(target.rpartition(".")[2]):
        raise ValueError(f"{where}.target is {one_line(target)}, no known class: convert the checkpoint again.")
    return target, dict(as_mapping(recorded.get("params"), f"{where}.params"))


def stage_params(pipeline: DDPMExtPipeline, facts: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parameters of LatentDiffusion, besides those of its base class, for a pipeline with stages.

    Args:
        pipeline: to export.
        facts: what its conversion recorded.
        base: as in `stage_tensors`.

    Raises:
        ValueError: the original's classes cannot express a stage.
    """
    target, more = _condition_stage(pipeline, facts), {}
    stage: Any = target if target in (UNCONDITIONAL_STAGE, FIRST_STAGE_AS_CONDITION) else {"target": target}
    if target.endswith(".ClassEmbedder") and pipeline.class_embedder is not None:
        classes, width = pipeline.class_embedder.shape
        stage["params"] = {"embed_dim": width, "n_classes": classes, "key": CLASS_KEY}
        more = {"cond_stage_key": CLASS_KEY}
    if pipeline.text_encoder is not None:
        more = {"cond_stage_key": CAPTION_KEY}
    measured = bool(facts.get(SCALE_FACTOR_BUFFER))
    if pipeline.vae is None:
        factor, first = pipeline.config.get("latent_scaling_factor") or 1.0, {"target": IDENTITY_FIRST_STAGE}
    else:
        autoencoder = _with_scale_alone(pipeline)
        factor = float(autoencoder.config.scaling_factor)
        first = original_config(autoencoder, facts.get(FIRST_STAGE_SECTION)).section
    return {
        "scale_factor": 1.0 if measured else factor,
        "scale_by_std": measured,
        "first_stage_config": first,
        "cond_stage_config": stage,
        **more,
        **{each.name: each.section for each in conditioning_stages(pipeline, facts, base)},
    }


def _condition_stage(pipeline: DDPMExtPipeline, facts: Mapping[str, Any]) -> str:
    """Target of the original's conditioning stage: the recorded one, or what the pipeline's settings mean."""
    if pipeline.config.get("conditioning_key") is None:
        return UNCONDITIONAL_STAGE
    if CONDITION_STAGE in facts:
        return str(facts[CONDITION_STAGE])
    if pipeline.class_embedder is not None:
        return CLASS_EMBEDDER
    return FIRST_STAGE_AS_CONDITION if pipeline.config.get("concat_through_vae") == "mode" else IDENTITY_STAGE


def _with_scale_alone(pipeline: DDPMExtPipeline) -> Any:
    """The autoencoder, with the mean and standard deviation of its latents, if it has them, folded into its weights.

    Not where a condition is its unscaled latents, which folding changes: exporting it refuses these settings.
    """
    module: Any = unwrap(pipeline.vae)
    if pipeline.config.get("concat_through_vae") == "mode":
        return module
    has_more = any(module.config.get(key) is not None for key in SCALE_KEYS if key != "scaling_factor")
    can_fold = isinstance(module, AutoencoderKL | VQModel) and has_more and not reason_not_to_fold(module)
    return fold_scale(module) if can_fold else module
