"""Checks of a pipeline's folder before Diffusers builds anything from it: each fault one sentence."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin, SchedulerMixin

from diffusers_ddpm_ext.diffusion.schedule import MAX_TRAIN_TIMESTEPS
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.models.latent_scale import KINDS, SLOTS, compression_factor
from diffusers_ddpm_ext.models.text_kinds import ENCODER_SLOTS
from diffusers_ddpm_ext.models.text_kinds import KINDS as TEXT_KINDS
from diffusers_ddpm_ext.pipelines.condition_encoders import VISION_CLASSES
from diffusers_ddpm_ext.utils.input_files import JsonObject, read_json_object
from diffusers_ddpm_ext.utils.network_folder import (
    as_folder_error,
    check_all_used,
    check_complete,
    check_network_folder,
)
from diffusers_ddpm_ext.utils.pipeline_files import MODEL_INDEX
from diffusers_ddpm_ext.utils.text_encoder_folder import check_text_encoder_folder
from diffusers_ddpm_ext.utils.wrappers import unwrap


def check_pipeline_folder(folder: Path, variant: str | None, replaced: frozenset[str] = frozenset()) -> None:
    """Check the configurations of a pipeline's folder, and the indexes of its weights.

    Args:
        folder: a local one.
        variant: of the weights that will be loaded.
        replaced: components that the caller passes instead of the folder's.

    Raises:
        ConfigError: a file is damaged, or describes something that cannot be loaded or is absurdly large.
    """
    if not (folder / MODEL_INDEX).is_file():
        return  # Diffusers explains what such a folder is
    index = read_json_object(folder / MODEL_INDEX)
    index.string("_class_name")
    for name, base in (("unet", ModelMixin), ("scheduler", SchedulerMixin)):
        if name not in replaced:
            _check_component(index, name, base)
    slots = [slot for slot in SLOTS if any(index.list(slot, []))]
    for slot in slots if replaced.isdisjoint(SLOTS) else []:
        _check_first_stage(index, slot)
    if len(slots) > 1:
        raise ConfigError(f"{index.name} has vae and vqvae; they are two names of the one first stage: remove one.")
    _check_encoders(index, folder, replaced)
    for name in ("unet", *slots):
        if name not in replaced and (folder / name / "config.json").is_file():
            check_network_folder(folder / name, variant)
    settings = folder / "scheduler" / "scheduler_config.json"
    if settings.is_file():
        chain = read_json_object(settings, allow_infinity=True)  # DPMSolver's lambda_min_clipped is -Infinity
        if "scheduler" not in replaced:  # before stock Diffusers makes tables of this length
            chain.integer("num_train_timesteps", 1, MAX_TRAIN_TIMESTEPS, 1000)


def check_loaded(pipeline: Any, folder: Path, variant: str | None, replaced: frozenset[str]) -> None:
    """Check that the weights of a folder are those of the networks that were loaded from it.

    Args:
        pipeline: as loaded.
        folder: where from.
        variant: of the weights.
        replaced: components that the caller passed instead of the folder's.

    Raises:
        ConfigError: tensors are missing or, in a first stage, left over, or it is no first stage.
    """
    if "unet" not in replaced:
        check_complete(pipeline.unet, folder)
    if pipeline.vae is None or not replaced.isdisjoint(SLOTS):
        return
    index = read_json_object(folder / MODEL_INDEX)
    place = next(folder / slot for slot in SLOTS if any(index.list(slot, [])))
    with as_folder_error(folder):
        check_complete(pipeline.vae, place)
        check_all_used(pipeline.vae, place, variant)
        compression_factor(unwrap(pipeline.vae))


def _check_first_stage(index: JsonObject, slot: str) -> None:
    entry = index.list(slot)
    known = [cls.__name__ for cls in KINDS]
    if len(entry) != 2 or entry[0] != "diffusers" or entry[1] not in known:
        raise ConfigError(
            f"{index.name}: {slot} is {printable(json.dumps(entry), 80)}; it must be a list of diffusers and one of "
            f"{', '.join(known)}."
        )


def _check_encoders(index: JsonObject, folder: Path, replaced: frozenset[str]) -> None:
    """Check what the index says of text and image encoders."""
    for name in ("text_encoder_2", "text_encoder_3", "transformer", "prior"):
        if any(index.list(name, [])):
            raise ConfigError(f"{index.name} has a {name}: such models are not CompVis', and cannot be sampled here.")
    slots = [name for name in ENCODER_SLOTS if any(index.list(name, []))]
    if len(slots) > 1:
        raise ConfigError(f"{index.name} has text_encoder and bert; they are two names of one component: remove one.")
    allowed = {slot: [cls for kind in TEXT_KINDS for cls in kind.classes] for slot in ENCODER_SLOTS}
    allowed |= {"image_encoder": list(VISION_CLASSES), "concat_encoder": ["SpatialRescaler"]}
    for name, classes in allowed.items():
        entry = index.list(name, [])
        if any(entry) and name not in replaced and (len(entry) != 2 or entry[1] not in classes):
            raise ConfigError(
                f"{index.name}: {name} is {printable(json.dumps(entry), 80)}; its class must be one of "
                f"{', '.join(classes)}."
            )
    if slots and replaced.isdisjoint(ENCODER_SLOTS):
        check_text_encoder_folder(folder / slots[0])
    entry = index.list("tokenizer", [])
    is_tokenizer = len(entry) == 2 and entry[0] == "transformers" and "Tokenizer" in str(entry[1])
    if any(entry) and "tokenizer" not in replaced and not is_tokenizer:
        shown = printable(json.dumps(entry), 80)
        raise ConfigError(f"{index.name}: tokenizer is {shown}; it must be a list of transformers and a tokenizer.")
    if any(entry) and not slots and replaced.isdisjoint((*ENCODER_SLOTS, "tokenizer")):
        raise ConfigError(f"{index.name} has a tokenizer, but no text encoder that would take its tokens: remove it.")


def _check_component(index: JsonObject, name: str, base: type) -> None:
    """Check that the index names a class that the component can be of."""
    entry = index.list(name)
    if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise ConfigError(f"{index.name}: {name} is not a list of a library and a class.")
    library, class_name = entry
    if library != "diffusers":
        return
    found: Any = getattr(diffusers, class_name, None)
    fits = isinstance(found, type) and issubclass(found, base)
    if fits and base is ModelMixin:
        fits = "timestep" in inspect.signature(found.forward).parameters
    if not fits:
        what = "a network that denoises" if base is ModelMixin else "a scheduler"
        raise ConfigError(f"{index.name}: {name} is a {printable(class_name, 80)}, which is not {what} in Diffusers.")
