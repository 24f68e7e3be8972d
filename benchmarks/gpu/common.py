"""What the parts of `gpu.sh` share."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stock.contenders import ROOT, Network

TINY = Network("tiny, 4 x 3 x 8 x 8", 8, (16, 32), 1, 4, layers=1, groups=8)


def arguments(description: str | None, *extra: str) -> argparse.Namespace:
    """The options of a part: ``out``, its JSON file; more positional arguments by name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in extra:
        parser.add_argument(name, type=Path, nargs="?")
    return parser.parse_args()


def device() -> torch.device:
    """The GPU; the CPU where there is none, and the parts are then tiny."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The GPU's name; that of the kind otherwise."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (no GPU found: tiny sizes)"


def write(path: Path, ok: bool, **values: Any) -> None:
    """Write a part's result: whether it is complete and its checks hold, and its values."""
    path.write_text(json.dumps({"ok": ok} | values, indent=1) + "\n")
    print(f"{path.stem}: {'complete' if ok else 'not complete, or a check failed'}", flush=True)


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of several calls, after one that is not counted, with the device's queue drained."""
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return times[1:]


def wait() -> None:
    """Wait until the device has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


__all__ = ["ROOT", "TINY", "arguments", "device", "device_name", "seconds", "wait", "write"]
