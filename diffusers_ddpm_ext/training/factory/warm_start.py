"""Initial weights of a run from a CompVis checkpoint, or from a folder saved by Diffusers.

As in CompVis, tensors that the file lacks keep their initial values and tensors that the network lacks are ignored.
Unlike there, a run reports both, a file without any matching tensor is an error, and an average that the file lacks
starts from the loaded weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import read_compvis_config
from diffusers_ddpm_ext.compvis.first_stage.checkpoint_keys import KnownStages
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.state_dict import LeftOut, classify_tensors, describe_schedule_difference
from diffusers_ddpm_ext.compvis.unet_params import unet_params_of
from diffusers_ddpm_ext.compvis.weights import convert_tensors, export_unet
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.losses.logvar import load_logvar
from diffusers_ddpm_ext.losses.objective import DDPMObjective
from diffusers_ddpm_ext.models.class_embedder import load_class_embedder
from diffusers_ddpm_ext.models.class_token_unet import CLASS_TABLE, ClassTokenUNet
from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.models.ema_metadata import EmaMetadata, load_ema_metadata
from diffusers_ddpm_ext.pipelines.guidance import network_config
from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints
from diffusers_ddpm_ext.training.config.options import StartOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.utils.generations import read_one_generation
from diffusers_ddpm_ext.utils.input_files import read_json_object

WEIGHTS_FILE = "diffusion_pytorch_model{}.safetensors"
WEIGHTS_INDEX_FILE = "diffusion_pytorch_model.safetensors.index{}.json"
UNCOMPARED_SETTINGS = ("sample_size", "in_channels", "out_channels", "dropout")
"""Settings of a network that may differ although its weights compute the same function."""


@dataclass(frozen=True)
class InitialWeights:
    """Tensors loaded from a file, under the names of the run's network.

    Attributes:
        source: the file or folder.
        raw: the weights to start training from, every tensor of the network.
        average: the moving average; empty where the file has none.
        ema_metadata: decay and number of updates of the average.
        logvar: (T,), None where there is none.
        missing: names of tensors that are not in the file and keep their initial values.
        resized: names of tensors whose channels were repeated or cut.
        left_out: tensors of the file that are not used.
        notes: further sentences for the report.
        tables: of the file's noise schedule.
    """

    source: Path
    raw: dict[str, Tensor]
    average: dict[str, Tensor]
    ema_metadata: EmaMetadata | None
    logvar: Tensor | None
    missing: list[str]
    resized: list[str]
    left_out: list[LeftOut]
    notes: list[str] = field(default_factory=list)
    tables: dict[str, Tensor] = field(default_factory=dict)

    def describe(self, ema_report: str | None) -> str:
        """What was loaded and what was not, in a few lines, with the report of `initialize_ema`."""
        loaded = len(self.raw) - len(self.missing)
        ema = "" if ema_report is None else f"; {ema_report}"
        lines = [f"--ckpt_path {self.source}: {loaded} of {len(self.raw)} tensors of the network{ema}"]
        if self.resized:
            lines.append(f"  resized: {_join_names(self.resized)}")
        if self.missing:
            lines.append(f"  not in the file, re-initialized: {_join_names(self.missing)}")
        groups = Counter((left.source.partition(".")[0], left.why) for left in self.left_out)
        lines += [f"  left out: {name} ({count} tensors): {why}" for (name, why), count in groups.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def load_initial_weights(config: TrainConfig, denoiser: nn.Module, objective: DDPMObjective) -> InitialWeights | None:
    """Load ``ckpt_path`` into a run's network, on the CPU and free of wrappers, and into its log-variances.

    Returns:
        What was loaded; None without ``ckpt_path``, and where the file is gone but the run has a checkpoint to resume
        from.

    Raises:
        ConfigError: the file cannot be read, none of its tensors match, or shapes differ without ``make_it_fit``.
    """
    options = config.start
    if options.ckpt_path is None:
        return None
    path = Path(options.ckpt_path).expanduser()
    if not path.exists():
        folder = config.output.output_dir
        if config.resumes and folder is not None and list_checkpoints(Path(folder)):
            return None
        raise ConfigError(f"--ckpt_path {path} does not exist: give a checkpoint, or the folder of a pipeline")
    try:
        if path.is_dir():
            weights = read_one_generation(path, lambda folder: _read_folder(folder, options, denoiser))
            weights = replace(weights, source=path)
        else:
            weights = _read_checkpoint(path, options, denoiser)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"--ckpt_path {path}: {' '.join(str(error).split())}") from error
    if len(weights.missing) == len(weights.raw):
        raise ConfigError(f"--ckpt_path {path}: it holds no weights of this network under known names")
    _check_finite(weights, path)
    denoiser.load_state_dict(weights.raw, strict=True)
    notes = list(weights.notes)
    if weights.logvar is not None:
        notes.append(_load_logvar(weights.logvar, objective, options.load_only_unet))
    difference = describe_schedule_difference(weights.tables, objective.schedule)
    if difference:
        notes.append(f"the run uses its own schedule, not the file's: {difference}")
    return replace(weights, notes=notes)


def _check_finite(weights: InitialWeights, path: Path) -> None:
    for tensors in (weights.raw, weights.average):
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(
                    f"--ckpt_path {path}: {name} has values that are NaN or infinite, so that no step could be taken"
                )


def initialize_ema(weights: InitialWeights, ema: LitEMA, options: StartOptions) -> str:
    """Start the run's average from the file's, or from the loaded weights; return a report of it."""
    if not weights.average or options.reset_ema:
        return "EMA starts from these weights" + (" (--reset_ema)" if weights.average else ": the file has none")
    state = ema.state_dict()
    state["shadow"] = {name: weights.average[name].to(old.dtype) for name, old in state["shadow"].items()}
    metadata = weights.ema_metadata
    updates = 0 if metadata is None or options.reset_num_ema_updates else max(metadata.num_updates, 0)
    state["num_updates"] = updates if ema.use_num_updates else -1
    ema.load_state_dict(state)
    return f"EMA of the file, {updates:,} updates"


def _load_logvar(table: Tensor, objective: DDPMObjective, load_only_unet: bool) -> str:
    """Load the log-variances if the run learns them as a table; return what was done."""
    own = objective.log_variances()
    if load_only_unet:
        return "its log-variances are left out (--load_only_unet)"
    if not objective.learn_logvar:
        return "its log-variances are left out: this run does not learn them (--learn_logvar)"
    if objective.logvar_network is not None:
        return "its log-variances are left out: this run learns a function (--logvar_kind continuous)"
    if table.shape != own.shape:
        return f"its log-variances are left out: they have {len(table)} steps, this run has {len(own)}"
    with torch.no_grad():
        own.copy_(table)
    return f"log-variances of the file, mean {float(table.float().mean()):.4f}"


def _read_checkpoint(path: Path, options: StartOptions, denoiser: nn.Module) -> InitialWeights:
    """A CompVis checkpoint, under the names of the run's network."""
    try:
        params = unet_params_of(denoiser)
    except ValueError as error:
        raise ConfigError(
            f"--ckpt_path {path}: CompVis checkpoints cannot hold a network like this run's: {error}"
        ) from error
    notes = []
    if options.ckpt_config is not None:
        file_params = read_compvis_config(options.ckpt_config, for_training=False).unet_params
        params["use_new_attention_order"] = bool(file_params.get("use_new_attention_order", False))
        notes = _compare_settings(dict(translate_unet(file_params).config), denoiser)
    has_table = isinstance(denoiser, ClassTokenUNet)
    contents = classify_tensors(
        read_tensors(path),
        params,
        ignore_keys=options.ignore_keys or (),
        load_only_unet=False,
        strict=False,
        stages=KnownStages(class_embedder=has_table),
    )
    own = export_unet(denoiser, params)
    raw = _complete(contents.raw or contents.ema, own, own, options.make_it_fit)
    table = _Completed({}, [], [])
    if has_table:
        loaded = {} if contents.class_embedding is None else {CLASS_TABLE: contents.class_embedding}
        own_table = {CLASS_TABLE: denoiser.state_dict()[CLASS_TABLE]}
        table = _complete(loaded, own_table, own_table, options.make_it_fit)
    average = {}
    if contents.ema:
        average = _complete(contents.ema, own, raw.tensors, options.make_it_fit).tensors
    if not contents.raw:
        notes.append("the file holds EMA weights only: training starts from these")
    return InitialWeights(
        source=path,
        raw=convert_tensors(raw.tensors, params)[0] | table.tensors,
        average=convert_tensors(average, params)[0] if average else {},
        ema_metadata=contents.ema_metadata if average else None,
        logvar=contents.logvar,
        missing=raw.missing + table.missing,
        resized=raw.resized + table.resized,
        left_out=contents.left_out,
        notes=notes,
        tables=contents.tables,
    )


