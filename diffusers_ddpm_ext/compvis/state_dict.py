"""Tensors of a CompVis checkpoint, classified by their role.

model.diffusion_model.*          the network (also `diffusion_model.*`, and keys without a prefix)
model_ema.*                      its EMA, under names without dots; decay, num_updates
betas, alphas_cumprod, ...       the tables of the schedule
logvar, scale_factor             learned log-variances, factor of the latents
cond_stage_model.embedding.*     of a ClassEmbedder, used in place of a text encoder
first_stage_model.*              the autoencoder; cond_stage_model.* again, where it is the conditioning stage too
cond_stage_model.*, embedder.*   conditioning stages that are converted
all others                       other conditioning stages, training losses: not part of a pipeline here
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusers_ddpm_ext.compvis.first_stage.checkpoint_keys import KnownStages, check_first_stage, why_left_out
from diffusers_ddpm_ext.compvis.schema import COMPVIS_EMA_DECAY, listed
from diffusers_ddpm_ext.compvis.weights import EMA_PREFIX, NETWORK_PREFIXES, UNET_PREFIXES, ema_buffer_names, unet_keys
from diffusers_ddpm_ext.compvis.wrapper_names import plain_keys
from diffusers_ddpm_ext.diffusion.schedule import TABLE_NAMES, NoiseSchedule
from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata

CLASS_EMBEDDING_KEY = "cond_stage_model.embedding.weight"
EMA_DECAY_KEY, EMA_NUM_UPDATES_KEY = f"{EMA_PREFIX}decay", f"{EMA_PREFIX}num_updates"
SAVED_TABLES = tuple(name for name in TABLE_NAMES if name != "lvlb_weights")
"""The 12 tables that the original saves; it recomputes ``lvlb_weights``."""

# Prefix -> why such tensors are not converted.
LEFT_OUT_PREFIXES = {
    "first_stage_model.": "first stage (autoencoder): not part of the network",
    "cond_stage_model.": "conditioning stage: pass its output as encoder_hidden_states or concat_inputs",
    "cond_stage_models.": "conditioning stages: pass their output as encoder_hidden_states or concat_inputs",
    "structcond_stage_model.": "structure encoder of StableSR: not part of the network",
    "low_scale_model.": "noise augmentation of the low-resolution input: not weights of the network",
    "noise_augmentor.": "noise augmentation of the conditioning: not weights of the network",
    "depth_model.": "depth estimator, the released Intel/dpt-hybrid-midas: pass its output as concat_inputs",
    "embedder.": "image encoder: pass its output as class_labels",
    "loss.": "training loss of the first stage",
    "ddim_": "left by a DDIM sampler; follows from the schedule",
    "lvlb_weights": "follows from the schedule",
    "ori_timesteps": "follows from the schedule",
    "sqrt_alphas_cumprod_respace": "follows from the schedule",
}


@dataclass(frozen=True)
class LeftOut:
    """A tensor of the file that is not converted.

    Attributes:
        source: its key in the file.
        shape: of the tensor.
        why: the reason, a phrase.
    """

    source: str
    shape: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class CheckpointContents:
    """Tensors of a checkpoint by role; those of the file, on the CPU, in the file's dtypes.

    Attributes:
        raw: the network's weights by UNetModel's keys; empty if the file has none.
        ema: their moving average by the same keys; empty if the file has none.
        ema_metadata: decay and number of updates of the EMA, with CompVis' defaults if the file has no such buffers.
        tables: of the schedule, by CompVis' names.
        logvar: (T,), None if the file has none.
        scale_factor: of the latents, None if the file has none.
        class_embedding: (classes, dim), of a ClassEmbedder.
        first_stage: the autoencoder's weights by its own keys; empty if the file has none, or they are left out.
        conditioners: of each conditioning stage that is converted, by its prefix, the tensors by their own keys.
        left_out: tensors that are not converted.
        ignored: UNetModel's keys of tensors that ``ignore_keys`` left out.
        filled: keys missing in the EMA because they were frozen, filled in from the raw weights.
    """

    raw: dict[str, Tensor]
    ema: dict[str, Tensor]
    ema_metadata: EmaMetadata
    tables: dict[str, Tensor]
    logvar: Tensor | None
    scale_factor: float | None
    class_embedding: Tensor | None
    first_stage: dict[str, Tensor]
    conditioners: dict[str, dict[str, Tensor]]
    left_out: list[LeftOut]
    ignored: set[str]
    filled: list[str]


def classify_tensors(
    tensors: Mapping[str, Tensor],
    unet_params: Mapping[str, object],
    *,
    ignore_keys: Iterable[str] = (),
    load_only_unet: bool = False,
    stages: KnownStages | None = None,
    strict: bool = True,
) -> CheckpointContents:
    """Classify each tensor of a file by its role.

    Args:
        tensors: of the file, by their keys in it.
        unet_params: keyword arguments of its UNetModel.
        ignore_keys: prefixes of keys that are left out, as in the original; several may match one key.
        load_only_unet: leave out everything but the network, its EMA, and the factor of its latents.
        stages: what it may contain besides the network; by default neither first stage nor classes.
        strict: refuse missing and unknown keys; otherwise unknown ones are left out.

    Raises:
        ValueError: a key that this network does not have, an unknown key, or a file without a network.
    """
    prefixes = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    stages = stages or KnownStages()
    known = _KnownKeys(set(unet_keys(unet_params)), ema_buffer_names(unet_params), stages)
    roles: tuple[Role, ...] = ("raw", "ema", "ema_metadata", "extra", "first stage", "condition", "conditioner")
    by_role: dict[Role, dict[str, Tensor]] = {role: {} for role in roles}
    left_out: list[LeftOut] = []
    ignored: set[str] = set()
    unknown: list[str] = []
    for plain, key in plain_keys(tensors).items():
        tensor = tensors[key]
        role, name = known.role(plain)
        if plain.startswith(prefixes) or key.startswith(prefixes):
            left_out.append(LeftOut(key, tuple(tensor.shape), "in ignore_keys"))
            ignored |= {name} if role in ("raw", "ema") else set()
        elif load_only_unet and name != "scale_factor" and role not in NETWORK_ROLES:
            left_out.append(LeftOut(key, tuple(tensor.shape), "load_only_unet"))
        elif role == "not converted":
            left_out.append(LeftOut(key, tuple(tensor.shape), name))
        elif role in ("unknown", "other network"):
            unknown.append(key)
        elif name in by_role[role]:
            raise ValueError(f"The checkpoint contains {name} twice, under {key} and another prefix or none.")
        else:
            by_role[role][name] = tensor
    if strict:
        _check_known(unknown)
    left_out += [LeftOut(key, tuple(tensors[key].shape), "not in this network") for key in unknown]
    _check_has_network(list(tensors), by_role, ignored)
    if strict and by_role["first stage"]:
        check_first_stage(by_role["first stage"], by_role["condition"], stages.first_stage or ())
    contents = _contents(by_role, left_out, ignored, known.unet if strict else None)
    for prefix in stages.conditioners:
        own = {key.removeprefix(prefix): t for key, t in by_role["conditioner"].items() if key.startswith(prefix)}
        contents.conditioners[prefix] = own
    return contents


Role = Literal[
    "raw", "ema", "ema_metadata", "extra", "first stage", "condition", "conditioner", "not converted",
    "other network", "unknown",
]  # fmt: skip


NETWORK_ROLES: tuple[Role, ...] = ("raw", "ema", "ema_metadata", "other network")


@dataclass(frozen=True)
class _KnownKeys:
    """Keys that a checkpoint of a certain UNetModel may contain.

    Attributes:
        unet: UNetModel's keys.
        ema: names of the EMA's buffers to UNetModel's keys.
        stages: what else it may contain.
    """

    unet: set[str]
    ema: dict[str, str]
    stages: KnownStages

    def role(self, key: str) -> tuple[Role, str]:
        """Role of a key, and its name in that role; for one that is not converted the reason."""
        prefix = next((prefix for prefix in NETWORK_PREFIXES if key.startswith(prefix)), "")
        if prefix in UNET_PREFIXES or key[len(prefix) :] in self.unet:
            name = key[len(prefix) :]
            return "raw" if name in self.unet else "other network", name
        if key in self.ema:
            return "ema", self.ema[key]
        if key.startswith(EMA_PREFIX):
            return "ema_metadata" if key in (EMA_DECAY_KEY, EMA_NUM_UPDATES_KEY) else "other network", key
        if key in (*SAVED_TABLES, "logvar", "scale_factor") or (
            key == CLASS_EMBEDDING_KEY and self.stages.class_embedder
        ):
            return "extra", key
        if key.startswith(self.stages.conditioners):
            return "conditioner", key
        for role, prefix in self.stages.prefixes:
            if key.startswith(prefix):
                return self._role_in_first_stage(role, key.removeprefix(prefix))
        why = next((why for prefix, why in LEFT_OUT_PREFIXES.items() if key.startswith(prefix)), None)
        return ("unknown", key) if why is None else ("not converted", why)

    def _role_in_first_stage(self, role: Role, name: str) -> tuple[Role, str]:
        why = why_left_out(name)
        if why is not None:
            return "not converted", why
        return (role, name) if name in (self.stages.first_stage or ()) else ("unknown", name)


def _check_known(unknown: list[str]) -> None:
    if unknown:
        raise ValueError(
            f"The checkpoint contains {len(unknown)} tensors that do not belong to this configuration: "
            f"{listed(unknown)}. Give the configuration that belongs to it, or leave them out with ignore_keys."
        )


def _check_has_network(keys: list[str], by_role: Mapping[Role, Mapping[str, Tensor]], ignored: set[str]) -> None:
    if not (by_role["raw"] or by_role["ema"] or ignored):
        raise ValueError(
            f"The checkpoint contains no network: no key starts with {', '.join(UNET_PREFIXES)} or {EMA_PREFIX}, and "
            f"none is a key without a prefix such as input_blocks.0.0.weight. It contains {listed(keys)}."
        )


def _contents(
    by_role: Mapping[Role, dict[str, Tensor]], left_out: list[LeftOut], ignored: set[str], required: set[str] | None
) -> CheckpointContents:
    """Fill in the EMA's frozen tensors, and refuse missing ones, if the keys of the network are ``required``."""
    raw, ema, extra = by_role["raw"], by_role["ema"], by_role["extra"]
    filled = sorted((required - set(ema)) & set(raw)) if required and ema else []
    ema = {**ema, **{name: raw[name] for name in filled}}
    for tensors in (raw, ema):
        missing = set() if required is None else required - set(tensors) - ignored
        if tensors and missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} tensors of the network that the configuration describes: "
                f"{listed(sorted(missing))}. Give the configuration that belongs to it."
            )
    metadata = by_role["ema_metadata"]
    decay = _scalar(metadata, EMA_DECAY_KEY, 0.0, 1.0) if EMA_DECAY_KEY in metadata else COMPVIS_EMA_DECAY
    # -1 in forks: an EMA with a constant decay
    num_updates = _scalar(metadata, EMA_NUM_UPDATES_KEY, -1, 2**53) if EMA_NUM_UPDATES_KEY in metadata else 0
    for name in ("logvar", CLASS_EMBEDDING_KEY):
        if name in extra and not (extra[name].is_floating_point() and bool(torch.isfinite(extra[name]).all())):
            raise ValueError(f"The checkpoint's {name} is not finite numbers: the file is damaged, or leave it out.")
    return CheckpointContents(
        raw=raw,
        ema=ema,
        ema_metadata=EmaMetadata(decay, int(num_updates)),
        tables={key: tensor for key, tensor in extra.items() if key in SAVED_TABLES},
        logvar=extra.get("logvar"),
        scale_factor=_scalar(extra, "scale_factor", 1e-30, 1e30) if "scale_factor" in extra else None,
        class_embedding=extra.get(CLASS_EMBEDDING_KEY),
        first_stage=by_role["first stage"],
        conditioners={},
        left_out=left_out,
        ignored=ignored,
        filled=filled,
    )


