"""Snapshot of a training run, and the files of a checkpoint that store it: safetensors and JSON, no pickle.

====================  =================================================================================================
model.safetensors     network and log-variances, named as in DenoisingTask: ``denoiser.*`` and ``objective.logvar``
ema.safetensors       the EMA weights, named as in the network; absent if the run has no EMA
optimizer.safetensors ``<parameter>.<slot>``, e.g. ``denoiser.conv_in.weight.exp_avg``; empty before the first step
state.json            ``"format": 1``; everything that is not a tensor, and dtype and shape of every tensor
====================  =================================================================================================

The layout is the same for single-process, data-parallel and sharded runs: unsharded tensors, names without wrappers.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_ddpm_ext._version import __version__

STATE_FORMAT = 1
MODEL_FILE, EMA_FILE, OPTIMIZER_FILE = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE_FILE = "state.json"

TensorSpecs = dict[str, list[Any]]
"""Tensor's name to ``[dtype, shape]``, as in JSON."""


@dataclass(frozen=True)
class Progress:
    """Step of a run, and what identifies the run. Every value is JSON.

    Attributes:
        step: optimizer steps done.
        epoch: epochs completed.
        samples: samples seen, over all processes.
        seed: of the run.
        world_size: number of processes that wrote it.
        config: resolved configuration, flat.
        data_fingerprint: of the images and their order.
        records: size of the metrics file, remaining tasks of the step.
        monitor: best checkpoints and patience, None if nothing is monitored.
        versions: of the libraries that wrote it.
    """

    step: int
    epoch: int
    samples: int
    seed: int
    world_size: int
    config: dict[str, Any]
    data_fingerprint: str
    records: dict[str, Any] = field(default_factory=dict)
    monitor: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: library_versions())


@dataclass(frozen=True)
class ScalarState:
    """State of optimizer, LR scheduler, gradient scaler and EMA that is not tensors. Every value is JSON.

    Attributes:
        groups: the optimizer's parameter groups with their options; ``params`` holds names.
        slots: parameter's name to slot to value, for the optimizer's slots that are not tensors.
        lr_scheduler: step counts, base rates and last rates.
        scaler: of float16's gradient scaler, None if there is none.
        ema: decay, warm-up and number of updates, None if there is none.
    """

    groups: list[dict[str, Any]]
    slots: dict[str, dict[str, Any]]
    lr_scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    ema: dict[str, Any] | None


@dataclass(frozen=True)
class Snapshot:
    """State of a run at the end of an optimizer step, on the CPU; no two tensors share memory.

    Attributes:
        model: of the task.
        optimizer: keys ``<parameter>.<slot>``.
        ema: EMA weights, None if there are none.
        scalars: state that is not tensors; ``numbers`` in the file.
        progress: step and identity of the run.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    scalars: ScalarState
    progress: Progress

    @property
    def files(self) -> dict[str, dict[str, Tensor]]:
        """Name of each safetensors file to its tensors."""
        files = {MODEL_FILE: self.model, OPTIMIZER_FILE: self.optimizer}
        return files if self.ema is None else files | {EMA_FILE: self.ema}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a run's results depend on."""
    versions = {"diffusers-ddpm-ext": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "accelerate", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def write_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """Write a snapshot's files, one after the other. `write_checkpoint` makes this atomic.

    Raises:
        OSError: the disk is full, or the folder is not writable.
        ValueError: progress or scalars contain a value that is not JSON; nothing is written then.
    """
    state = {
        "format": STATE_FORMAT,
        "progress": asdict(snapshot.progress),
        "numbers": asdict(snapshot.scalars),
        "tensors": {name: tensor_specs(tensors) for name, tensors in snapshot.files.items()},
    }
    try:
        text = json.dumps(state, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{STATE_FILE}: only JSON values can be in a checkpoint: {error}") from error
    for name, tensors in snapshot.files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def tensor_specs(tensors: dict[str, Tensor]) -> TensorSpecs:
    """Dtype and shape of each tensor, by name."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def read_snapshot(folder: Path) -> Snapshot:
    """Read a snapshot to the CPU and check its tensors against the table in its ``state.json``; open no pickle.

    Raises:
        ValueError: a file is missing, damaged, of another format, or has unexpected content; file and key are named.
    """
    path = folder / STATE_FILE
    kinds = {"format": (int,), "progress": (dict,), "numbers": (dict,), "tensors": (dict,)}
    state = _check_object(path, _read_json(path), kinds)
    progress = Progress(**_check_object(path, state["progress"], _json_types(Progress), "progress."))
    scalars = ScalarState(**_check_object(path, state["numbers"], _json_types(ScalarState), "numbers."))
    specs = state["tensors"]
    if not {MODEL_FILE, OPTIMIZER_FILE} <= specs.keys() <= {MODEL_FILE, OPTIMIZER_FILE, EMA_FILE}:
        expected = f"{MODEL_FILE}, {OPTIMIZER_FILE} and, with an EMA, {EMA_FILE}"
        raise ValueError(f"{path}: tensors names {sorted(specs)}, not {expected}.")
    if (EMA_FILE in specs) != (scalars.ema is not None):
        raise ValueError(f"{path}: numbers.ema and tensors.{EMA_FILE} do not agree on whether there is an EMA.")
    tensors = {name: _read_tensors(folder / name, specs[name]) for name in specs}
    return Snapshot(tensors[MODEL_FILE], tensors[OPTIMIZER_FILE], tensors.get(EMA_FILE), scalars, progress)


def _json_types(cls: type[Progress] | type[ScalarState]) -> dict[str, tuple[type, ...]]:
    """Field's name to the classes that its value has as JSON."""
    hints = {name: get_args(t) if isinstance(t, UnionType) else (t,) for name, t in get_type_hints(cls).items()}
    return {name: tuple(get_origin(t) or t for t in types) for name, types in hints.items()}


def _read_json(path: Path) -> Any:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    number = state.get("format") if isinstance(state, dict) else None
    if type(number) is int and number > STATE_FORMAT:
        raise ValueError(f"{path}: format {number} is newer than {STATE_FORMAT}, which this version reads; update it.")
    if number != STATE_FORMAT or isinstance(number, bool):
        raise ValueError(f'{path}: must have "format": {STATE_FORMAT}, has {number!r}.')
    return state


def _check_object(path: Path, value: Any, kinds: Mapping[str, tuple[type, ...]], prefix: str = "") -> dict[str, Any]:
    """Return a JSON object if it has exactly these keys and types of values."""
    missing, unknown = sorted(kinds.keys() - value.keys()), sorted(value.keys() - kinds.keys())
    if missing or unknown:
        raise ValueError(f"{path}: {prefix}{(missing + unknown)[0]} is {'missing' if missing else 'unexpected'}.")
    for key, kind in kinds.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise ValueError(f"{path}: {prefix}{key} is {value[key]!r:.60}, of the wrong type.")
    return value


def _read_tensors(path: Path, specs: Any) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors' own error class differs between its versions
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    difference = first_difference(specs, tensor_specs(tensors)) if isinstance(specs, dict) else "no table of tensors"
    if difference:
        raise ValueError(f"{path}: {difference}.")
    return tensors


def first_difference(expected: dict[str, Any], actual: dict[str, Any]) -> str:
    """Describe the first difference between two tables, such as `TensorSpecs`; empty if they are equal."""
    missing, unexpected = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            return f"{min(names)} is {what}" + (f", and {len(names) - 1} more" if len(names) > 1 else "")
    for name in expected:
        if expected[name] != actual[name]:
            return f"{name} is {actual[name]}, expected {expected[name]}"
    return ""
