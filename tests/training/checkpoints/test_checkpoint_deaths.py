"""A killed process or a refused write loses no existing checkpoint and leaves no incomplete one."""

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

from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints, move_aside, newest, remove_leftovers
from diffusers_ddpm_ext.training.checkpoints.manifest import verify
from diffusers_ddpm_ext.training.checkpoints.writer import CheckpointNotWritten, write_checkpoint
from diffusers_ddpm_ext.utils import files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with checkpoints of steps 4, 8 and 12."""
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, step, fill)
    return tmp_path


# ---- a full or read-only disk


def test_a_refused_write_loses_nothing(run):
    """The system's limit on file sizes (RLIMIT_FSIZE) replaces a full disk: one exception class, one sentence."""
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
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


def test_a_full_disk_loses_nothing(small_disk):
    write_checkpoint(small_disk, 4, lambda folder: fill(folder, {"x": b"x" * 600_000}))
    for _ in range(2):
        with pytest.raises(CheckpointNotWritten, match="No space left on device") as caught:
            write_checkpoint(small_disk, 8, lambda folder: fill(folder, {"x": b"x" * 600_000}))
        assert caught.value.errno == errno.ENOSPC
    assert names(small_disk) == ["checkpoint-4"]
    assert verify(small_disk / "checkpoint-4").step == 4
    move_aside(small_disk / "checkpoint-4", "this sentence does not fit on the disk")
    write_checkpoint(small_disk, 12, lambda folder: fill(folder, {"x": b"x" * 300_000}))
    assert newest(small_disk).checkpoint is not None


def test_a_read_only_disk_is_named(small_disk):
    write_checkpoint(small_disk, 4, fill)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointNotWritten, match=r"checkpoint-8 could not be written \(Read-only file system\)"):
        write_checkpoint(small_disk, 8, fill)
    with pytest.raises(OSError, match="checkpoint-4 cannot be moved aside"):
        move_aside(small_disk / "checkpoint-4", "damaged")
    checkpoint = newest(small_disk).checkpoint
    assert checkpoint is not None
    assert checkpoint.step == 4


def test_a_full_disk_reported_by_safetensors(tmp_path):
    """That library raises its own class; its other errors are not reported as a full disk."""

    def fail(message: str):
        def fill(folder: Path) -> None:
            raise SafetensorError(message)

        return fill

    with pytest.raises(CheckpointNotWritten, match="No space left") as caught:
        write_checkpoint(tmp_path, 4, fail("Error while serializing: I/O error: No space left (os error 28)"))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(SafetensorError, match="invalid dtype"):
        write_checkpoint(tmp_path, 4, fail("invalid dtype"))
    assert names(tmp_path) == []


def test_a_missing_parent_folder_is_named(tmp_path):
    with pytest.raises(CheckpointNotWritten, match="No such file"):
        write_checkpoint(tmp_path / "nothing", 4, fill)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointNotWritten, match="Not a directory"):
        write_checkpoint(tmp_path / "file", 4, fill)


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_each_refused_call_leaves_the_older_checkpoints(run, monkeypatch, failing):
    """The n-th call fails with a disk error, for every n."""
    real, calls = getattr(os, failing), 0
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for failing_call in range(1, 50):
        calls = 0

        def refuse(*arguments: object, failing_call: int = failing_call) -> None:
            nonlocal calls
            calls += 1
            if calls == failing_call:
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
    assert failing_call > (5 if failing == "fsync" else 2)


# ---- kill -9

# Counts the system calls that change a file system and kills the process before the n-th.
KILL_BEFORE_EACH_CALL = """
    import os, signal, sys
    from pathlib import Path
    from diffusers_ddpm_ext.training.checkpoints.folders import list_checkpoints, prune_checkpoints, remove_leftovers
    from diffusers_ddpm_ext.training.checkpoints.manifest import verify
    from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint
    from diffusers_ddpm_ext.utils import files

    CALLS = ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink")
    if sys.argv[2] == "rename":
        files._exchange = lambda first, second: False

    def kill_before(number):
        left = number
        def counted(real):
            def call(*arguments, **keywords):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **keywords)
            return call
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        files._exchange = counted(files._exchange)

    def fill(data):
        def write(folder):
            os.mkdir(folder / "unet")
            for name in ("a", "unet/b"):
                descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
                for _ in range(3):
                    os.write(descriptor, data * 500)
                os.close(descriptor)
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

    parent, kills, after = Path(sys.argv[1]), 0, set()
    while True:
        reset(parent)
        child = os.fork()
        if child == 0:
            kill_before(kills + 1)
            work(parent)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
        steps = []
        for state in ("untouched", "cleaned"):
            if state == "cleaned":
                remove_leftovers(parent)
                assert all(path in list_checkpoints(parent) for path in parent.iterdir()), sorted(parent.iterdir())
            checkpoints = [verify(path) for path in list_checkpoints(parent)]  # none is damaged
            steps = [checkpoint.step for checkpoint in checkpoints]
            contents = {(checkpoint.path / "a").read_bytes() for checkpoint in checkpoints}
            assert contents <= {b"old" * 1500, b"new" * 1500}
            if state == "cleaned" or sys.argv[2] == "exchange":
                assert steps[-1] >= 8, steps  # the newest step never decreases
        after.add(tuple(steps))
    print(kills, sorted(after))
    """


@pytest.fixture
def memory_path(tmp_path):
    """A folder in memory if there is one: waiting for a disk proves nothing about a killed process."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.mark.parametrize("method", ["exchange", "rename"])
def test_killed_before_every_single_call(memory_path, method):
    """While replacing a step, writing a new one and pruning, no kill damages or loses a checkpoint."""
    folder, other = memory_path / "run", memory_path / "other"
    folder.mkdir()
    other.mkdir()
    if method == "exchange" and not files._exchange(folder, other):
        pytest.skip("this file system cannot exchange two names")
    result = run_script(KILL_BEFORE_EACH_CALL, folder, method)
    assert result.returncode == 0, result.stderr
    kills, outcomes = result.stdout.split(maxsplit=1)
    assert int(kills) > 60
    assert outcomes.strip() == "[(4, 8), (4, 8, 12), (8, 12), (12,)]"


def test_killed_at_random_moments(tmp_path):
    """A process that writes without pause is killed at random times; the next one resumes at its last checkpoint."""
    script = """
        import sys
        from pathlib import Path
        from diffusers_ddpm_ext.training.checkpoints.folders import newest, prune_checkpoints, remove_leftovers
        from diffusers_ddpm_ext.utils.folder_lock import FolderLock
        from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint
        with FolderLock(Path(sys.argv[1])):
            remove_leftovers(Path(sys.argv[1]))
            result = newest(Path(sys.argv[1]))
            assert not result.damaged, result.damaged
            step = result.checkpoint.step if result.checkpoint else 0
            print(step, flush=True)
            while True:
                step += 1
                write_checkpoint(Path(sys.argv[1]), step, lambda folder: (folder / "a").write_bytes(bytes(500_000)))
                prune_checkpoints(Path(sys.argv[1]), 1 + step % 2)
                print(step, flush=True)
        """
    generator, last = random.Random(0), 0
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
            process.wait(generator.uniform(0.0, 0.2))
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
