"""Conversion of an original autoencoder's file to the folder of a first stage, for ``--vae``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from diffusers_ddpm_ext.compvis.compare import network_differences
from diffusers_ddpm_ext.compvis.config.references import resolve_references
from diffusers_ddpm_ext.compvis.config.run_keys import as_mapping
from diffusers_ddpm_ext.compvis.config.targets import AUTOENCODERS
from diffusers_ddpm_ext.compvis.first_stage.architecture import read_first_stage
from diffusers_ddpm_ext.compvis.first_stage.checkpoint_keys import FIRST_STAGE_PREFIX, why_left_out
from diffusers_ddpm_ext.compvis.first_stage.weights import convert_first_stage, first_stage_keys
from diffusers_ddpm_ext.compvis.load_options import LoadOptions
from diffusers_ddpm_ext.compvis.reader.archive import PathLike, read_tensors
from diffusers_ddpm_ext.compvis.report import Report
from diffusers_ddpm_ext.compvis.schema import FIRST_STAGE_SECTION, ConfigRow, listed
from diffusers_ddpm_ext.compvis.state_dict import LeftOut
from diffusers_ddpm_ext.compvis.wrapper_names import plain_keys
from diffusers_ddpm_ext.models.first_stage import load_first_stage
from diffusers_ddpm_ext.utils.yaml_io import load_compvis_yaml

SCALE_NOTE = (
    "An autoencoder's own file has no scale of latents: scaling_factor is 1 in its configuration. A run measures it "
    "with --scale_factor data."
)


@dataclass(frozen=True)
class ConvertedFirstStage:
    """A converted autoencoder.

    Attributes:
        autoencoder: float32, in eval mode.
        report: of the conversion.
    """

    autoencoder: AutoencoderKL | VQModel
    report: Report
    pipeline: ClassVar[None] = None  # unlike a converted diffusion model

    def save(self, folder: PathLike) -> None:
        """Write its configuration and weights, as Diffusers does."""
        self.autoencoder.save_pretrained(folder)

    def compare(self, folder: PathLike) -> list[str]:
        """Compare a folder with this conversion: one phrase per difference of a tensor or setting."""
        return network_differences("first stage", self.autoencoder, load_first_stage(folder))


def is_first_stage_config(config: PathLike | Mapping[str, Any]) -> bool:
    """Whether an original configuration is that of an autoencoder alone.

    Raises:
        ValueError: the file cannot be read.
    """
    content = load_compvis_yaml(config) if not isinstance(config, Mapping) else config
    model = content.get("model")
    return isinstance(model, Mapping) and str(model.get("target")).rpartition(".")[2] in AUTOENCODERS


def convert_first_stage_file(
    path: PathLike, config: PathLike | Mapping[str, Any], options: LoadOptions | None = None
) -> ConvertedFirstStage:
    """Convert the checkpoint of an original autoencoder, or the first stage in that of a whole model.

    Args:
        path: as in `load_compvis`.
        config: the YAML file of the autoencoder, or its content.
        options: of which only ``ignore_keys`` applies.

    Raises:
        ValueError: the file cannot be read, it does not belong to the configuration, or Diffusers' classes cannot
            express it.
    """
    options = options or LoadOptions()
    if options != LoadOptions(ignore_keys=options.ignore_keys):
        raise ValueError(
            "weights, load_only_unet, schedule_from and text_heads are for diffusion models: leave them out."
        )
    content = load_compvis_yaml(config) if not isinstance(config, Mapping) else config
    model = as_mapping(resolve_references(content)["model"], "model")
    stage = read_first_stage({"target": model["target"], "params": model.get("params")}, "model")
    rows = [
        ConfigRow(key, value, "without effect", "only used in training")
        for key, value in [(f"model.{key}", model[key]) for key in model] + [(key, content[key]) for key in content]
        if key not in ("model", "model.target", "model.params")
    ]
    tensors, left_out = _own_tensors(read_tensors(path), first_stage_keys(stage), options.ignore_keys)
    autoencoder, converted = convert_first_stage(tensors, stage)
    report = Report(
        family="compvis",
        source=Path(path).name,
        network=type(autoencoder).__name__,
        default="raw",
        raw_variant=False,
        parameters=sum(parameter.numel() for parameter in autoencoder.parameters()),
        tensors={"first_stage": converted},
        left_out=left_out,
        configuration=[*stage.rows, *rows],
        facts={FIRST_STAGE_SECTION: stage.section},
        notes=[SCALE_NOTE],
    )
    return ConvertedFirstStage(autoencoder, report)


def _own_tensors(
    tensors: Mapping[str, Tensor], keys: set[str], ignore_keys: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[LeftOut]]:
    """The autoencoder's tensors by its own keys, and what else the file has."""
    plain = plain_keys(tensors)
    is_whole = any(name.startswith(FIRST_STAGE_PREFIX) for name in plain)
    own: dict[str, Tensor] = {}
    left_out: list[LeftOut] = []
    unknown: list[str] = []
    for name, key in plain.items():
        inner = name.removeprefix(FIRST_STAGE_PREFIX)
        why = why_left_out(inner)
        if is_whole and inner == name:
            why = "not part of the first stage"
        if name.startswith(ignore_keys) or key.startswith(ignore_keys):
            why = "in ignore_keys"
        if why is not None:
            left_out.append(LeftOut(key, tuple(tensors[key].shape), why))
        elif inner in keys:
            own[inner] = tensors[key]
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"The checkpoint contains {len(unknown)} tensors that do not belong to this autoencoder: "
            f"{listed(unknown)}. Give the configuration that belongs to it, or leave them out with ignore_keys."
        )
    return own, left_out
