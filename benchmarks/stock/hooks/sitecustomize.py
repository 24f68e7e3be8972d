"""Step clock of a training script that stays as it is, and its stand-in for torchvision.

This folder is on PYTHONPATH of the script's process. The clock is a hook of torch after every optimizer step; nothing
is loaded before the script loads it. All settings are variables of the environment:

STEP_CLOCK: file that gets one line of JSON per turn: steps done, seconds and processor seconds of the turn, threads.
STEP_CLOCK_TURN: steps per turn. After each turn the process stops itself (SIGSTOP), so that two scripts can take
    turns on one machine; whoever started it sends SIGCONT.
STEP_CLOCK_SYNCS: step from which operations that wait for the GPU are counted and added to the lines; 0: never.
STAND_IN: folder of the package torchvision, for `import torchvision` only: libraries that look for an installed
    torchvision (`importlib.util.find_spec`) find none, as without the stand-in.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
import warnings

MODULE = "torch.optim.optimizer"


class Clock:
    """Counts optimizer steps and writes a line per turn."""

    def __init__(self, path, turn):
        self.path, self.turn, self.steps, self.syncs, self.started = path, turn, 0, 0, None

    def __call__(self, optimizer, args, kwargs):
        """The hook."""
        import torch

        self.steps += 1
        if self.steps % self.turn:
            return
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")  # this wait is not one of the script
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        if self.started is not None:
            row = {"step": self.steps, "wall": now[0] - self.started[0], "cpu": now[1] - self.started[1]}
            row |= {"threads": torch.get_num_threads(), "syncs": self.syncs}
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            os.kill(os.getpid(), signal.SIGSTOP)
        self.syncs = 0
        first = int(os.environ.get("STEP_CLOCK_SYNCS", "0"))
        if torch.cuda.is_available() and 0 < first <= self.steps:
            self.count_syncs()
        self.started = (time.perf_counter(), time.process_time())

    def count_syncs(self):
        """Count the warnings of torch's debug mode."""
        import torch

        show = warnings.showwarning

        def counting(message, *rest, **kwargs):
            if "synchronizing CUDA operation" in str(message):
                self.syncs += 1
            else:
                show(message, *rest, **kwargs)

        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        if getattr(show, "__name__", "") != "counting":
            warnings.showwarning = counting
        torch.cuda.set_sync_debug_mode("warn")


class Finder(importlib.abc.MetaPathFinder):
    """Registers the hook as soon as torch's optimizers have been imported."""

    def find_spec(self, name, path=None, target=None):
        """The module's own loader, followed by the hook."""
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            clock = Clock(os.environ["STEP_CLOCK"], int(os.environ["STEP_CLOCK_TURN"]))
            module.register_optimizer_step_post_hook(clock)

        spec.loader.exec_module = exec_module
        return spec


class StandIn(importlib.abc.MetaPathFinder):
    """Finds the stand-in for the statement `import torchvision`, but not for a question whether it is installed."""

    def find_spec(self, name, path=None, target=None):
        """The stand-in's spec; None for everything else."""
        if name != "torchvision" or sys._getframe(2).f_code.co_name != "_find_and_load_unlocked":
            return None
        from transformers.utils import is_torchvision_available

        is_torchvision_available()  # it remembers that there is none; once the stand-in is loaded it would find it
        folder = os.path.join(os.environ["STAND_IN"], name)
        start = os.path.join(folder, "__init__.py")
        return importlib.util.spec_from_file_location(name, start, submodule_search_locations=[folder])


if "STAND_IN" in os.environ:
    sys.meta_path.insert(0, StandIn())
if "STEP_CLOCK" in os.environ:
    sys.meta_path.insert(0, Finder())
