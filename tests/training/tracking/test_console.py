"""What a run prints: one line per validation, checkpoint and resume; a bar on a terminal alone."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios

import pytest
from helpers.paths import TESTS

from diffusers_ddpm_ext.training.tracking import console
from diffusers_ddpm_ext.training.tracking.console import ProgressDisplay, describe_end, describe_validation
from diffusers_ddpm_ext.training.tracking.monitor import Monitor

VALUES = {"val/loss_simple": 0.21, "val/loss_simple_ema": 0.20057, "val/bpd": 5.7, "val/bpd_ema": 5.604}


def test_a_validation_is_one_line():
    monitor = Monitor("val/loss_simple_ema", save_top_k=2)
    decisions = [monitor.update(step, value) for step, value in ((20, 0.20057), (40, 0.3), (60, 0.4))]
    lines = [describe_validation(40, VALUES, monitor, decision) for decision in decisions]
    assert lines[0] == "step 40: val/loss_simple_ema 0.2006, best, bpd 5.60"
    assert lines[1] == "step 40: val/loss_simple_ema 0.2006, among the best, bpd 5.60"
    assert lines[2] == "step 40: val/loss_simple_ema 0.2006, bpd 5.60"
    assert describe_validation(1_000, {"val/loss_simple": 1.0}, None, None) == "step 1,000: val/loss_simple 1"
    assert "train/loss 0.5, best" in describe_validation(
        3, VALUES | {"train/loss": 0.5}, Monitor("train/loss"), decisions[0]
    )


def test_the_closing_line_has_time_best_step_and_bound():
    monitor = Monitor("val/loss_simple_ema")
    assert describe_end(59.6, monitor, None) == "finished in 0:01:00"
    monitor.update(40, 0.20057)
    assert (
        describe_end(3723.4, monitor, 5.604)
        == "finished in 1:02:03, best val/loss_simple_ema 0.2006 at step 40, bpd 5.60"
    )


def test_without_a_terminal_there_is_no_bar(capsys, monkeypatch):
    """Plain lines replace it: one in half a minute, and one at the end; none in the other processes."""
    now = iter([0.0, 1.0, 40.0, 40.0, 41.0, 42.0, 42.0, *[100.0] * 9])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    display = ProgressDisplay(4)
    for step in (1, 2, 3, 4):
        display.update()
        display.show(step, f"loss_simple {step / 10}")
    display.close()
    output = capsys.readouterr()
    assert output.out == "step 2 of 4: loss_simple 0.2\nstep 4 of 4: loss_simple 0.4\n"
    assert output.err == ""
    other = ProgressDisplay(4, enabled=False)
    other.show(4, "loss_simple 1")
    assert capsys.readouterr() == ("", "")


SCRIPT = """
import sys
from diffusers_ddpm_ext.errors import print_error, warn
from diffusers_ddpm_ext.training.tracking.console import ProgressDisplay, print_line
display = ProgressDisplay(9)
display.update()
display.show(1, "loss_simple 0.2006")
{line}
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("print_error('the disk is full')", "error: the disk is full"),
        ("warn('a tracker failed')", "warning: a tracker failed"),
        ("print_line('step 1: checkpoint-1 is written')", "step 1: checkpoint-1 is written"),
    ],
)
def test_lines_start_on_a_line_of_their_own_after_the_bar(line: str, expected: str):
    """On a real terminal: what stands before the text is a line end, or the bar was wiped."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(
            sys.executable,
            [sys.executable, "-c", SCRIPT.format(line=line)],
            os.environ | {"PYTHONPATH": str(TESTS.parent)},
        )
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    output = b""
    try:
        while part := os.read(terminal, 65536):
            output += part
    except OSError:  # the child has ended
        pass
    assert os.waitpid(child, 0)[1] == 0, output
    before = output.decode().split(expected)[0]
    assert "loss_simple 0.2006" in before
    visible = before.replace("\r\n", "\n").rpartition("\n")[2].rpartition("\r")[2]
    assert visible.strip() == "", repr(before[-200:])
