"""Whatever ends a process or refuses a write: every checkpoint that stood still stands, and none is torn."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from helpers.checkpoint_cases import fill, names, run_script
from helpers.paths import ROOT
from safetensors import SafetensorError

from diffusers_ddpm_ext.training.checkpoints.folders import (
    list_checkpoints,
    move_aside,
    newest,
    remove_leftovers,
)
from diffusers_ddpm_ext.training.checkpoints.manifest import verify
from diffusers_ddpm_ext.training.checkpoints.writer import CheckpointNotWritten, write_checkpoint
from diffusers_ddpm_ext.utils import files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with checkpoints of steps 4, 8 and 12."""
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, step, fill, {"seed": 7})
    return tmp_path


# ---- a disk that is full or closed


def test_a_disk_that_refuses_loses_nothing(run):
    """The system's limit on file sizes (RLIMIT_FSIZE) stands in for a full disk: one class, one sentence."""
    script = """
        import resource, sys
        from pathlib import Path
        from diffusers_ddpm_ext.training.checkpoints.writer import CheckpointNotWritten, write_checkpoint
        import numpy, safetensors.numpy
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        fills = {
            "python": lambda folder: (folder / "x").write_bytes(b"x" * 60_000),
            "safetensors": lambda folder: safetensors.numpy.save_file({"x": numpy.zeros(60_000)}, folder / "x"),
            "manifest": lambda folder: [(folder / f"a-long-name-of-a-file-{i}").touch() for i in range(500)],
        }
        for name, fill in fills.items():
            try:
                write_checkpoint(Path(sys.argv[1]), 16, fill)
            except CheckpointNotWritten as error:
                print(name, error.errno, error)
        """
    result = run_script(script, run)
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [k, str(errno.EFBIG)] for k in ("python", "safetensors", "manifest")
    ]
    assert all("checkpoint-16 could not be written (File too large); older checkpoints" in line for line in lines)
    assert names(run) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    assert verify(run / "checkpoint-12").step == 12
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system takes the right to mount one")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_loses_nothing(small_disk):
    write_checkpoint(small_disk, 4, lambda folder: fill(folder, {"x": b"x" * 600_000}))
    for _ in range(2):
        with pytest.raises(CheckpointNotWritten, match="No space left on device") as caught:
            write_checkpoint(small_disk, 8, lambda folder: fill(folder, {"x": b"x" * 600_000}))
        assert caught.value.errno == errno.ENOSPC
    assert names(small_disk) == ["checkpoint-4"]
    assert verify(small_disk / "checkpoint-4").step == 4
    move_aside(small_disk / "checkpoint-4", "no room for this sentence")
    write_checkpoint(small_disk, 12, lambda folder: fill(folder, {"x": b"x" * 300_000}))
    assert newest(small_disk).checkpoint is not None


def test_a_disk_that_is_read_only(small_disk):
    write_checkpoint(small_disk, 4, fill)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointNotWritten, match=r"checkpoint-8 could not be written \(Read-only file system\)"):
        write_checkpoint(small_disk, 8, fill)
    with pytest.raises(OSError, match="checkpoint-4 cannot be set aside"):
        move_aside(small_disk / "checkpoint-4", "torn")
    found = newest(small_disk).checkpoint
    assert found is not None
    assert found.step == 4


def test_a_full_disk_in_the_words_of_safetensors(tmp_path):
    """That library raises its own class; another fault of its own is not taken for a full disk."""

    def fail(words: str):
        def fill(folder: Path) -> None:
            raise SafetensorError(words)

        return fill

    with pytest.raises(CheckpointNotWritten, match="No space left") as caught:
        write_checkpoint(tmp_path, 4, fail("Error while serializing: I/O error: No space left (os error 28)"))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(SafetensorError, match="invalid dtype"):
        write_checkpoint(tmp_path, 4, fail("invalid dtype"))
    assert names(tmp_path) == []


def test_a_folder_that_is_missing_or_closed(tmp_path):
    with pytest.raises(CheckpointNotWritten, match="No such file"):
        write_checkpoint(tmp_path / "nothing", 4, fill)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointNotWritten, match="Not a directory"):
        write_checkpoint(tmp_path / "file", 4, fill)


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_each_refused_call_leaves_the_older_ones(run, monkeypatch, failing):
    """The n-th call fails with an error of the disk, for every n that there is."""
    real, calls = getattr(os, failing), 0
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for deadly in range(1, 50):
        calls = 0

        def refuse(*arguments: object, deadly: int = deadly) -> None:
            nonlocal calls
            calls += 1
            if calls == deadly:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, failing, refuse)
            try:
                write_checkpoint(run, 12, lambda folder: fill(folder, {"x": b"again", "y": b""}))
                break
            except CheckpointNotWritten:
                pass
        assert [verify(path).step for path in list_checkpoints(run)] == [4, 8, 12]
        remove_leftovers(run)
        assert names(run) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    assert deadly > (5 if failing == "fsync" else 2)