def _read_folder(path: Path, options: StartOptions, denoiser: nn.Module) -> InitialWeights:
    """The folder of a pipeline or of a network."""
    folder = path / "unet" if (path / "unet").is_dir() else path
    default_file, raw_file = _weights_file(folder, ""), _weights_file(folder, ".raw")
    if default_file is None:
        raise ConfigError(
            f"--ckpt_path {path} holds no weights ({WEIGHTS_FILE.format('')}): give the folder of a pipeline"
        )
    own = {name: tensor.detach() for name, tensor in denoiser.state_dict().items()}
    prefixes = tuple(options.ignore_keys or ())
    embedder = load_class_embedder(path)
    table = {} if embedder is None else {CLASS_TABLE: embedder}
    default, left_out = _select(read_tensors(default_file) | table, own, prefixes)
    if raw_file is None:
        raw, average = _complete(default, own, own, options.make_it_fit), {}
    else:
        loaded, raw_left_out = _select(read_tensors(raw_file) | table, own, prefixes)
        left_out = raw_left_out + left_out
        raw = _complete(loaded, own, own, options.make_it_fit)
        average = _complete(default, own, raw.tensors, options.make_it_fit).tensors
    config = read_json_object(folder / "config.json").content
    return InitialWeights(
        source=path,
        raw=raw.tensors,
        average=average,
        ema_metadata=load_ema_metadata(path) if average else None,
        logvar=load_logvar(path),
        missing=raw.missing,
        resized=raw.resized,
        left_out=left_out,
        notes=_compare_settings(config, denoiser),
    )


