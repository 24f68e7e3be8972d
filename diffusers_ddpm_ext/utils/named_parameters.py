"""Parameters of a network by name, for callers that need them at every step.

Walking the modules of a small network takes longer than averaging its weights. So the place of each parameter is
kept, and only the modules' children and the names of their parameters are compared with those of the last walk.
"""

from __future__ import annotations

from torch import Tensor, nn

from diffusers_ddpm_ext.utils.wrappers import plain_name, unwrap


class NamedParameters:
    """Reads the parameters of a network under its wrappers by their plain names, in order; of one at a time."""

    def __init__(self) -> None:
        self._network: nn.Module | None = None
        self._structure: list[tuple[nn.Module, tuple[nn.Module | None, ...], tuple[str, ...]]] = []
        self._places: list[tuple[str, nn.Module, str]] = []  # plain name, module, name in it

    def __reduce__(self) -> tuple[type[NamedParameters], tuple[()]]:
        """A copy knows no network: it must not copy one, nor keep one in memory for another owner."""
        return NamedParameters, ()

    def of(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters now: those that ``fully_shard`` has put in place, and of modules that were exchanged."""
        network = unwrap(module)
        if network is not self._network or not self._is_unchanged():
            self._walk(network)
        found: dict[str, Tensor] = {}
        for name, owner, key in self._places:
            parameter = owner._parameters[key]
            if parameter is not None:
                found[name] = parameter
        return found

    def _is_unchanged(self) -> bool:
        return all(
            tuple(module._modules.values()) == children and tuple(module._parameters) == names
            for module, children, names in self._structure
        )

    def _walk(self, network: nn.Module) -> None:
        self._network = network
        modules = list(network.named_modules())
        self._structure = [(m, tuple(m._modules.values()), tuple(m._parameters)) for _, m in modules]
        places = {name: (owner, key) for prefix, owner in modules for key, name in _names(prefix, owner)}
        self._places = [(plain_name(name), *places[name]) for name, _ in network.named_parameters()]


def _names(prefix: str, module: nn.Module) -> list[tuple[str, str]]:
    return [(key, f"{prefix}.{key}" if prefix else key) for key in module._parameters]
