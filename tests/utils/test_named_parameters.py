"""Kept places of parameters against a walk through the modules, after every kind of change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from diffusers_ddpm_ext.utils.named_parameters import NamedParameters


class Network(nn.Module):
    """Nested modules, a parameter of its own, and a weight that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2, bias=False)])
        self.blocks[1].weight = self.blocks[0][0].weight


def replace_child(network: Network) -> None:
    network.blocks[0][0] = nn.Linear(2, 3)


def add_child(network: Network) -> None:
    network.blocks[0].append(nn.Linear(2, 1))


def remove_child(network: Network) -> None:
    del network.blocks[0]


def add_parameter(network: Network) -> None:
    network.blocks[1].extra = nn.Parameter(torch.zeros(1))


def remove_parameter(network: Network) -> None:
    del network.scale


def exchange_parameter(network: Network) -> None:
    network.scale = nn.Parameter(torch.zeros(5))


def drop_a_bias(network: Network) -> None:
    network.blocks[0][0].bias = None


@pytest.mark.parametrize(
    "change",
    [replace_child, add_child, remove_child, add_parameter, remove_parameter, exchange_parameter, drop_a_bias],
)
def test_changes_of_the_network_are_seen(change: Callable[[Network], None]):
    network, places = Network(), NamedParameters()
    for _ in range(2):
        want = dict(network.named_parameters())
        assert list(places.of(network)) == list(want)
        assert all(places.of(network)[name] is parameter for name, parameter in want.items())
        change(network)
        change = lambda network: None  # noqa: E731
    want = dict(network.named_parameters())
    assert list(places.of(network)) == list(want)


def test_wrappers_and_another_network():
    places, first, second = NamedParameters(), Network(), Network()
    names = list(places.of(torch.optim.swa_utils.AveragedModel(first)))
    assert names == [name for name, _ in first.named_parameters()]
    assert places.of(second)["scale"] is second.scale
    assert places.of(first)["scale"] is first.scale


def test_copies_hold_no_network():
    places = NamedParameters()
    places.of(Network())
    for other in (copy.deepcopy(places), pickle.loads(pickle.dumps(places))):
        assert other._network is None
