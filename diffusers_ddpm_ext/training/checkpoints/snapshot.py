"""Snapshot of a training run, and the files of a checkpoint that store it: safetensors and JSON, no pickle.

====================  =================================================================================================
model.safetensors     network and log-variances, named as in DenoisingTask: ``denoiser.*`` and ``objective.logvar``
                      (and ``text_encoder.*`` of one that is trained)
ema.safetensors       the EMA weights, named as in the network; absent if the run has no EMA
optimizer.safetensors ``<parameter>.<slot>``, e.g. ``denoiser.conv_in.weight.exp_avg``; empty before the first step
state.json            ``"format": 1``; everything that is not a tensor, and dtype and shape of every tensor
====================  =================================================================================================

The layout is the same for single-process, data-parallel and sharded runs: unsharded tensors, names without wrappers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffusers_ddpm_ext.training.checkpoints.state_file import (
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    Progress,
    ScalarState,
    StateFile,
    TensorSpecs,
    encode_state,
    library_versions,
    read_state,
)
from diffusers_ddpm_ext.utils.array_files import read_tensors
from diffusers_ddpm_ext.utils.files import apply_umask, write_text_atomically

__all__ = ["Progress", "ScalarState", "Snapshot", "library_versions", "read_snapshot", "write_snapshot"]


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


def write_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """Write a snapshot's files, one after the other. `write_checkpoint` makes this atomic.

    Raises:
        OSError: the disk is full, or the folder is not writable.
        ValueError: progress or scalars contain a value that is not JSON; nothing is written then.
    """
    specs = {name: tensor_specs(tensors) for name, tensors in snapshot.files.items()}
    text = encode_state(StateFile(snapshot.progress, snapshot.scalars, specs))
    for name, tensors in snapshot.files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    write_text_atomically(folder / STATE_FILE, text)
    apply_umask(folder)


def tensor_specs(tensors: dict[str, Tensor]) -> TensorSpecs:
    """Dtype and shape of each tensor, by name."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def read_snapshot(folder: Path) -> Snapshot:
    """Read a snapshot to the CPU and check its tensors against the table in its ``state.json``; open no pickle.

    Raises:
        ValueError: a file is missing, damaged, of another format, or has unexpected content; file and key are named.
    """
    state = read_state(folder)
    tensors = {name: _read_tensors(folder / name, state.tensors[name]) for name in state.tensors}
    return Snapshot(tensors[MODEL_FILE], tensors[OPTIMIZER_FILE], tensors.get(EMA_FILE), state.scalars, state.progress)


def _read_tensors(path: Path, specs: TensorSpecs) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    difference = first_difference(specs, tensor_specs(tensors))
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
