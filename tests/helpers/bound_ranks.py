"""One of two processes whose batches differ in size; started by test_bound_parallel.py.

python bound_ranks.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusers_ddpm_ext.diffusion.timesteps import LossSecondMomentSampler
from diffusers_ddpm_ext.training.distributed import gather_rows, make_accelerator


def main() -> None:
    """Gather losses of batches of 3 and 5 samples in an interleaved order."""
    accelerator = make_accelerator(None, 1, [])
    rank = accelerator.process_index
    sampler = LossSecondMomentSampler(4, history=3)
    source = torch.Generator().manual_seed(0)
    for _ in range(4):
        gathered = torch.rand(8, 2, generator=source, dtype=torch.float64)
        rows = torch.cat([torch.arange(8).double()[:, None], (gathered[:, :1] * 4).floor(), gathered[:, 1:]], 1)
        mine = torch.tensor([[1, 4, 6], [7, 0, 2, 3, 5]][rank])
        got = gather_rows(accelerator, rows[mine])
        got = got[torch.argsort(got[:, 0], stable=True)]
        assert torch.equal(got, rows)
        sampler.update(got[:, 1].long(), got[:, 2])
    save_file(sampler.state_dict(), Path(sys.argv[1]) / f"rank-{rank}.safetensors")
    accelerator.wait_for_everyone()
    os._exit(0)  # gloo's threads may still be starting: an ordinary exit has aborted the process here


if __name__ == "__main__":
    main()