def _scalar(tensors: Mapping[str, Tensor], name: str, low: float, high: float) -> float:
    """A number that a checkpoint stores as a tensor; ValueError if it is no number from ``low`` to ``high``."""
    tensor = tensors[name]
    value = float(tensor.double()) if tensor.numel() == 1 and not tensor.is_complex() else float("nan")
    if not low <= value <= high:
        shown = f"{value:g}" if tensor.numel() == 1 else f"a tensor of shape {tuple(tensor.shape)}"
        raise ValueError(f"The checkpoint's {name} is {shown}; it must be a number from {low:g} to {high:g}.")
    return value


def describe_schedule_difference(tables: Mapping[str, Tensor], schedule: NoiseSchedule) -> str:
    """Describe where a file's tables differ from a schedule; empty if they agree within rounding to their dtype."""
    for name, table in tables.items():
        expected = torch.tensor(getattr(schedule, name), dtype=torch.float32)
        if table.shape != expected.shape:
            return (
                f"{name} has {tuple(table.shape)} entries in the file and {tuple(expected.shape)} in the configuration"
            )
        if not table.is_floating_point():
            return f"{name} is {table.dtype} in the file"
        half = table.dtype in (torch.float16, torch.bfloat16)
        theirs, ours = table.float(), expected.to(table.dtype).float() if half else expected
        if not torch.allclose(theirs, ours, rtol=1e-2 if half else 1e-5, atol=0):
            worst = int(((theirs - ours).abs() / ours.abs().clamp(min=1e-30)).argmax())
            in_file, in_config = float(theirs[worst]), float(ours[worst])
            return f"{name}[{worst}] is {in_file:g} in the file and {in_config:g} in the configuration"
    return ""
