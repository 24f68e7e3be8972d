"""Conversion of an original checkpoint to a pipeline's folder, and comparison of a folder with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diffusers_ddpm_ext.compvis.compare import component_differences, network_differences, tensor_difference
from diffusers_ddpm_ext.compvis.config.openai import read_flags
from diffusers_ddpm_ext.compvis.load import choose_weights, read_compvis_checkpoint, report_compvis
from diffusers_ddpm_ext.compvis.load_options import LoadOptions, WeightSet
from diffusers_ddpm_ext.compvis.reader.archive import PathLike, read_tensors
from diffusers_ddpm_ext.compvis.report import Report
from diffusers_ddpm_ext.compvis.state_dict import SAVED_TABLES
from diffusers_ddpm_ext.compvis.weights import build_network, strip_prefixes
from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata, load_ema_metadata, save_ema_metadata
from diffusers_ddpm_ext.models.tokenizers import tokenizer_facts
from diffusers_ddpm_ext.pipelines.pipeline_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.schedulers.scheduling_ddpm_ext import DDPMExtScheduler

RAW_VARIANT = "raw"
COMPONENTS = {
    "vae": "first stage",
    "text_encoder": "text encoder",
    "concat_encoder": "encoder of concatenated pictures",
    "image_encoder": "image encoder",
}


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint: a pipeline and what is saved with it.

    Attributes:
        pipeline: with the default weights.
        raw: the network with the raw weights; None unless the default weights are the EMA and the file has both.
        ema: decay and number of updates, if the default weights are an EMA.
        report: of the conversion.
    """

    pipeline: DDPMExtPipeline
    raw: nn.Module | None
    ema: EmaMetadata | None
    report: Report

    def save(self, folder: PathLike) -> None:
        """Write the pipeline, the raw weights as ``variant="raw"``, and ``ema.json``."""
        self.pipeline.save_pretrained(folder)
        if self.raw is not None:
            network: Any = self.raw
            network.save_pretrained(Path(folder, "unet"), variant=RAW_VARIANT)
        if self.ema is not None:
            save_ema_metadata(folder, self.ema)

    def compare(self, folder: PathLike) -> list[str]:
        """Compare a pipeline's folder with this conversion: one phrase per difference of a tensor or setting."""
        other = DDPMExtPipeline.from_pretrained(folder)
        differences = network_differences("unet", self.pipeline.unet, other.unet)
        if self.raw is not None:
            try:
                raw = type(other.unet).from_pretrained(folder, subfolder="unet", variant=RAW_VARIANT)
                differences += network_differences('unet (variant="raw")', self.raw, raw)
            except OSError:
                differences.append('unet has no variant="raw"')
        for name, what in COMPONENTS.items():
            ours, theirs = (getattr(pipeline, name, None) for pipeline in (self.pipeline, other))
            differences += component_differences(name, what, ours, theirs)
        differences += _tokenizer_differences(self.pipeline, other)
        for name in ("logvar", "class_embedder"):
            differences += tensor_difference(name, getattr(self.pipeline, name, None), getattr(other, name, None))
        for name in SAVED_TABLES:
            table = getattr(other.scheduler, name, None)
            differences += tensor_difference(f"scheduler.{name}", getattr(self.pipeline.scheduler, name), table)
        for name, value in self.pipeline.scheduler.config.items():
            if not name.startswith("_") and name != "trained_betas" and other.scheduler.config.get(name) != value:
                differences.append(f"the scheduler's {name} is {other.scheduler.config.get(name)}, not {value}")
        for name in ("conditioning_key", "use_positional_encodings", "latent_scaling_factor", "concat_through_vae"):
            if (other.config.get(name) or None) != (self.pipeline.config.get(name) or None):
                differences.append(f"{name} is {other.config.get(name)}, not {self.pipeline.config.get(name)}")
        if self.ema is not None and load_ema_metadata(folder) != self.ema:
            differences.append(f"ema.json is {load_ema_metadata(folder)}, not {self.ema}")
        return differences


def _tokenizer_differences(ours: DDPMExtPipeline, theirs: DDPMExtPipeline) -> list[str]:
    """Compare the tokenizers, where the conversion was given one: what they do to prompts."""
    mine, other = ours.text_encoder_stage, theirs.text_encoder_stage
    if mine is None or other is None or mine.tokenizer is None:
        return []
    if other.tokenizer is None:
        return ["the pipeline lacks the tokenizer"]
    same = tokenizer_facts(mine.tokenizer, mine.max_length) == tokenizer_facts(other.tokenizer, other.max_length)
    return [] if same else ["the pipeline has another tokenizer"]


def convert_compvis(
    path: PathLike, config: PathLike | Mapping[str, Any], options: LoadOptions | None = None, tokenizer: Any = None
) -> Converted:
    """Convert a checkpoint of CompVis' classes; see `load_compvis` for arguments and errors.

    The pipeline has the EMA weights by default and the raw ones too if the file has both.
    """
    options = options or LoadOptions()
    checkpoint = read_compvis_checkpoint(path, config, options, tokenizer)
    default = choose_weights(checkpoint, options.weights)
    networks = {default: checkpoint.network(default)}
    if default == "ema" and checkpoint.weights("raw"):
        networks["raw"] = checkpoint.network("raw")
    return Converted(
        checkpoint.pipeline(*networks[default]),
        networks["raw"][0] if len(networks) > 1 else None,
        checkpoint.ema_metadata if default == "ema" else None,
        report_compvis(checkpoint, path, networks),
    )


def convert_openai(path: PathLike, flags: PathLike | Mapping[str, Any], ema_path: PathLike | None = None) -> Converted:
    """Convert a checkpoint of openai/improved-diffusion or guided-diffusion to a pipeline and a report.

    Args:
        path: a ``state_dict``, such as ``model500000.pt`` or ``ema_0.9999_500000.pt``.
        flags: of the model and its diffusion; see `read_flags`.
        ema_path: the EMA weights, which become the default ones; ``path`` then has the raw ones.

    Raises:
        ValueError: a flag cannot be expressed, a file cannot be read, or they do not belong together.
    """
    files: dict[WeightSet, PathLike | None] = {"ema": ema_path, "raw": path}
    weights = {which: strip_prefixes(read_tensors(file)) for which, file in files.items() if file is not None}
    config = read_flags(flags, shapes={name: tuple(t.shape) for name, t in next(iter(weights.values())).items()})
    params, networks = dict(config.unet_params), {}
    for which, tensors in weights.items():
        labels = tensors.get("label_emb.weight")
        if config.class_cond and labels is not None and labels.ndim == 2:
            params["num_classes"] = len(labels)
        networks[which] = build_network(tensors, params, timestep_scale=config.timestep_scale)
    network, _ = next(iter(networks.values()))
    pipeline = DDPMExtPipeline(
        network, DDPMExtScheduler(**config.schedule), conditioning_key="adm" if config.class_cond else None
    )
    facts = {f"scheduler.{name}": value for name, value in config.schedule.items()}
    facts |= {"family": config.family, "timestep_scale": config.timestep_scale, "unet_params": params}
    report = Report.of_networks("openai", Path(path).name, networks, configuration=config.rows, facts=facts)
    return Converted(pipeline, networks["raw"][0] if len(networks) > 1 else None, None, report)
