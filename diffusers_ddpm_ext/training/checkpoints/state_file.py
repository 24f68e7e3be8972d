"""``state.json`` of a checkpoint: everything that is not a tensor, checked. Importing this loads no torch."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from diffusers_ddpm_ext._version import __version__
from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.utils.input_files import file_name, json_object, read_json

STATE_FORMAT = 1
STATE_FILE = "state.json"
MAX_STATE_BYTES = 1 << 26
MAX_THREADS = 1024  # of --num_threads; a machine may have more cores
MAX_CORES = 1 << 16
RECORDS = frozenset(
    {"metrics_size", "todo", "stopped_early", "recoveries", "fast_attention", "latent_scale", "stream", "threads"}
)
"""What a run writes into `Progress.records`; a later version's may mean that more remains to be done."""
MODEL_FILE, EMA_FILE, OPTIMIZER_FILE = "model.safetensors", "ema.safetensors", "optimizer.safetensors"

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
        records: size of the metrics file, remaining tasks of the step, and others of `RECORDS`.
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
        ema: decay, warm-up and number of updates (in bfloat16 also of roundings), None if there is none.
    """

    groups: list[dict[str, Any]]
    slots: dict[str, dict[str, Any]]
    lr_scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    ema: dict[str, Any] | None


@dataclass(frozen=True)
class StateFile:
    """Content of ``state.json``.

    Attributes:
        progress: step and identity of the run.
        scalars: state that is not tensors; ``numbers`` in the file.
        tensors: name of each safetensors file to the specs of its tensors.
    """

    progress: Progress
    scalars: ScalarState
    tensors: dict[str, TensorSpecs]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a run's results depend on."""
    versions = {"diffusers-ddpm-ext": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "accelerate", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def encode_state(state: StateFile) -> str:
    """The text of ``state.json``.

    Raises:
        ValueError: progress or scalars contain a value that is not JSON.
    """
    content = {
        "format": STATE_FORMAT,
        "progress": asdict(state.progress),
        "numbers": asdict(state.scalars),
        "tensors": state.tensors,
    }
    try:
        return json.dumps(content, indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{STATE_FILE}: only JSON values can be in a checkpoint: {error}") from error


def read_state(folder: Path) -> StateFile:
    """Read and check the ``state.json`` of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, of another format, or has values that no run writes; the key is named.
    """
    path = folder / STATE_FILE
    content = json_object(read_json(path, max_bytes=MAX_STATE_BYTES, allow_nan=True), file_name(path)).content
    number = content.get("format")
    if type(number) is int and number > STATE_FORMAT:
        raise ValueError(f"{path}: format {number} is newer than {STATE_FORMAT}, which this version reads; update it.")
    if number != STATE_FORMAT or isinstance(number, bool):
        raise ValueError(f'{path}: must have "format": {STATE_FORMAT}, has {printable(repr(number), 60)}.')
    kinds = {"format": (int,), "progress": (dict,), "numbers": (dict,), "tensors": (dict,)}
    _check_object(path, content, kinds)
    progress = Progress(**_check_object(path, content["progress"], _json_types(Progress), "progress."))
    scalars = ScalarState(**_check_object(path, content["numbers"], _json_types(ScalarState), "numbers."))
    specs = content["tensors"]
    if not {MODEL_FILE, OPTIMIZER_FILE} <= specs.keys() <= {MODEL_FILE, OPTIMIZER_FILE, EMA_FILE}:
        expected = f"{MODEL_FILE}, {OPTIMIZER_FILE} and, with an EMA, {EMA_FILE}"
        raise ValueError(f"{path}: tensors names {printable(str(sorted(specs)), 200)}, not {expected}.")
    if (EMA_FILE in specs) != (scalars.ema is not None):
        raise ValueError(f"{path}: numbers.ema and tensors.{EMA_FILE} do not agree on whether there is an EMA.")
    if not all(isinstance(table, dict) for table in specs.values()):
        raise ValueError(f"{path}: tensors has no table of tensors for each file.")
    problem = _progress_problem(progress) or _scalars_problem(scalars)
    if problem:
        raise ValueError(f"{path}: {problem}.")
    return StateFile(progress, scalars, specs)


def _progress_problem(progress: Progress) -> str:
    """The first value of a progress that no run writes; empty if there is none."""
    for name, low in (("step", 0), ("epoch", 0), ("samples", 0), ("seed", 0), ("world_size", 1)):
        if getattr(progress, name) < low:
            return f"progress.{name} is {getattr(progress, name)}, below {low}"
    config, records, step = progress.config, progress.records, progress.step
    if config.get("seed", progress.seed) != progress.seed:
        return f"progress.seed is {progress.seed}, and progress.config has {printable(repr(config['seed']), 60)}"
    batch = config.get("effective_batch")
    if batch is not None and (type(batch) is not int or progress.samples != step * batch):
        return f"progress.samples is {progress.samples}, not {step} steps of {printable(repr(batch), 60)} samples"
    if progress.epoch > progress.samples:
        return f"progress.epoch is {progress.epoch}, more than there are samples ({progress.samples})"
    if unknown := sorted(records.keys() - RECORDS):
        return f"progress.records has {printable(repr(unknown[0]), 60)}, which this version does not know"
    for name in ("metrics_size", "recoveries"):
        if type(records.get(name, 0)) is not int or records.get(name, 0) < 0:
            return f"progress.records.{name} is {printable(repr(records[name]), 60)}, not a number of 0 or more"
    for name in ("stopped_early", "fast_attention"):
        if type(records.get(name, False)) is not bool:
            return f"progress.records.{name} is not true or false"
    pending = records.get("todo", [])
    if not isinstance(pending, list) or not all(isinstance(name, str) for name in pending):
        return "progress.records.todo is not a list of names"
    if len(set(pending)) < len(pending):
        return "progress.records.todo names a task twice"
    return _threads_problem(records["threads"]) if "threads" in records else ""


def _threads_problem(threads: Any) -> str:
    """The first value of a run's CPU threads that no run writes; empty if there is none."""
    limits = {"count": MAX_THREADS, "cores": MAX_CORES}
    if not isinstance(threads, dict) or threads.keys() != limits.keys():
        return "progress.records.threads does not have exactly a count and cores"
    for name, most in limits.items():
        if type(threads[name]) is not int or not 1 <= threads[name] <= most:
            return f"progress.records.threads.{name} is {printable(repr(threads[name]), 60)}, not 1 to {most}"
    return ""


def _scalars_problem(scalars: ScalarState) -> str:
    """The first of the other values that no run writes; empty if there is none."""
    state = scalars.lr_scheduler
    for name in ("base_lrs", "_last_lr"):
        if name in state and not (isinstance(state[name], list) and all(map(is_finite, state[name]))):
            return f"numbers.lr_scheduler.{name} is not a list of finite numbers"
    for name in ("last_epoch", "_step_count"):
        if type(state.get(name, 0)) is not int or state.get(name, 0) < 0:
            return f"numbers.lr_scheduler.{name} is {printable(repr(state[name]), 60)}, not a number of steps"
    for name, value in (scalars.scaler or {}).items():
        if not is_finite(value) or value < 0:
            return f"numbers.scaler.{printable(name, 60)} is {printable(repr(value), 60)}, not a number of 0 or more"
    for name, slots in scalars.slots.items():
        if not isinstance(slots, dict) or not all(_is_plain(value) for value in slots.values()):
            return f"numbers.slots.{printable(name, 60)} does not have one plain value per slot"
    for number, group in enumerate(scalars.groups):
        names = group.get("params") if isinstance(group, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return f"numbers.groups[{number}] has no list of parameters"
    return ""


def is_finite(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | str) or is_finite(value)


def _json_types(cls: type[Progress] | type[ScalarState]) -> dict[str, tuple[type, ...]]:
    """Field's name to the classes that its value has as JSON."""
    hints = {name: get_args(t) if isinstance(t, UnionType) else (t,) for name, t in get_type_hints(cls).items()}
    return {name: tuple(get_origin(t) or t for t in types) for name, types in hints.items()}


def _check_object(path: Path, value: Any, kinds: Mapping[str, tuple[type, ...]], prefix: str = "") -> dict[str, Any]:
    """Return a JSON object if it has exactly these keys and types of values."""
    missing, unknown = sorted(kinds.keys() - value.keys()), sorted(value.keys() - kinds.keys())
    if missing or unknown:
        raise ValueError(
            f"{path}: {prefix}{printable((missing + unknown)[0], 60)} is {'missing' if missing else 'unexpected'}."
        )
    for key, kind in kinds.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise ValueError(f"{path}: {prefix}{key} is {printable(repr(value[key]), 60)}, of the wrong type.")
    return value
