"""What a checkpoint holds, and its files: safetensors and JSON, nothing that a reader would have to trust.

====================  =================================================================================================
model.safetensors     network and log-variances, named as in DenoisingTask: ``denoiser.*`` and ``objective.logvar``
ema.safetensors       the moving average, named as in the network; absent where the run keeps none
optimizer.safetensors ``<parameter>.<slot>``, e.g. ``denoiser.conv_in.weight.exp_avg``; empty before the first step
state.json            ``"format": 1``; all that is no tensor, and dtype and shape of every tensor
====================  =================================================================================================

The layout is the same for one process, data-parallel and sharded ones: whole tensors, free of wrappers' names.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_ddpm_ext._version import __version__

FORMAT = 1
MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE = "state.json"
NETWORK, LOGVAR = "denoiser.", "objective.logvar"


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and which run it is. Everything here is a JSON value.

    Attributes:
        step: optimizer steps done.
        epoch: epochs begun before the next sample.
        samples: samples seen, over all processes.
        seed: of the run.
        world_size: processes that wrote it.
        config: resolved configuration, flat.
        data_fingerprint: of the images and their order.
        records: how far metrics and trackers are.
        monitor: best checkpoints and patience, None where nothing is monitored.
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
    """The state of optimizer, schedule, scaler and average that is no tensor. Everything here is a JSON value.

    Attributes:
        groups: the optimizer's groups with their options; ``params`` holds names.
        slots: parameter to slot to value, of the optimizer's slots that are no tensors.
        lr_scheduler: step counts, base rates and last rates.
        scaler: of float16's loss scaler, None where there is none.
        ema: decay, warm-up and number of updates of the average, None where there is none.
    """

    groups: list[dict[str, Any]]
    slots: dict[str, dict[str, Any]]
    lr_scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    ema: dict[str, Any] | None


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at the end of an optimizer step, on the CPU; no two tensors share memory.

    Attributes:
        model: of the task.
        optimizer: keys ``<parameter>.<slot>``.
        ema: of the average, None where there is none.
        scalars: what is no tensor.
        progress: where the run stands.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    scalars: ScalarState
    progress: Progress

    @property
    def network(self) -> dict[str, Tensor]:
        """The network's raw weights under its own names."""
        return {name.removeprefix(NETWORK): t for name, t in self.model.items() if name.startswith(NETWORK)}

    @property
    def logvar(self) -> Tensor | None:
        """The log-variances, (T,), learned or not."""
        return self.model.get(LOGVAR)

    @property
    def files(self) -> dict[str, dict[str, Tensor]]:
        """Name of each safetensors file to what it holds."""
        files = {MODEL: self.model, OPTIMIZER: self.optimizer}
        return files if self.ema is None else files | {EMA: self.ema}


def library_versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"diffusers-ddpm-ext": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "accelerate", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """Write a snapshot's files, one after the other; that they appear together is the caller's business.

    Args:
        snapshot: to write.
        folder: exists.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
        ValueError: progress or numbers hold something that is no JSON value; nothing is written then.
    """
    state = {
        "format": FORMAT,
        "progress": asdict(snapshot.progress),
        "numbers": asdict(snapshot.scalars),
        "tensors": {name: tensor_specs(tensors) for name, tensors in snapshot.files.items()},
    }
    try:
        text = json.dumps(state, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{STATE}: only JSON values can be in a checkpoint: {error}") from error
    for name, tensors in snapshot.files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def tensor_specs(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Dtype and shape by name.

    Args:
        tensors: any.

    Returns:
        ``[dtype, shape]`` of each, as JSON has it.
    """
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def read_snapshot(folder: Path) -> Snapshot:
    """Read a snapshot and check it against its own table of contents. No pickle is opened.

    Args:
        folder: with the files of :func:`write`; others are not looked at.

    Returns:
        The snapshot, on the CPU.

    Raises:
        ValueError: a file is missing, damaged, of another format, or does not hold what it should; file and key are
            named.
    """
    path = folder / STATE
    state = _object(path, _read_json(path), {"format": int, "progress": dict, "numbers": dict, "tensors": dict})
    progress = Progress(**_object(path, state["progress"], _PROGRESS, "progress."))
    numbers = ScalarState(**_object(path, state["numbers"], _NUMBERS, "numbers."))
    contents = state["tensors"]
    if not {MODEL, OPTIMIZER} <= contents.keys() <= {MODEL, OPTIMIZER, EMA}:
        raise ValueError(f"{path}: tensors names {sorted(contents)}, not {MODEL}, {OPTIMIZER} and, if kept, {EMA}.")
    if (EMA in contents) != (numbers.ema is not None):
        raise ValueError(f"{path}: numbers.ema and tensors.{EMA} do not agree on whether there is an average.")
    tensors = {name: _read_tensors(folder / name, contents[name]) for name in contents}
    return Snapshot(tensors[MODEL], tensors[OPTIMIZER], tensors.get(EMA), numbers, progress)


_NONE = type(None)
_PROGRESS: dict[str, Any] = {
    "step": int,
    "epoch": int,
    "samples": int,
    "seed": int,
    "world_size": int,
    "config": dict,
    "data_fingerprint": str,
    "records": dict,
    "monitor": (dict, _NONE),
    "versions": dict,
}
_NUMBERS: dict[str, Any] = {
    "groups": list,
    "slots": dict,
    "lr_scheduler": dict,
    "scaler": (dict, _NONE),
    "ema": (dict, _NONE),
}
assert list(_PROGRESS) == [f.name for f in fields(Progress)]
assert list(_NUMBERS) == [f.name for f in fields(ScalarState)]


def _read_json(path: Path) -> Any:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is int and found > FORMAT:
        raise ValueError(f"{path}: format {found} is newer than {FORMAT}, which this version reads; update it.")
    if found != FORMAT or isinstance(found, bool):
        raise ValueError(f'{path}: must say "format": {FORMAT}, says {found!r}.')
    return state


def _object(path: Path, value: Any, kinds: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A JSON object with exactly these keys and kinds of values."""
    missing, unknown = sorted(kinds.keys() - value.keys()), sorted(value.keys() - kinds.keys())
    if missing or unknown:
        raise ValueError(f"{path}: {prefix}{(missing + unknown)[0]} is {'missing' if missing else 'unexpected'}.")
    for key, kind in kinds.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise ValueError(f"{path}: {prefix}{key} is {value[key]!r:.60}, of the wrong kind.")
    return value


def _read_tensors(path: Path, contents: Any) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors' own error class differs between its versions
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    difference = (
        first_difference(contents, tensor_specs(tensors)) if isinstance(contents, dict) else "no table of contents"
    )
    if difference:
        raise ValueError(f"{path}: {difference}.")
    return tensors


def first_difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """The first difference between two tables of tensors.

    Args:
        expected: name to ``[dtype, shape]``, or to anything that can be compared.
        found: likewise.

    Returns:
        A sentence, empty where there is no difference.
    """
    for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            return f"{min(names)} is {what}" + (f", and {len(names) - 1} more" if len(names) > 1 else "")
    for name in expected:
        if expected[name] != found[name]:
            return f"{name} is {found[name]}, expected {expected[name]}"
    return ""
