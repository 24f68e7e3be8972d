"""Checks of processors and accelerators for `ddpm-ext doctor`, also of a card that the installed torch cannot use."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from diffusers_ddpm_ext.cli.doctor_findings import Finding, Mark

DRIVER_CARDS = Path("/proc/driver/nvidia/gpus")
PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA_VENDOR, DISPLAY_CLASS = "0x10de", "0x03"
NVIDIA_SMI_TIMEOUT = 10.0
CUDA_BUILD = "pip uninstall torch, then the command for CUDA of pytorch.org/get-started/locally"


def check_devices() -> Iterator[Finding]:
    """Processor cores, threads, the accelerators that torch sees, and NVIDIA cards that it does not see."""
    import torch

    cores = os.cpu_count() or 1
    threads = torch.get_num_threads()
    yield Finding(Mark.FINE, f"{cores} processor cores, {threads} thread{'s' if threads > 1 else ''}")
    limit = os.environ.get("OMP_NUM_THREADS")
    if limit is not None and limit.isdecimal() and int(limit) < cores:
        text = f"OMP_NUM_THREADS={limit} leaves {cores - int(limit)} of {cores} cores idle in a run of one process"
        yield Finding(Mark.ADVICE, f"{text}: unset OMP_NUM_THREADS")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / (1 << 30)
            half = ", bfloat16" if torch.cuda.is_bf16_supported() else ""
            yield Finding(Mark.FINE, f"cuda:{index} {torch.cuda.get_device_name(index)}, {memory:.0f} GiB{half}")
    elif torch.backends.mps.is_available():
        yield Finding(Mark.FINE, "mps (Apple)")
    elif torch.version.cuda is not None:
        yield Finding(Mark.ADVICE, f"no accelerator although this torch was built for CUDA: {_why_cuda_fails()}")
    elif torch.version.hip is None and (cards := nvidia_cards()):
        text = f"torch {torch.__version__} is a build for processors and does not use {', '.join(cards)}"
        yield Finding(Mark.ADVICE, f"{text}: {CUDA_BUILD}")
    else:
        yield Finding(Mark.FINE, "no accelerator: use small images, as in the digits")


def nvidia_cards() -> list[str]:
    """The NVIDIA cards of this machine, found without torch.

    The driver's files name them on Linux, `nvidia-smi` there, on Windows and in WSL, and the PCI bus shows a card that
    has no driver.

    Returns:
        One name per card; empty where none is found.
    """
    cards = _cards_of_driver() or _cards_of_nvidia_smi()
    return cards or ["an NVIDIA card that has no driver yet"] * _has_card_on_bus()


def _why_cuda_fails() -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden.strip()} hides every card, unset it"
    return "is the driver installed?"


def _cards_of_driver() -> list[str]:
    names = []
    for path in sorted(DRIVER_CARDS.glob("*/information")):
        lines = path.read_text(errors="replace").splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
        names.append(models[0] if models and models[0] else path.parent.name)
    return names


def _cards_of_nvidia_smi() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def _has_card_on_bus() -> bool:
    for device in PCI_DEVICES.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:  # a device that is just being removed
            continue
        if vendor == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASS):
            return True
    return False
