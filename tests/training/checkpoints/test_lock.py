"""One run at a time in a folder, and none that is dead."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.paths import ROOT

from diffusers_ddpm_ext.training.checkpoints.lock import LOCK, FolderBusy, FolderLock

HOLD = """
import os, sys, time
from pathlib import Path
from diffusers_ddpm_ext.training.checkpoints.lock import FolderLock
lock = FolderLock(Path(sys.argv[1])).acquire()
if "worker" in sys.argv:
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
    print(worker, flush=True)
else:
    print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


@contextmanager
def holder(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that holds the folder, and the line it said when it did."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def is_free(folder: Path) -> bool:
    """Asked from outside: this process would be granted a lock that it holds."""
    script = HOLD.replace("sys.stdin.readline()", "")
    command = [sys.executable, "-c", script, str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


def test_a_second_run_is_refused_by_name(tmp_path):
    with holder(tmp_path) as (process, _):
        with pytest.raises(
            FolderBusy, match=rf"another run is at work in .* \(process {process.pid}\): wait"
        ) as caught:
            FolderLock(tmp_path).acquire()
        assert "\n" not in str(caught.value)
        process.communicate("done\n")
    with FolderLock(tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    assert os.listdir(tmp_path) == []


def test_death_sets_the_folder_free(tmp_path):
    with holder(tmp_path) as (process, _):
        process.kill()
        process.wait()
        assert (tmp_path / LOCK).exists()
        with FolderLock(tmp_path):
            pass


def test_a_worker_that_outlives_its_owner_holds_nothing(tmp_path):
    """The owner is killed, its forked worker sleeps on with every descriptor open: a flock would still be held."""
    with holder(tmp_path, "worker") as (process, worker):
        try:
            process.kill()
            process.wait()
            os.kill(int(worker), 0)  # it lives
            with FolderLock(tmp_path):
                pass
        finally:
            os.kill(int(worker), 9)


def test_the_same_process_is_refused_and_keeps_its_lock(tmp_path):
    """The system would grant it, and drop both when the second descriptor is closed."""
    with FolderLock(tmp_path):
        for _ in range(2):
            with pytest.raises(FolderBusy, match=f"process {os.getpid()}, this one"):
                FolderLock(tmp_path).acquire()
        assert not is_free(tmp_path)
    with FolderLock(tmp_path):
        pass


def test_a_lock_lost_by_a_reader_is_renewed(tmp_path):
    with FolderLock(tmp_path) as lock:
        (tmp_path / LOCK).read_text()  # opens and closes the file, as an upload of the folder does
        with holder(tmp_path) as (other, said):
            assert said == "held", "the system keeps locks now: renew is not needed any more"
            with pytest.raises(FolderBusy, match=f"process {other.pid}"):
                lock.renew()
    with FolderLock(tmp_path) as lock:
        (tmp_path / LOCK).read_text()
        lock.renew()
        assert not is_free(tmp_path)


def test_a_lock_file_that_somebody_removed(tmp_path):
    with FolderLock(tmp_path) as lock:
        (tmp_path / LOCK).unlink()
        with FolderLock(tmp_path):  # a file of its own
            with pytest.raises(FolderBusy, match="is gone"):
                lock.renew()
            lock.release()
            assert (tmp_path / LOCK).exists(), "the lock of the other was removed"
    with pytest.raises(RuntimeError, match="acquire it first"):
        lock.renew()


def test_a_forked_child_releases_nothing(tmp_path):
    with FolderLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert not is_free(tmp_path)
        assert (tmp_path / LOCK).exists()


def try_for(folder: str, seconds: float, log: str) -> None:
    """Take and give back the folder again and again; while it is held, nobody else may write to the log."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with FolderLock(Path(folder)), open(log, "a", encoding="ascii") as file:
                file.write(f"+{os.getpid()}\n")
                file.flush()
                time.sleep(0.0005)
                file.write(f"-{os.getpid()}\n")
        except FolderBusy:
            pass


def test_never_two_at_once(tmp_path):
    """Three processes compete for a lock whose file comes and goes: every stay ends before the next begins."""
    context = multiprocessing.get_context("spawn")
    folder, log = tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    rivals = [context.Process(target=try_for, args=(str(folder), 1.0, str(log))) for _ in range(3)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(60)
        assert rival.exitcode == 0
    lines = log.read_text().split()
    assert len(lines) > 20
    assert all(re.sub(r"^\+", "-", enter) == leave for enter, leave in zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog, number):
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING), FolderLock(tmp_path) as lock:
        lock.renew()
    assert len(caplog.records) == 1
    assert "cannot be locked on this file system" in caplog.text


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "nothing").acquire()