def _select(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], ignored: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[LeftOut]]:
    """The tensors that the network has and that are not ignored, and the others with the reason."""
    selected, left_out = {}, []
    for name, tensor in tensors.items():
        if name.startswith(ignored) or name not in own:
            why = "in ignore_keys" if name.startswith(ignored) else "not in this network"
            left_out.append(LeftOut(name, tuple(tensor.shape), why))
        else:
            selected[name] = tensor
    return selected, left_out


def _weights_file(folder: Path, variant: str) -> Path | None:
    """The weights of a variant: a file, or the index of its shards."""
    files = (folder / WEIGHTS_FILE.format(variant), folder / WEIGHTS_INDEX_FILE.format(variant))
    return next((file for file in files if file.is_file()), None)


def _compare_settings(config: Mapping[str, Any], denoiser: nn.Module) -> list[str]:
    """Notes on settings with which the same weights compute another function."""
    own = {name: value for name, value in network_config(denoiser).items() if not name.startswith("_")}

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    different = [
        f"{name} was {plain(config[name])} and is {plain(value)}"
        for name, value in own.items()
        if name in config and name not in UNCOMPARED_SETTINGS and plain(config[name]) != plain(value)
    ]
    return [f"its network computes another function from these weights: {'; '.join(different)}"] if different else []


class _Completed(NamedTuple):
    """Every tensor of a network, with the names of those that were filled in and of those that were resized."""

    tensors: dict[str, Tensor]
    missing: list[str]
    resized: list[str]


def _complete(
    loaded: Mapping[str, Tensor], own: Mapping[str, Tensor], fill: Mapping[str, Tensor], make_it_fit: str | None
) -> _Completed:
    """Resize loaded tensors to the network's own shapes, and fill in those that are missing."""
    missing = [name for name in own if name not in loaded]
    resized = [name for name in own if name in loaded and loaded[name].shape != own[name].shape]
    if resized and make_it_fit is None:
        shapes = [f"{name} {tuple(loaded[name].shape)}, here {tuple(own[name].shape)}" for name in resized]
        raise ConfigError(
            f"--ckpt_path: {len(resized)} tensors have other shapes than this run's network "
            f"({_join_names(shapes, 3)}). Use the network's own sizes, leave them out with --ignore_keys, or use "
            "--make_it_fit correct"
        )
    tensors = dict(fill)
    for name in own.keys() & loaded.keys():
        tensor = loaded[name].float()
        tensors[name] = fit_weight(tensor, own[name].shape, str(make_it_fit)) if name in resized else tensor
    return _Completed(tensors, missing, resized)


def fit_weight(weight: Tensor, shape: Sequence[int], how: str) -> Tensor:
    """Resize a weight by repeating its output channels (axis 0) and input channels (axis 1) cyclically.

    A repeated input is divided by the number of its uses, so that the sum over inputs does not change; with
    ``compvis`` in place of ``correct``, by one more than that.

    Raises:
        ConfigError: the shapes differ beyond axis 1.
    """
    if len(shape) != weight.ndim or tuple(shape[2:]) != tuple(weight.shape[2:]) or not weight.numel():
        raise ConfigError(
            f"--make_it_fit {how} cannot turn a weight of shape {tuple(weight.shape)} into {tuple(shape)}: only the "
            "first two axes may differ"
        )
    if weight.ndim == 0:
        return weight
    repeated = weight[torch.arange(shape[0]) % weight.shape[0]]
    if weight.ndim == 1:
        return repeated
    columns = torch.arange(shape[1]) % weight.shape[1]
    uses = torch.bincount(columns, minlength=weight.shape[1])[columns] + (1 if how == "compvis" else 0)
    return repeated[:, columns] / uses.to(weight.dtype).reshape(1, -1, *[1] * (weight.ndim - 2))


def _join_names(names: Sequence[str], limit: int = 6) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
