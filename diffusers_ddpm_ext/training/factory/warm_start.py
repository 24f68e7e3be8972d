"""Starting from weights that exist: of a CompVis checkpoint, or of a folder of Diffusers.

As in the original, names that the file lacks keep their initial weights and names that the network lacks are left out;
unlike there, a run says all of it, a file of which nothing fits is refused, and an average that the file lacks starts
from the loaded weights.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import read_config
from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
from diffusers_ddpm_ext.compvis.state_dict import LeftOut, describe_difference, sort_tensors
from diffusers_ddpm_ext.compvis.unet_params import unet_params_of
from diffusers_ddpm_ext.compvis.weights import convert_tensors, export_unet
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.losses.logvar import load_logvar
from diffusers_ddpm_ext.losses.objective import DDPMObjective
from diffusers_ddpm_ext.models.ema import EmaMetadata, LitEMA, load_ema_metadata
from diffusers_ddpm_ext.pipelines.guidance import network_config
from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints
from diffusers_ddpm_ext.training.config.options import StartOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig

WEIGHTS = "diffusion_pytorch_model{}.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index{}.json"
# Of a network's configuration, what may differ without another function of the same weights.
NO_FUNCTION = ("sample_size", "in_channels", "out_channels", "dropout")


@dataclass
class InitialWeights:
    """What a file gives to a run, under the names of the run's network.

    Attributes:
        source: the file or folder.
        raw: the weights to train on from.
        average: the moving average; empty where the file has none.
        facts: of the average.
        logvar: (T,), None where there is none.
        missing: names that keep their initial weights.
        fitted: names whose channels were repeated or cut.
        left_out: tensors of the file that found no place.
        notes: sentences a person should read.
        tables: of the file's schedule.
    """

    source: Path
    raw: dict[str, Tensor]
    average: dict[str, Tensor]
    facts: EmaMetadata | None
    logvar: Tensor | None
    missing: list[str]
    fitted: list[str]
    left_out: list[LeftOut]
    notes: list[str] = field(default_factory=list)
    tables: dict[str, Tensor] = field(default_factory=dict)

    def describe(self, took: Sequence[str]) -> str:
        """What was loaded, and what was not, in a few lines.

        Args:
            took: what the run took beside the weights.

        Returns:
            Lines to print.
        """
        given = len(self.raw) - len(self.missing)
        lines = [f"--ckpt_path {self.source}: {given} of {len(self.raw)} tensors of the network; {', '.join(took)}"]
        if self.fitted:
            lines.append(f"  made to fit: {_some(self.fitted)}")
        if self.missing:
            lines.append(f"  not in the file, initialised afresh: {_some(self.missing)}")
        groups = Counter((left.source.partition(".")[0], left.why) for left in self.left_out)
        lines += [f"  left out: {name} ({count} tensors): {why}" for (name, why), count in groups.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def load_initial_weights(config: TrainConfig, denoiser: nn.Module, objective: DDPMObjective) -> InitialWeights | None:
    """Read the weights that a run starts from, and put them into its network and its log-variances.

    Args:
        config: as parsed.
        denoiser: the run's network, on the CPU, free of wrappers.
        objective: of the run.

    Returns:
        What the file gave; None without ``ckpt_path``, and where it is gone but the run has a checkpoint to go on
        from.

    Raises:
        ConfigError: the file cannot be read, nothing of it fits, or shapes differ without ``make_it_fit``.
    """
    options = config.start
    if options.ckpt_path is None:
        return None
    path = Path(options.ckpt_path).expanduser()
    if not path.exists():
        resumes, folder = config.resumes, config.output.output_dir
        if resumes and folder is not None and list_checkpoints(Path(folder)):
            return None
        raise ConfigError(f"--ckpt_path {path} does not exist: give a checkpoint, or the folder of a pipeline")
    try:
        start = _of_folder(path, options, denoiser) if path.is_dir() else _of_checkpoint(path, options, denoiser)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"--ckpt_path {path}: {' '.join(str(error).split())}") from error
    if len(start.missing) == len(start.raw):
        raise ConfigError(f"--ckpt_path {path}: it holds no weights of this network under names that are known")
    denoiser.load_state_dict(start.raw, strict=True)
    if start.logvar is not None:
        _take_logvar(start, objective, options.load_only_unet)
    difference = describe_difference(start.tables, objective.schedule)
    if difference:
        start.notes.append(f"the run's schedule is its own, not the file's: {difference}")
    return start


def initialize_ema(start: InitialWeights, ema: LitEMA, options: StartOptions) -> str:
    """Let the run's average begin where the file's stands, or at the loaded weights.

    Args:
        start: from `begin`.
        ema: of the run's network, made after its weights were loaded.
        options: section ``start``.

    Returns:
        What was done, in a few words.
    """
    if not start.average or options.reset_ema:
        return "EMA begins at these weights" + (" (--reset_ema)" if start.average else ": the file has none")
    state = ema.state_dict()
    state["shadow"] = {name: start.average[name].to(old.dtype) for name, old in state["shadow"].items()}
    updates = 0 if start.facts is None or options.reset_num_ema_updates else max(start.facts.num_updates, 0)
    state["num_updates"] = updates if ema.use_num_updates else -1
    ema.load_state_dict(state)
    return f"EMA of the file, {updates:,} updates"


def _take_logvar(start: InitialWeights, objective: DDPMObjective, only_unet: bool) -> None:
    table, own = start.logvar, objective.log_variances()
    assert table is not None
    if only_unet:
        start.notes.append("its log-variances are left out (--load_only_unet)")
    elif not objective.learn_logvar:
        start.notes.append("its log-variances are left out: this run does not learn them (--learn_logvar)")
    elif objective.logvar_network is not None:
        start.notes.append("its log-variances are left out: this run learns a function (--logvar_kind continuous)")
    elif table.shape != own.shape:
        start.notes.append(f"its log-variances are left out: they are of {len(table)} steps, this run has {len(own)}")
    else:
        with torch.no_grad():
            own.copy_(table)
        start.notes.append(f"log-variances of the file, mean {float(table.float().mean()):.4f}")


def _of_checkpoint(path: Path, options: StartOptions, denoiser: nn.Module) -> InitialWeights:
    """A CompVis checkpoint, in the names of the run's network."""
    try:
        params = unet_params_of(denoiser)
    except ValueError as error:
        raise ConfigError(
            f"--ckpt_path {path}: a CompVis checkpoint has no network like this run's: {error}"
        ) from error
    notes = []
    if options.ckpt_config is not None:
        theirs = read_config(options.ckpt_config).unet_params
        params["use_new_attention_order"] = bool(theirs.get("use_new_attention_order", False))
        notes = _other_function(dict(translate_unet(theirs).config), denoiser)
    contents = sort_tensors(
        read_tensors(path), params, ignore_keys=options.ignore_keys or (), load_only_unet=False, strict=False
    )
    mine = export_unet(denoiser, params)
    fitting = _Fitting(mine, options.make_it_fit)
    raw = fitting.complete(contents.raw or contents.average)
    average = fitting.complete(contents.average, raw) if contents.average else {}
    facts = EmaMetadata(0.9999 if contents.decay is None else contents.decay, contents.num_updates or 0)
    if not contents.raw:
        notes.append("the file holds EMA weights only: training goes on from these")
    return InitialWeights(
        path,
        convert_tensors(raw, params)[0],
        convert_tensors(average, params)[0] if average else {},
        facts if average else None,
        contents.logvar,
        fitting.missing,
        fitting.fitted,
        contents.left_out,
        notes,
        contents.tables,
    )