# ---- kill -9

# Each call into the system that changes a file system, counted; the process dies before the n-th.
DIE = """
    import os, signal, sys
    from pathlib import Path
    from diffusers_ddpm_ext.utils import files
    from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints, prune_checkpoints, remove_leftovers
    from diffusers_ddpm_ext.training.checkpoints.manifest import verify
    from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint

    CALLS = ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink")
    if sys.argv[2] == "rename":
        files._exchange = lambda one, other: False

    def die_at(deadly):
        left = deadly
        def deadly_call(real):
            def call(*arguments, **keywords):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **keywords)
            return call
        for name in CALLS:
            setattr(os, name, deadly_call(getattr(os, name)))
        files._exchange = deadly_call(files._exchange)

    def fill(mark):
        def write(folder):
            os.mkdir(folder / "unet")
            for name in ("a", "unet/b"):
                at = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
                for _ in range(3):
                    os.write(at, mark * 500)
                os.close(at)
        return write

    def reset(parent):
        for path in parent.iterdir():
            files.remove_path(path)
        write_checkpoint(parent, 4, fill(b"old"))
        write_checkpoint(parent, 8, fill(b"old"))

    def work(parent):
        write_checkpoint(parent, 8, fill(b"new"))
        write_checkpoint(parent, 12, fill(b"new"))
        prune_checkpoints(parent, 1)

    parent, deaths, after = Path(sys.argv[1]), 0, set()
    while True:
        reset(parent)
        child = os.fork()
        if child == 0:
            die_at(deaths + 1)
            work(parent)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        deaths += 1
        steps = []
        for turn in ("as it lies", "cleaned"):
            if turn == "cleaned":
                remove_leftovers(parent)
                assert all(path in list_checkpoints(parent) for path in parent.iterdir()), sorted(parent.iterdir())
            found = [verify(path) for path in list_checkpoints(parent)]  # none is torn
            steps = [checkpoint.step for checkpoint in found]
            assert {checkpoint.read("a") for checkpoint in found} <= {b"old" * 1500, b"new" * 1500}
            if turn == "cleaned" or sys.argv[2] == "exchange":
                assert steps[-1] >= 8, steps  # nothing goes backwards
        after.add(tuple(steps))
    print(deaths, sorted(after))
    """


@pytest.fixture
def swift_path(tmp_path):
    """In memory where there is such a place: to wait for a disk shows nothing about a killed process."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.mark.parametrize("how", ["exchange", "rename"])
def test_killed_before_every_single_call(swift_path, how):
    """Replacing a step, writing a new one and pruning: whichever call is the last, no folder is torn or lost."""
    place, other = swift_path / "run", swift_path / "other"
    place.mkdir()
    other.mkdir()
    if how == "exchange" and not files._exchange(place, other):
        pytest.skip("folders cannot swap names on this file system")
    result = run_script(DIE, place, how)
    assert result.returncode == 0, result.stderr
    deaths, outcomes = result.stdout.split(maxsplit=1)
    assert int(deaths) > 60
    assert outcomes.strip() == "[(4, 8), (4, 8, 12), (8, 12), (12,)]"


def test_killed_at_random_moments(tmp_path):
    """A writer that never rests, and a clock that knows nothing of it; each life goes on where the last one ended."""
    script = """
        import sys
        from pathlib import Path
        from diffusers_ddpm_ext.training.checkpoints.folders import newest, prune_checkpoints, remove_leftovers
        from diffusers_ddpm_ext.training.checkpoints.lock import FolderLock
        from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint
        with FolderLock(Path(sys.argv[1])):
            remove_leftovers(Path(sys.argv[1]))
            found = newest(Path(sys.argv[1]))
            assert not found.damaged, found.damaged
            step = found.checkpoint.step if found.checkpoint else 0
            print(step, flush=True)
            while True:
                step += 1
                write_checkpoint(Path(sys.argv[1]), step, lambda folder: (folder / "a").write_bytes(bytes(500_000)))
                prune_checkpoints(Path(sys.argv[1]), 1 + step % 2)
                print(step, flush=True)
        """
    clock, last = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first >= last, "a finished checkpoint was lost"
        try:
            process.wait(clock.uniform(0.0, 0.2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        last = int(rest[-1]) if rest else first
        assert process.returncode == -signal.SIGKILL
        assert newest(tmp_path).damaged == []
    assert last > 0


def test_an_interrupt_leaves_nothing_behind(run):
    def interrupted(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(run, 16, interrupted)
    assert names(run) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
