"""One process of a small run that remembers the gradients of its first step; started by test_parallel.py.

python parallel_run.py FOLDER GRADIENTS RANK_THAT_FAILS BATCH ACCUMULATION STEPS OPTIONS_AS_JSON
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training import distributed as processes
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.factory.optimizer import clip_gradients
from diffusers_ddpm_ext.training.loop import setup, step
from helpers.runs import tiny_run


def main() -> None:
    """Train."""
    folder, gradients = Path(sys.argv[1]), Path(sys.argv[2])
    failing, batch, accumulation, length = map(int, sys.argv[3:7])
    options = json.loads(sys.argv[7])
    torch.set_num_threads(1)
    processes.EXIT_DELAY = 2
    atexit.unregister(processes.end_group_threads)
    atexit.register(write_threads, gradients.with_name(f"threads-{os.environ.get('RANK', '0')}.json"))
    atexit.register(processes.end_group_threads)  # what is registered last runs first

    def remember(parameters: list[torch.nn.Parameter], max_norm: float, *norms: torch.Tensor) -> torch.Tensor:
        if not gradients.exists() and len(parameters) > 1 and processes_rank() == 0:
            torch.save([parameter.grad.clone() for parameter in parameters], gradients)
        return clip_gradients(parameters, max_norm, *norms)

    def load_or_fail(*args: Any, **named: Any) -> Any:
        if processes_rank() == failing:
            raise ConfigError(f"--train_data_dir: rank {failing} cannot read")
        return load_data(*args, **named)

    load_data, setup.load_data, step.clip_gradients = setup.load_data, load_or_fail, remember
    trainer.train(
        tiny_run(
            folder,
            train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_train_steps=length,
            validation_steps=10,
            logging_steps=7,
            overwrite_output_dir=True,
            **options,
        )
    )


def write_threads(path: Path) -> None:
    """Write the names of this process's threads, where the system lists them."""
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []
    path.write_text(json.dumps(names))


def processes_rank() -> int:
    """Rank of this process, 0 when it is alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


if __name__ == "__main__":
    main()
