"""Run by test_hub_download in a process whose environment points at the loopback Hub.

Modules are imported once, and every command runs in a forked child, which may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import diffusers_ddpm_ext.training.trainer  # noqa: F401
from diffusers_ddpm_ext import cli
from helpers.runs import rows, tiny_flags

OPTIONS = {
    "train_batch_size": 64,
    "checkpointing_steps": 2,
    "validation_steps": 2,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "logging_steps": 2,
}
RESUMING = {"resume_from_hub": "alice/moved", "max_train_steps": 8}


def start(*argv: str) -> int:
    """Start a command in a child; its process id."""
    child = os.fork()
    if child:
        return child
    with open("log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = cli.main(list(argv))
    os._exit(status)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(*argv: str) -> None:
    status = wait(start(*argv))
    if status != 0:
        raise AssertionError(f"{argv} ended with {status}:\n{Path('log.txt').read_text()[-2000:]}")


def results(folder: str) -> dict[str, object]:
    """What a run's result is: weights, metrics, samples, and the last checkpoint's tensors."""
    place = Path(folder)
    names = [
        "samples.png",
        "finished.json",
        "ema.json",
        *(f"checkpoint-8/{n}.safetensors" for n in ("model", "optimizer")),
    ]
    files = [*(place / name for name in names), *sorted((place / "unet").iterdir())]
    return {str(path.relative_to(place)): path.read_bytes() for path in files} | {"rows": rows(place)}


def main(kills: int) -> None:
    run("train", *tiny_flags(**OPTIONS, max_train_steps=4, output_dir="first"))
    run("push", "first", "--hub_model_id", "alice/moved", "--with_checkpoint", "--no_images")
    shutil.rmtree("first")
    run("train", *tiny_flags(**OPTIONS, max_train_steps=8, output_dir="straight"))
    begin = time.monotonic()
    child = start("train", *tiny_flags(**OPTIONS, **RESUMING, output_dir="whole"))
    while not Path("whole/checkpoint-4").exists():
        time.sleep(0.002)
    seconds = 1.2 * (time.monotonic() - begin)  # most kills hit the download
    assert wait(child) == 0, Path("log.txt").read_text()[-2000:]
    expected = results("whole")
    straight = results("straight")
    differing = [name for name in straight if straight[name] != expected[name]]
    assert not differing, differing
    chance = random.Random(0)
    killed = 0
    for number in range(kills):
        moment = seconds * (number + chance.random()) / kills
        folder = f"killed-{number}"
        argv = ["train", *tiny_flags(**OPTIONS, **RESUMING, output_dir=folder)]
        child = start(*argv)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        killed += wait(child) == -signal.SIGKILL
        left = sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []
        run(*argv)
        found = results(folder)
        differing = [name for name in expected if found[name] != expected[name]]
        assert not differing, (moment, left, differing)
        rest = [p.name for p in Path(folder).iterdir() if p.name.startswith((".", "aside-"))]
        assert not rest, (moment, left, rest)
        shutil.rmtree(folder)
    sys.stdout.write(f"{kills} kills within {seconds:.1f} s, {killed} before the end: all finished whole")


if __name__ == "__main__":
    main(int(sys.argv[1]))
