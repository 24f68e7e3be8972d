"""`--help` is fast, complete, and loads nothing heavy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

from diffusers_ddpm_ext.cli.dispatch import USAGE
from diffusers_ddpm_ext.training.config.options import OPTIONS, SECTIONS

TRAIN = ROOT / "training" / "train.py"
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "datasets", "numpy", "yaml", "PIL")
REPORT = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def test_help_teaches_every_option(tmp_path):
    told = run(sys.executable, str(TRAIN), "--help", cwd=tmp_path).stdout
    for name in OPTIONS:
        assert f"--{name}" in told
    for section in SECTIONS:
        assert f"\n{section}:\n" in told
    for words in ("ddpm-ext sample", "accelerate launch training/train.py", "(default: 0.0001)", "runs/digits"):
        assert words in told


@pytest.mark.parametrize("command", re.findall(r"^  ([a-z-]+)   ", USAGE, re.M))
def test_help_teaches_by_examples_and_imports_nothing_heavy(command, tmp_path):
    code = f"{REPORT}from diffusers_ddpm_ext.cli import main; sys.exit(main(['{command}', '--help']))"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0
    assert f"usage: ddpm-ext {command}" in done.stdout
    assert f"\n  ddpm-ext {command}" in done.stdout
    assert not set(done.stderr.split()) & set(HEAVY)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs the CPU time of a child")
def test_help_takes_less_than_a_second_and_a_half(tmp_path):
    times = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, str(TRAIN), "--help"], stdout=subprocess.DEVNULL, cwd=tmp_path)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    assert min(times) < 1.5, f"{min(times):.2f} s of CPU"


def test_clone_comes_first(tmp_path):
    """Another installed copy must not be what `training/train.py` of a clone runs."""
    done = run(sys.executable, "-X", "importtime", str(TRAIN), "--help", cwd=tmp_path)
    assert "diffusers_ddpm_ext.cli" in done.stderr
    code = f"import runpy, sys; sys.argv = ['t', '--help']; sys.path.insert(0, {str(tmp_path)!r})\n"
    (tmp_path / "diffusers_ddpm_ext").mkdir()
    (tmp_path / "diffusers_ddpm_ext" / "__init__.py").write_text("raise RuntimeError('the wrong copy')")
    done = run(sys.executable, "-c", f"{code}runpy.run_path({str(TRAIN)!r}, run_name='__main__')", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
