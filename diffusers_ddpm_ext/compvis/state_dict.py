"""What a checkpoint of CompVis' classes holds, sorted by what it is here.

model.diffusion_model.*          the network (also `diffusion_model.*`, and bare names)
model_ema.*                      its moving average, under names without dots; decay, num_updates
betas, alphas_cumprod, ...       the tables of the schedule
logvar, scale_factor             as their names say
cond_stage_model.embedding.*     of a ClassEmbedder: it stands in for a text encoder
the rest                         first stage, conditioning stage, training losses: no part of a pipeline here
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusers_ddpm_ext.compvis.weights import EMA, PREFIXES, ema_names, unet_keys
from diffusers_ddpm_ext.diffusion.schedule import TABLE_NAMES, NoiseSchedule

CLASS_EMBEDDING = "cond_stage_model.embedding.weight"
TABLES = tuple(name for name in TABLE_NAMES if name != "lvlb_weights")
"""The 12 tables that the original saves; it computes ``lvlb_weights`` anew."""

# Prefix -> why it stays outside.
ELSEWHERE = {
    "first_stage_model.": "first stage (autoencoder): decode latents with it",
    "cond_stage_model.": "conditioning stage (text encoder and its kin): give its output as encoder_hidden_states",
    "cond_stage_models.": "conditioning stages: give their output as encoder_hidden_states",
    "structcond_stage_model.": "structure encoder of StableSR: no part of the network",
    "low_scale_model.": "noise augmentation of the low-resolution input: no weights of the network",
    "noise_augmentor.": "noise augmentation of the conditioning: no weights of the network",
    "depth_model.": "depth estimator: give its output as concat_inputs",
    "embedder.": "image encoder: give its output as encoder_hidden_states",
    "loss.": "training loss of the first stage",
    "ddim_": "left by a DDIM sampler; follows from the schedule",
    "lvlb_weights": "follows from the schedule",
    "ori_timesteps": "follows from the schedule",
    "sqrt_alphas_cumprod_respace": "follows from the schedule",
}


@dataclass(frozen=True)
class LeftOut:
    """A tensor of the file that has no place in the pipeline.

    Attributes:
        source: its name in the file.
        shape: of the tensor.
        why: one phrase.
    """

    source: str
    shape: tuple[int, ...]
    why: str


@dataclass
class Contents:
    """A file, sorted. Tensors are those of the file, on the CPU and in its dtypes.

    Attributes:
        raw: the network by UNetModel's own names; empty where the file has none.
        average: its moving average by the same names; empty where the file has none.
        decay: of the average, as the float32 number that the original keeps.
        num_updates: of the average.
        tables: of the schedule, by CompVis' names.
        logvar: (T,), None where the file has none.
        scale_factor: by which latents were multiplied.
        class_embedding: (classes, dim), of a ClassEmbedder.
        left_out: what has no place here.
        ignored: names of the network's tensors that the caller did not want, by UNetModel's own names.
        filled: names that the average lacks, since they were frozen, and that the raw weights filled in.
    """

    raw: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    decay: float | None = None
    num_updates: int | None = None
    tables: dict[str, Tensor] = field(default_factory=dict)
    logvar: Tensor | None = None
    scale_factor: float | None = None
    class_embedding: Tensor | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    filled: list[str] = field(default_factory=list)


def sort_tensors(
    tensors: Mapping[str, Tensor],
    unet_params: Mapping[str, object],
    *,
    ignore_keys: Iterable[str] = (),
    load_only_unet: bool = False,
    class_embedder: bool = False,
    strict: bool = True,
) -> Contents:
    """Say what each tensor of a file is.

    Args:
        tensors: of the file, by their names in it.
        unet_params: keyword arguments of its UNetModel.
        ignore_keys: prefixes of names that are left out, as in the original; a name may match several.
        load_only_unet: leave out all but the network and its average.
        class_embedder: whether the conditioning stage is a ClassEmbedder.
        strict: refuse names that are missing or unknown; without it they are missing, or left out.

    Returns:
        The file, sorted.

    Raises:
        ValueError: a name that belongs to the network but that this network does not have, a name of nothing known,
            or a file without any network.
    """
    prefixes = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    names, averages = set(unet_keys(unet_params)), ema_names(unet_params)
    found = Contents()
    unknown: list[str] = []
    for source, tensor in tensors.items():
        bare = _bare(source, names)
        if any(source.startswith(prefix) for prefix in prefixes):
            found.left_out.append(_left(source, tensor, "in ignore_keys"))
            if bare in names or source in averages:
                found.ignored.add(str(bare if bare in names else averages[source]))
        elif bare is not None:
            _take(found.raw, bare, tensor, source, unknown if bare not in names else None)
        elif source.startswith(EMA):
            _take_average(found, source, tensor, averages, unknown)
        elif load_only_unet:
            found.left_out.append(_left(source, tensor, "load_only_unet"))
        elif not _take_other(found, source, tensor, class_embedder):
            unknown.append(source)
    if not strict:
        found.left_out += [_left(source, tensors[source], "not in this network") for source in unknown]
    elif unknown:
        raise ValueError(
            f"The checkpoint holds {len(unknown)} tensors that this configuration has no place for: {_list(unknown)}. "
            "Give the configuration that belongs to it, or leave them out with ignore_keys."
        )
    if not found.raw and not found.average and not found.ignored:
        raise ValueError(
            "The checkpoint holds no network: no name begins with "
            f"{', '.join(PREFIXES)} or {EMA}, and none is a bare name such as input_blocks.0.0.weight. "
            f"It holds {_list(list(tensors))}."
        )
    if strict:
        _complete(found, names)
    return found


def _bare(source: str, names: set[str]) -> str | None:
    """UNetModel's own name of a tensor that is the network's; None for what is not."""
    for prefix in PREFIXES:
        if source.startswith(prefix):
            return source[len(prefix) :]
    return source if source in names else None


def _take(into: dict[str, Tensor], name: str, tensor: Tensor, source: str, unknown: list[str] | None) -> None:
    if unknown is not None:
        unknown.append(source)
    elif name in into:
        raise ValueError(f"The checkpoint holds {name} twice, under {source} and without or with another prefix.")
    else:
        into[name] = tensor


def _take_average(
    found: Contents, source: str, tensor: Tensor, averages: Mapping[str, str], unknown: list[str]
) -> None:
    if source == f"{EMA}decay":
        found.decay = float(tensor)
    elif source == f"{EMA}num_updates":
        found.num_updates = int(tensor)
    elif source in averages:
        found.average[averages[source]] = tensor
    else:
        unknown.append(source)


def _take_other(found: Contents, source: str, tensor: Tensor, class_embedder: bool) -> bool:
    """Sort what is beside the network; whether it is anything known."""
    if source in TABLES:
        found.tables[source] = tensor
    elif source == "logvar":
        found.logvar = tensor
    elif source == "scale_factor":
        found.scale_factor = float(tensor)
    elif source == CLASS_EMBEDDING and class_embedder:
        found.class_embedding = tensor
    else:
        why = next((why for prefix, why in ELSEWHERE.items() if source.startswith(prefix)), None)
        if why is None:
            return False
        found.left_out.append(_left(source, tensor, why))
    return True


def _complete(found: Contents, names: set[str]) -> None:
    """Fill the average with what was frozen, and refuse gaps."""
    if found.average:
        found.filled = sorted((names - set(found.average)) & set(found.raw))
        found.average = {**found.average, **{name: found.raw[name] for name in found.filled}}
    for tensors in (found.raw, found.average):
        missing = names - set(tensors) - found.ignored
        if tensors and missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} tensors of the network that the configuration describes: "
                f"{_list(sorted(missing))}. Give the configuration that belongs to it."
            )


def _left(source: str, tensor: Tensor, why: str) -> LeftOut:
    return LeftOut(source, tuple(tensor.shape), why)


def _list(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + (more or "")


def describe_difference(tables: Mapping[str, Tensor], schedule: NoiseSchedule) -> str:
    """Say where a file's schedule differs from another one.

    Args:
        tables: of the file, by CompVis' names.
        schedule: of the configuration.

    Returns:
        One phrase; empty where every table agrees within the rounding of the file's own dtype.
    """
    for name, table in tables.items():
        mine = torch.tensor(getattr(schedule, name), dtype=torch.float32)
        if table.shape != mine.shape:
            return f"{name} has {tuple(table.shape)} entries in the file and {tuple(mine.shape)} by the configuration"
        if not table.is_floating_point():
            return f"{name} is {table.dtype} in the file"
        half = table.dtype in (torch.float16, torch.bfloat16)
        theirs, ours = table.float(), mine.to(table.dtype).float() if half else mine
        if not torch.allclose(theirs, ours, rtol=1e-2 if half else 1e-5, atol=0):
            worst = int(((theirs - ours).abs() / ours.abs().clamp(min=1e-30)).argmax())
            theirs_says, ours_says = float(theirs[worst]), float(ours[worst])
            return f"{name}[{worst}] is {theirs_says:g} in the file and {ours_says:g} by the configuration"
    return ""
