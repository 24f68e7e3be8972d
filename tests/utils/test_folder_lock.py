"""One run at a time in a folder; a dead run holds no lock."""

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

from diffusers_ddpm_ext.utils.folder_lock import LOCK, FolderBusy, FolderLock

HOLD = """
import os, sys, time
from pathlib import Path
from diffusers_ddpm_ext.utils.folder_lock import FolderLock
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
def holder(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that holds the lock, and the line it printed once it did."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *options],
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
    """Tested in another process: the system would grant this one a lock that it holds."""
    script = HOLD.replace("sys.stdin.readline()", "")
    command = [sys.executable, "-c", script, str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


def test_a_second_run_is_refused_and_the_first_named(tmp_path):
    with holder(tmp_path) as (process, _):
        with pytest.raises(FolderBusy, match=rf"another run uses .* \(process {process.pid}\): wait") as caught:
            FolderLock(tmp_path).acquire()
        assert "\n" not in str(caught.value)
        process.communicate("done\n")
    with FolderLock(tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_lock_ends_with_its_process(tmp_path):
    with holder(tmp_path) as (process, _):
        process.kill()
        process.wait()
        assert (tmp_path / LOCK).exists()
        with FolderLock(tmp_path):
            pass


def test_a_worker_that_outlives_its_owner_holds_no_lock(tmp_path):
    """The owner is killed, its forked worker keeps every descriptor open: a flock would still be held."""
    with holder(tmp_path, "worker") as (process, worker):
        try:
            process.kill()
            process.wait()
            os.kill(int(worker), 0)  # it is alive
            with FolderLock(tmp_path):
                pass
        finally:
            os.kill(int(worker), 9)


def test_the_same_process_is_refused_and_keeps_its_lock(tmp_path):
    """The system would grant it, and drop both locks when the second descriptor is closed."""
    with FolderLock(tmp_path):
        for _ in range(2):
            with pytest.raises(FolderBusy, match=f"process {os.getpid()}, this one"):
                FolderLock(tmp_path).acquire()
        assert not is_free(tmp_path)
    with FolderLock(tmp_path):
        pass


def test_a_lock_dropped_by_a_reader_is_renewed(tmp_path):
    with FolderLock(tmp_path) as lock:
        (tmp_path / LOCK).read_text()  # opens and closes the file, as an upload of the folder does
        with holder(tmp_path) as (other, line):
            assert line == "held", "the system keeps locks now: renew is no longer needed"
            with pytest.raises(FolderBusy, match=f"process {other.pid}"):
                lock.renew()
    with FolderLock(tmp_path) as lock:
        (tmp_path / LOCK).read_text()
        lock.renew()
        assert not is_free(tmp_path)


def test_a_removed_lock_file_is_noticed(tmp_path):
    with FolderLock(tmp_path) as lock:
        (tmp_path / LOCK).unlink()
        with FolderLock(tmp_path):  # a new file
            with pytest.raises(FolderBusy, match="was removed"):
                lock.renew()
            lock.release()
            assert (tmp_path / LOCK).exists(), "the other lock was removed"
    with pytest.raises(RuntimeError, match="acquire it first"):
        lock.renew()


def test_a_forked_child_does_not_release_the_lock(tmp_path):
    with FolderLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert not is_free(tmp_path)
        assert (tmp_path / LOCK).exists()


def lock_repeatedly(folder: str, seconds: float, log: str) -> None:
    """Acquire and release the lock repeatedly; while it is held, no other process may write to the log."""
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
    """Three processes compete for a lock whose file is created and removed: each releases before the next acquires."""
    context = multiprocessing.get_context("spawn")
    folder, log = tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    processes = [context.Process(target=lock_repeatedly, args=(str(folder), 1.0, str(log))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = log.read_text().split()
    assert len(lines) > 20
    assert all(
        re.sub(r"^\+", "-", acquired) == released for acquired, released in zip(lines[::2], lines[1::2], strict=True)
    )


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING), FolderLock(tmp_path) as lock:
        lock.renew()
    assert len(caplog.records) == 1
    assert "cannot be locked on this file system" in caplog.text


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        FolderLock(tmp_path / "nothing").acquire()
