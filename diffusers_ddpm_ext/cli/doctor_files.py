"""Checks of a pipeline's or a first stage's files for `ddpm-ext doctor`, without torch: nothing is built of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from diffusers_ddpm_ext.cli.doctor_findings import Finding, Mark
from diffusers_ddpm_ext.cli.pipeline_facts import PipelineFacts, read_pipeline_facts
from diffusers_ddpm_ext.errors import ConfigError, printable
from diffusers_ddpm_ext.utils.first_stage_config import FirstStageConfig
from diffusers_ddpm_ext.utils.generations import read_one_generation
from diffusers_ddpm_ext.utils.input_files import JsonObject, file_name, read_json_object
from diffusers_ddpm_ext.utils.network_folder import check_network_folder
from diffusers_ddpm_ext.utils.network_tensors import check_main_tensors
from diffusers_ddpm_ext.utils.pipeline_files import TOKENIZER_FILES
from diffusers_ddpm_ext.utils.stored_network import StoredWeights, read_stored_weights
from diffusers_ddpm_ext.utils.text_encoder_config import TOKENIZER_SLOT, TextEncoderConfig
from diffusers_ddpm_ext.utils.text_encoder_folder import check_text_encoder_folder
from diffusers_ddpm_ext.utils.vocabulary import required_conditions

VOCABULARIES = tuple(
    name for name in TOKENIZER_FILES if not name.endswith(("_config.json", "_map.json", "tokens.json"))
)
FIRST_STAGES = ("AutoencoderKL", "VQModel", "AutoencoderTiny", "AutoencoderDC")


def check_pipeline_files(folder: Path) -> Iterator[Finding]:
    """Check configurations and weights of a pipeline's folder.

    Raises:
        ConfigError: a file is missing or damaged, values are not finite, or weights are not those of their network.
    """
    yield from read_one_generation(folder, lambda place: list(_check_generation(place)))


def _check_generation(folder: Path) -> Iterator[Finding]:
    from diffusers_ddpm_ext.losses.logvar_files import read_logvar
    from diffusers_ddpm_ext.schedulers.resolved_config import read_scheduler_config

    facts = read_pipeline_facts(str(folder))
    assert facts is not None  # None stands for a Hub id
    _check_facts(facts)
    weights = _check_network(folder / "unet", _class_name(facts.index, "unet"))
    scheduler = _class_name(facts.index, "scheduler")
    resolved = read_scheduler_config(folder)
    read_logvar(folder, len(resolved.schedule))
    for name in ("class_embedder", "concat_encoder", "image_encoder"):
        if (folder / name / "config.json").is_file() and any((folder / name).glob("*.safetensors")):
            read_stored_weights(folder / name)
    yield Finding(Mark.FINE, f"its pipeline is complete: {_size(weights)}, {printable(scheduler, 80)}")
    yield from _check_pickles(weights, "unet")
    yield from _check_first_stage(folder, facts)
    yield from _check_text_encoder(folder, facts)


def _class_name(index: JsonObject, component: str) -> str:
    """Class of a component, of an entry such as ["diffusers", "UNet2DModel"]."""
    entry = index.content.get(component)
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
        shown = printable(json.dumps(entry), 80)
        raise ConfigError(f"{index.name}: {component} is {shown}; it must be a list of a library and a class")
    return str(entry[1])


def _check_facts(facts: PipelineFacts) -> None:
    """Raise ConfigError for values of the index that are wrong, or do not belong together."""
    index, stage = facts.index, facts.first_stage
    _ = facts.class_names  # raises
    if facts.concat_through_vae is not None and not facts.takes_concat_inputs:
        raise ConfigError(
            f"{index.name}: concat_through_vae is {facts.concat_through_vae!r}, but conditioning_key "
            f"{facts.conditioning_key} has no concatenated inputs; leave it out"
        )
    if stage is None:
        return
    entry = index.content[stage.slot]
    if entry[0] != "diffusers" or entry[1] not in FIRST_STAGES:
        shown = printable(json.dumps(entry), 80)
        known = ", ".join(FIRST_STAGES)
        raise ConfigError(f"{index.name}: {stage.slot} is {shown}; it must be a list of diffusers and one of {known}")
    if stage.latent_channels != facts.channels:
        raise ConfigError(
            f"{stage.slot} has latents of {stage.latent_channels} channels, but the network denoises {facts.channels};"
            " they are of different models"
        )


def _check_network(folder: Path, class_name: str) -> StoredWeights:
    """The weights of a network of Diffusers, checked."""
    config = check_network_folder(folder)
    weights = read_stored_weights(folder)
    if weights.tensors:
        check_main_tensors(weights.tensors, config, class_name)
    return weights


def _check_pickles(weights: StoredWeights, name: str) -> Iterator[Finding]:
    if weights.not_read:
        text = f"{name} has {weights.not_read[0]}, which only torch reads"
        yield Finding(Mark.ADVICE, f"{text}: ddpm-ext doctor --open opens it")


def _check_first_stage(folder: Path, facts: PipelineFacts) -> Iterator[Finding]:
    """Whether a pipeline of latents has its first stage, and whether that is complete."""
    stage = facts.first_stage
    if stage is not None:
        yield from _check_stage(folder / stage.slot, stage)
    elif facts.index.content.get("latent_scaling_factor") is not None:
        text = "its samples are latents of an autoencoder that is not in the folder"
        yield Finding(Mark.ADVICE, f"{text}: sample with --out FILE.npy, or add the autoencoder as its vae")


def check_first_stage_files(folder: Path) -> Iterator[Finding]:
    """Check the folder of a first stage alone; errors as in `check_pipeline_files`."""
    yield from read_one_generation(folder, lambda place: list(_check_alone(place)))


def _check_alone(folder: Path) -> Iterator[Finding]:
    config = check_network_folder(folder)
    name = config.string("_class_name")
    if name not in FIRST_STAGES:
        known = ", ".join(FIRST_STAGES)
        raise ConfigError(f"{config.name} is of a {printable(name, 80)}; a first stage is one of {known}")
    yield from _check_stage(folder, FirstStageConfig("", name, config))


def _check_stage(folder: Path, stage: FirstStageConfig) -> Iterator[Finding]:
    described = stage.describe().partition(": ")[2]
    _check_statistics(stage)
    weights = _check_network(folder, stage.class_name)
    name = printable(stage.class_name, 80)
    yield Finding(Mark.FINE, f"its first stage is complete: {name}, {_size(weights)}, {described}")
    yield from _check_pickles(weights, "the first stage")


def _check_statistics(stage: FirstStageConfig) -> None:
    """Raise ConfigError for a mean and standard deviation per channel that no latents can have."""
    config, keys = stage.config, ("latents_mean", "latents_std")
    given = [key for key in keys if config.content.get(key) is not None]
    if not given:
        return
    if len(given) == 1:
        raise ConfigError(f"{config.name} has {given[0]} alone: write both of {' and '.join(keys)}, or neither")
    if config.content.get("shift_factor"):
        raise ConfigError(f"{config.name} has a shift_factor beside latents_mean: keep one of them")
    for key in keys:
        if len(config.numbers(key)) != stage.latent_channels:
            raise ConfigError(
                f"{config.name}: {key} must be {stage.latent_channels} numbers, one per channel of a latent"
            )
    if min(config.numbers("latents_std")) <= 0:
        raise ConfigError(f"{config.name}: latents_std must be above 0")


def _check_text_encoder(folder: Path, facts: PipelineFacts) -> Iterator[Finding]:
    """Whether the text encoder of a pipeline is complete, and whether it has its tokenizer."""
    encoder = facts.text_encoder
    if encoder is None:
        needs_tokens = "encoder_hidden_states" in required_conditions(facts.conditioning_key)
        if needs_tokens and not facts.has_class_embedder:
            text = "it takes embeddings, and no prompts: if it is a model of text"
            yield Finding(Mark.ADVICE, f"{text}, sample with --text_encoder and --tokenizer")
        return
    check_text_encoder_folder(folder / encoder.slot)
    weights = read_stored_weights(folder / encoder.slot)
    yield Finding(Mark.FINE, f"its text encoder is complete: {_describe(encoder)}, {_size(weights)}")
    yield from _check_pickles(weights, "the text encoder")
    tokenizer = folder / TOKENIZER_SLOT
    if not encoder.has_tokenizer:
        text = "its text encoder has no tokenizer: sample with --tokenizer FOLDER_OR_ID or --input_ids FILE.npy"
        yield Finding(Mark.ADVICE, text)
        return
    whole = tokenizer / "tokenizer.json"
    for file in (tokenizer / "tokenizer_config.json", whole if whole.is_file() else tokenizer / "vocab.json"):
        content = read_json_object(file).content if file.is_file() else {"model": {}}
        if not content or (file == whole and not isinstance(content.get("model"), dict)):
            raise ConfigError(f"{file_name(file)} is not of a tokenizer")
    if not any((tokenizer / name).is_file() for name in VOCABULARIES):
        text = f"its tokenizer has no vocabulary (one of {', '.join(VOCABULARIES)}): copy the folder again"
        yield Finding(Mark.WRONG, text)


def _describe(encoder: TextEncoderConfig) -> str:
    tokens = "tokens" if encoder.positions is None else f"{encoder.positions} tokens"
    return f"{printable(encoder.class_name, 80)}, {tokens} of {encoder.width} values"


def _size(weights: StoredWeights) -> str:
    return f"{weights.num_parameters / 1e6:.1f} M parameters" if weights.tensors else "weights as pickles"
