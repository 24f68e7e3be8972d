"""Cards that the installed torch cannot use: found from the driver's files, nvidia-smi or the PCI bus."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from diffusers_ddpm_ext.cli import doctor_devices
from diffusers_ddpm_ext.cli.doctor_devices import check_devices, nvidia_cards

if torch.cuda.is_available() or torch.backends.mps.is_available():
    pytest.skip("this machine has an accelerator", allow_module_level=True)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path) -> Path:
    """A machine with no card, whose folders a test fills; torch is a build for processors."""
    monkeypatch.setattr(doctor_devices, "DRIVER_CARDS", tmp_path / "driver")
    monkeypatch.setattr(doctor_devices, "PCI_DEVICES", tmp_path / "pci")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    return tmp_path


def add_to_driver(root: Path, address: str, text: str) -> None:
    (root / "driver" / address).mkdir(parents=True)
    (root / "driver" / address / "information").write_text(text)


def add_to_bus(root: Path, address: str, vendor: str, kind: str) -> None:
    (root / "pci" / address).mkdir(parents=True)
    (root / "pci" / address / "vendor").write_text(f"{vendor}\n")
    (root / "pci" / address / "class").write_text(f"{kind}\n")


def add_nvidia_smi(root: Path, script: str) -> None:
    path = root / "bin" / "nvidia-smi"
    path.write_text(f"#!{sys.executable}\n{script}\n")
    path.chmod(0o755)


def last_line() -> tuple[str, str]:
    *_, finding = check_devices()
    return finding.mark.value, finding.text


def test_no_card():
    assert nvidia_cards() == []
    assert last_line() == (" ", "no accelerator: use small images, as in the digits")


def test_a_card_that_the_driver_names(machine):
    add_to_driver(machine, "0000:01:00.0", "Model: \t\t NVIDIA H200\nIRQ:   \t\t 57\n")
    add_to_driver(machine, "0000:02:00.0", "")
    mark, text = last_line()
    assert mark == "?"
    assert text.startswith(f"torch {torch.__version__} is a build for processors")
    assert "does not use NVIDIA H200, 0000:02:00.0: pip uninstall torch, then" in text


@pytest.mark.skipif(os.name == "nt", reason="the fake is a script with an interpreter line")
def test_a_card_that_nvidia_smi_names(machine):
    """As on Windows and in WSL, where /proc has no driver; the fake checks what it is asked."""
    script = "import sys\nassert sys.argv[1:] == ['--query-gpu=name', '--format=csv,noheader']\n"
    add_nvidia_smi(machine, script + "print('NVIDIA GeForce RTX 4090\\nNVIDIA T4')")
    assert nvidia_cards() == ["NVIDIA GeForce RTX 4090", "NVIDIA T4"]
    assert last_line()[0] == "?"


@pytest.mark.skipif(os.name == "nt", reason="the fake is a script with an interpreter line")
@pytest.mark.parametrize(
    "script", ["print('NVIDIA-SMI has failed'); raise SystemExit(9)", "", "import time; time.sleep(60)", None]
)
def test_nvidia_smi_that_names_no_card(machine, monkeypatch, script):
    """It fails where no driver answers, prints nothing without a card, may hang, and may be no program."""
    monkeypatch.setattr(doctor_devices, "NVIDIA_SMI_TIMEOUT", 0.3)
    add_nvidia_smi(machine, script or "")
    if script is None:
        (machine / "bin" / "nvidia-smi").write_bytes(b"\x7fELF")
    if script != "import time; time.sleep(60)":
        monkeypatch.setattr(doctor_devices, "NVIDIA_SMI_TIMEOUT", 10.0)
    assert nvidia_cards() == []
    assert last_line()[0] == " "


def test_a_card_without_a_driver(machine):
    add_to_bus(machine, "0000:01:00.0", "0x10de", "0x030200")
    mark, text = last_line()
    assert mark == "?"
    assert "does not use an NVIDIA card that has no driver yet: " in text


@pytest.mark.parametrize(("vendor", "kind"), [("0x8086", "0x030000"), ("0x10de", "0x040300"), ("0x10de", "0x0c0330")])
def test_other_devices_are_no_cards(machine, vendor, kind):
    """Graphics of another vendor, and the sound and USB parts of an NVIDIA card that was passed to another system."""
    add_to_bus(machine, "0000:00:02.0", vendor, kind)
    assert nvidia_cards() == []


def test_a_build_for_rocm_beside_an_nvidia_card_was_chosen(machine, monkeypatch):
    add_to_driver(machine, "0000:01:00.0", "Model: NVIDIA H200\n")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert last_line()[0] == " "


@pytest.mark.parametrize("value", ["", "-1", None])
def test_a_build_for_cuda_that_sees_no_card(monkeypatch, value):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    mark, text = last_line()
    assert mark == "?"
    remedy = (
        "is the driver installed?" if value is None else f"CUDA_VISIBLE_DEVICES={value} hides every card, unset it"
    )
    assert text == f"no accelerator although this torch was built for CUDA: {remedy}"