def _of_folder(path: Path, options: StartOptions, denoiser: nn.Module) -> InitialWeights:
    """A pipeline's folder, or a network's."""
    place = path / "unet" if (path / "unet").is_dir() else path
    default = _weights(place, "")
    if default is None:
        raise ConfigError(f"--ckpt_path {path} holds no weights ({WEIGHTS.format('')}): give the folder of a pipeline")
    raw_file = _weights(place, ".raw")
    given, raw_given = read_tensors(default), None if raw_file is None else read_tensors(raw_file)
    left_out: list[LeftOut] = []
    mine = {name: tensor.detach() for name, tensor in denoiser.state_dict().items()}
    fitting = _Fitting(mine, options.make_it_fit)
    prefixes = tuple(options.ignore_keys or ())

    def wanted(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in given.items():
            why = "in ignore_keys" if name.startswith(prefixes) and prefixes else "not in this network"
            if why == "in ignore_keys" or name not in mine:
                left_out.append(LeftOut(name, tuple(tensor.shape), why))
            else:
                kept[name] = tensor
        return kept

    raw = fitting.complete(wanted(given if raw_given is None else raw_given))
    average = fitting.complete(wanted(given), raw) if raw_given is not None else {}
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    return InitialWeights(
        path,
        raw,
        average,
        load_ema_metadata(path) if average else None,
        load_logvar(path),
        fitting.missing,
        fitting.fitted,
        left_out,
        _other_function(config, denoiser),
    )


def _weights(place: Path, variant: str) -> Path | None:
    """The file, or the index of shards, of a variant."""
    return next(
        (path for path in (place / WEIGHTS.format(variant), place / INDEX.format(variant)) if path.is_file()), None
    )


def _other_function(config: Mapping[str, Any], denoiser: nn.Module) -> list[str]:
    """Note settings by which the same weights are another function."""
    own = {name: value for name, value in network_config(denoiser).items() if not name.startswith("_")}

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    different = [
        f"{name} was {plain(config[name])} and is {plain(value)}"
        for name, value in own.items()
        if name in config and name not in NO_FUNCTION and plain(config[name]) != plain(value)
    ]
    return [f"its network is another function of its weights: {'; '.join(different)}"] if different else []


class _Fitting:
    """Brings tensors to the shapes of a network's, and remembers what it took to do so."""

    def __init__(self, mine: Mapping[str, Tensor], make_it_fit: str | None) -> None:
        self.mine = mine
        self.make_it_fit = make_it_fit
        self.missing: list[str] = []
        self.fitted: list[str] = []

    def complete(self, given: Mapping[str, Tensor], rest: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return every tensor of the network: given, made to fit, or else from the rest or as it is."""
        missing = [name for name in self.mine if name not in given]
        other = [name for name in self.mine if name in given and given[name].shape != self.mine[name].shape]
        if other and self.make_it_fit is None:
            shapes = [f"{name} {tuple(given[name].shape)}, here {tuple(self.mine[name].shape)}" for name in other]
            raise ConfigError(
                f"--ckpt_path: {len(other)} tensors have other shapes than this run's network ({_some(shapes, 3)}). "
                "Give the network's own sizes, leave them out with --ignore_keys, or say --make_it_fit correct"
            )
        if rest is None:
            self.missing, self.fitted = missing, other
        tensors = dict(rest if rest is not None else self.mine)
        for name in self.mine.keys() & given.keys():
            tensor = given[name].float()
            tensors[name] = (
                fit_weight(tensor, self.mine[name].shape, str(self.make_it_fit)) if name in other else tensor
            )
        return tensors


def fit_weight(old: Tensor, shape: Sequence[int], how: str) -> Tensor:
    """Give a weight other widths, by repeating its output channels (axis 0) and input channels (axis 1) in turn.

    A repeated input is divided by the number of its uses, so that the sum over inputs stays what it was.

    Args:
        old: weights, floating.
        shape: wanted; beyond axis 1 as it was.
        how: ``correct``, or ``compvis``, which divides by one use more than there are.

    Returns:
        Weights of that shape.

    Raises:
        ConfigError: the shapes differ elsewhere.
    """
    if len(shape) != old.ndim or tuple(shape[2:]) != tuple(old.shape[2:]) or not old.numel():
        raise ConfigError(
            f"--make_it_fit {how} cannot turn a weight of shape {tuple(old.shape)} into {tuple(shape)}: only the "
            "first two axes may differ"
        )
    if old.ndim == 0:
        return old
    new = old[torch.arange(shape[0]) % old.shape[0]]
    if old.ndim == 1:
        return new
    columns = torch.arange(shape[1]) % old.shape[1]
    uses = torch.bincount(columns, minlength=old.shape[1])[columns] + (1 if how == "compvis" else 0)
    return new[:, columns] / uses.to(old.dtype).reshape(1, -1, *[1] * (old.ndim - 2))


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
