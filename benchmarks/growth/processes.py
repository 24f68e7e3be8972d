"""Bytes that the processes of a run exchange per step, and its time, against their number; gloo on one machine.

The processes are in a network namespace of their own, whose loopback device counts their bytes and nobody else's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from growth.fit import fit_line, fit_power, print_table
from growth.run_setup import COMMON

NUMBERS = (1, 2, 3, 4, 6)
EFFECTIVE_BATCH, STEPS = 12, 20


def loopback_bytes() -> int:
    """Bytes sent through the loopback device of this network namespace."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def work(options: list[str]) -> None:
    """One process: measure, and leave the group when nothing refers to it any more."""
    from diffusers_ddpm_ext.training.distributed import leave_process_group

    measure(options)
    leave_process_group()


def measure(options: list[str]) -> None:
    """Take steps as the trainer does, and print what they exchanged and took."""
    import torch
    import torch.distributed as dist

    from diffusers_ddpm_ext.training.config.options import CheckpointOptions
    from diffusers_ddpm_ext.training.loop.stop_requests import RequestPoller
    from diffusers_ddpm_ext.training.signals import SignalRequests
    from growth.run_setup import make_setup, step_of

    setup = make_setup(options)
    torch.set_num_threads(1)
    step = step_of(setup)
    poller = RequestPoller(setup.accelerator, CheckpointOptions(), SignalRequests(), time.monotonic())

    def steps(count: int) -> None:
        for _ in range(count):
            step()
            poller.poll()

    def wait() -> None:
        if dist.is_initialized():
            dist.barrier()

    steps(3)
    wait()
    sent, clock, used = loopback_bytes(), time.perf_counter(), time.process_time()
    steps(STEPS)
    wait()
    facts = {
        "bytes": (loopback_bytes() - sent) / STEPS,
        "wall": (time.perf_counter() - clock) / STEPS,
        "cpu": (time.process_time() - used) / STEPS,
        "parameters": sum(parameter.numel() for parameter in setup.network_parameters),
    }
    poller.poll_now()  # the last step's agreement may still be under way, and leaving would abort it
    wait()
    if setup.accelerator.is_main_process:
        print(json.dumps(facts), flush=True)


def launch(processes: int, options: list[str]) -> dict[str, float]:
    """Run `work` in a number of processes; the figures of the main process."""
    script = str(Path(__file__).parents[1] / "bench_growth.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), script]
    batch = ["--train_batch_size", str(EFFECTIVE_BATCH // processes)]
    shell = f"ip link set lo up && exec {' '.join([*command, 'processes', '--work', *options, *batch])}"
    isolated = ["unshare", "--map-root-user", "--net", "sh", "-c", shell]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(isolated, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(isolated)}\n{done.stderr[-2000:]}")
    facts: dict[str, float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return facts


def main(numbers: tuple[int, ...] = NUMBERS) -> None:
    """Print a row per number of processes, and the least-squares slope of the bytes."""
    options = [*COMMON, "--block_out_channels", "32", "64"]
    facts = {number: launch(number, options) for number in numbers}
    rows = []
    for number, each in facts.items():
        ring = 4 * each["parameters"] * 2 * (number - 1)
        rows.append(
            (
                number, EFFECTIVE_BATCH // number, f"{each['bytes'] / 1e6:.3f}", f"{ring / 1e6:.3f}",
                f"{each['bytes'] / 1e6 / number:.3f}", f"{1e3 * each['cpu']:.1f}", f"{1e3 * each['wall']:.0f}",
            )
        )  # fmt: skip
    header = [
        "processes",
        "images each",
        "MB sent per step, all",
        "2 (n - 1) x 4 bytes x parameters, MB",
        "MB per process",
    ]
    print_table([*header, "CPU ms per step and process", "ms on the clock"], rows)
    slope = fit_line([number - 1 for number in facts], [each["bytes"] / each["parameters"] for each in facts.values()])
    cpu = fit_power(list(facts), [each["cpu"] for each in facts.values()])
    print(f"\nbytes per step and parameter: {slope} x (n - 1); CPU time of a process ~ n^({cpu})")
