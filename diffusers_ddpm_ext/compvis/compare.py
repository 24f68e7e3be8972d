"""Comparison of saved networks and tensors with what a conversion makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.architecture import as_list
from diffusers_ddpm_ext.pipelines.guidance import network_config

# Of transformers' configurations: about the file, not the network.
NOT_COMPARED = ("architectures", "dtype", "torch_dtype", "transformers_version")


def network_differences(where: str, ours: nn.Module, theirs: nn.Module) -> list[str]:
    """Compare two networks: one phrase per difference of a tensor or setting.

    Args:
        where: name of the network in them.
        ours: converted from the source.
        theirs: from the folder.
    """
    expected, actual = ours.state_dict(), theirs.state_dict()
    differences = [f"{where} lacks {name}" for name in expected.keys() - actual.keys()]
    differences += [f"{where} has an additional {name}" for name in actual.keys() - expected.keys()]
    config = _settings(theirs)
    differences += [
        f"{where}'s {name} is {config.get(name)}, not {value}"
        for name, value in _settings(ours).items()
        if not name.startswith("_") and name not in NOT_COMPARED and as_list(config.get(name)) != as_list(value)
    ]
    for name in expected.keys() & actual.keys():
        differences += tensor_difference(f"{where} {name}", expected[name], actual[name])
    return sorted(differences)


def component_differences(name: str, what: str, ours: nn.Module | None, theirs: nn.Module | None) -> list[str]:
    """Compare a component of two pipelines, or None where there is none.

    Args:
        name: of the component.
        what: it is, in the phrase that one has none.
        ours: of the conversion.
        theirs: of the folder.
    """
    if ours is not None and theirs is not None:
        return network_differences(name, ours, theirs)
    if ours is theirs:
        return []
    return [f"the pipeline has a {what}, the checkpoint has not" if ours is None else f"the pipeline lacks the {what}"]


def _settings(network: nn.Module) -> Mapping[str, Any]:
    """The configuration of a network of Diffusers or transformers."""
    config: Any = network_config(network)
    return config if isinstance(config, Mapping) else config.to_dict()


def tensor_difference(name: str, ours: Tensor | None, theirs: Tensor | None) -> list[str]:
    """Compare two tensors, or None where there is none: at most one phrase.

    Args:
        name: of the tensor, in the phrase.
        ours: converted from the source.
        theirs: from the folder.
    """
    if ours is None or theirs is None:
        what = "missing" if theirs is None else "present, but not in the source"
        return [] if ours is theirs else [f"{name} is {what}"]
    if ours.shape != theirs.shape:
        return [f"{name} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}"]
    if torch.equal(ours, theirs.to(ours.dtype)):
        return []
    largest = float((ours.double() - theirs.double()).abs().max())
    return [f"{name} differs by up to {largest:.3g}"]
