"""What the tests of checkpoint folders share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from helpers.paths import PYTHONPATH

CONTENT = {"optimizer.safetensors": b"o" * 3000, "state.json": b'{"epoch": 2}', "unet/model.safetensors": b"u" * 900}


def fill(folder: Path, content: dict[str, bytes] = CONTENT) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a separate process, with this repository on its path."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
