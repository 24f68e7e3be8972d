"""Signals: what they request, and that a process does not outlive the launcher that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from diffusers_ddpm_ext.training.signals import handle_signals


def test_usr1_requests_one_checkpoint():
    with handle_signals() as requests:
        assert (requests.checkpoint, requests.stopped_by) == (False, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (requests.checkpoint, requests.stopped_by) == (True, 0)
        requests.clear()
        assert (requests.checkpoint, requests.stopped_by) == (False, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_remains_and_the_first_signal_counts(number):
    with handle_signals() as requests:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        requests.clear()
        assert requests.stopped_by == number


def test_a_second_interrupt_ends_at_once():
    with handle_signals() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert requests.stopped_by == signal.SIGINT


def test_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with handle_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


CHILD = """
import time
from diffusers_ddpm_ext.training.signals import die_with_parent, handle_signals
with handle_signals() as requests:
    die_with_parent()
    print("ready", flush=True)
    while not requests.stopped_by:
        time.sleep(0.01)
print("asked to stop by", requests.stopped_by, flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals the end of the parent process")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_does_not_outlive_its_launcher(number):
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, CHILD], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(number)
    started = time.monotonic()
    assert launcher.stdout.read() == f"asked to stop by {int(signal.SIGTERM)}\n"
    assert time.monotonic() - started < 10
    launcher.wait()
    launcher.stdout.close()
