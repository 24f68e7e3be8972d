"""Several small runs, one after the other, in the processes that `torchrun` started; used by test_engine.py.

python run_list.py '[["FOLDER", {"option": value}], ...]' [sharded | unreadable | device]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.distributed.fsdp import fully_shard

from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.data import dataset as data
from diffusers_ddpm_ext.training.loop import run_batches
from diffusers_ddpm_ext.utils import host_reads
from helpers.runs import tiny_run


def prepare_sharded(accelerator: Accelerator, task: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Shard the task in place and give its new parameters to the optimizer, as Accelerate does on a GPU (FSDP2)."""
    places = {parameter: name for name, parameter in task.named_parameters()}
    for block in (*task.denoiser.down_blocks, task.denoiser.mid_block, *task.denoiser.up_blocks):
        fully_shard(block)
    fully_shard(task)
    spread = dict(task.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [spread[places[parameter]] for parameter in group["params"]]
    return task, accelerator.prepare_optimizer(optimizer)


def become_unreadable() -> None:
    """Damage the images that the second process reads once the run has started."""
    real = run_batches.open_batches

    def breaking(setup: Any, *arguments: Any, **options: Any) -> Any:
        if setup.accelerator.process_index == 1:
            for path in Path(setup.config.data.train_data_dir).iterdir():
                path.write_bytes(path.read_bytes()[:40])
        return real(setup, *arguments, **options)

    data.load_data.__kwdefaults__["memory_limit"] = 0  # decode each time
    run_batches.open_batches = breaking


def main() -> None:
    """Train each run."""
    torch.set_num_threads(1)
    PartialState.destroy_process_group = lambda self, group=None: None  # the next run uses it again
    if sys.argv[2:] == ["sharded"]:
        Accelerator.prepare = prepare_sharded
        # The module is used directly by every process: there is no wrapper to remove.
        Accelerator.unwrap_model = lambda self, model, **_: model
    if sys.argv[2:] == ["device"]:  # as on an accelerator, where reads are not free
        host_reads.FREE = frozenset()
    if sys.argv[2:] == ["unreadable"]:
        become_unreadable()
    for folder, options in json.loads(sys.argv[1]):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        trainer.train(tiny_run(Path(folder), **options))


if __name__ == "__main__":
    main()
