"""Evaluation mode of a network for the time of a block, also when several threads use the network."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_LOCK = threading.Lock()
# Network -> number of open blocks, and the modules to put back into training mode after the last of them.
_OPEN: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Switch off dropout and the like; at the end of the last open block each module is as it was before the first.

    Args:
        network: with or without wrappers.
    """
    with _LOCK:
        count, training = _OPEN.get(network, (0, []))
        left = [module for module in network.modules() if module.training]
        for module in left:
            module.training = False
        _OPEN[network] = (count + 1, [*training, *left])
    try:
        yield
    finally:
        with _LOCK:
            count, training = _OPEN.pop(network)
            if count > 1:
                _OPEN[network] = (count - 1, training)
            else:
                for module in training:
                    module.training = True
