"""Where the host may read a tensor's value at once, and where a read would wait for everything queued on the device.

Code that would only read a value to save work, or to check an argument, asks here first: between two logging intervals
a training step on an accelerator reads nothing.
"""

from __future__ import annotations

import torch

FREE = frozenset({"cpu"})
"""Types of devices whose values cost nothing to read."""


def reads_are_free(device: torch.device) -> bool:
    """Whether reading a value from a device costs nothing."""
    return device.type in FREE
