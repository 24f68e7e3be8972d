"""Exponential moving average of a network's weights, with the semantics of CompVis' LitEma.

Update k (counted from 1) moves every shadow s towards its parameter p by ``s += (1 - d) (p - s)`` with the decay
``d = min(decay, (1 + k) / (10 + k))``, so that the first steps follow quickly. The decay is a float32 number there,
and here too: 1 - 0.9999 is then 1.0001659e-4, not 1e-4.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.utils.dtensor import copy_into, distribute_like, full_tensor, is_sharded, local_tensor, reshard

_GATHERED = (
    "parameter {name} is whole where LitEMA holds parts of it: fully_shard keeps the weights gathered after a forward "
    "pass without a backward pass. Call diffusers_ddpm_ext.utils.dtensor.reshard with the outermost sharded module "
    "first."
)


def _examples(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class LitEMA:
    """Shadow copies of a module's trainable parameters, which follow them slowly.

    Parameters that require a gradient at construction are tracked; frozen ones and buffers are not. A shadow has its
    parameter's dtype, but never less than float32, and follows its parameter to another device and into the parts that
    ``fully_shard`` makes. An update is one fused pass, right whatever the module's dtype, on each process's own part.

    Of a sharded module, all processes enter the methods, with the weights in parts as they are after an optimizer
    step; after a forward pass without a backward one, :func:`diffusers_ddpm_ext.utils.dtensor.reshard` brings them
    there.

    Args:
        module: the module to follow, free of wrappers (DDP, ``torch.compile``), whose prefixes would enter the names.
        decay: in [0, 1]; 0.9999 averages over about the last 10,000 steps.
        use_num_updates: whether the decay warms up; without it every update uses ``decay``.

    Attributes:
        decay: the limit of the decay.
        use_num_updates: whether the decay warms up.
        shadow: name of the parameter to its shadow; live tensors.

    Raises:
        ValueError: ``decay`` is outside [0, 1], or no parameter requires a gradient.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, use_num_updates: bool = True) -> None:
        self.decay = _checked_decay(decay)
        self.use_num_updates = bool(use_num_updates)
        self._num_updates = 0 if use_num_updates else -1
        self._in_scope = False
        self.shadow: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self.shadow[name] = parameter.detach().to(dtype, copy=True)
        if not self.shadow:
            raise ValueError("the module has no parameter that requires a gradient, so there is nothing to average.")

    @property
    def num_updates(self) -> int:
        """Number of updates so far; -1 throughout where ``use_num_updates`` is off, as in the original."""
        return self._num_updates

    @property
    def in_scope(self) -> bool:
        """Whether a module has the EMA weights just now, in :meth:`scope`."""
        return self._in_scope

    def _weight(self, num_updates: int) -> float:
        """``1 - d`` of an update, in the float32 arithmetic of the original."""
        decay = np.float32(self.decay)
        if self.use_num_updates:
            decay = min(decay, np.float32(1 + num_updates) / np.float32(10 + num_updates))
        return float(np.float32(1) - decay)

    @torch.no_grad()
    def step(self, module: nn.Module) -> None:
        """Move the shadows towards the module's parameters, once after each optimizer step.

        Args:
            module: the module given at construction, or one with the same trainable parameters, any dtype and device.

        Raises:
            ValueError: the trainable parameters are not the tracked ones, or the EMA weights are in the module just
                now (:meth:`scope`), where averaging them with themselves would mean nothing.
        """
        if self._in_scope:
            raise ValueError(
                "LitEMA.step() inside scope() would average the EMA weights with themselves; leave it first."
            )
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if parameters.keys() != self.shadow.keys():
            self._refuse_other_names(set(parameters))
        self._follow(parameters)
        shadows = [local_tensor(shadow) for shadow in self.shadow.values()]
        pairs = [(shadow.dtype, local_tensor(parameters[name])) for name, shadow in self.shadow.items()]
        # A `to` costs time even to do nothing.
        sources = [p if p.dtype == dtype else p.to(dtype) for dtype, p in pairs]
        following = self._num_updates + 1 if self.use_num_updates else self._num_updates
        torch._foreach_lerp_(shadows, sources, self._weight(following))
        self._num_updates = following

    def _refuse_other_names(self, trainable: set[str]) -> None:
        tracked = set(self.shadow)
        frozen, new = tracked - trainable, trainable - tracked
        parts = [f"no longer trainable or present: {_examples(frozen)}"] if frozen else []
        parts += [f"trainable but not tracked: {_examples(new)}"] if new else []
        raise ValueError(
            f"LitEMA tracks what was trainable when it was made, and that has changed ({'; '.join(parts)}). "
            "Make a new LitEMA after freezing or unfreezing, and give it the module without wrappers."
        )

    def _follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Bring the shadows to where the parameters are: another device, or in parts."""
        for name, shadow in self.shadow.items():
            parameter = parameters[name]
            if is_sharded(parameter) and not is_sharded(shadow):
                self.shadow[name] = distribute_like(shadow, parameter, from_main_process=False)
            elif is_sharded(shadow) and not is_sharded(parameter):
                raise ValueError(_GATHERED.format(name=name))
            elif shadow.device != parameter.device:
                self.shadow[name] = shadow.to(parameter.device)

    def _targets(self, module: nn.Module) -> list[Tensor]:
        """The module's tracked parameters in the order of ``shadow``; frozen by now or not."""
        parameters = dict(module.named_parameters())
        missing = self.shadow.keys() - parameters.keys()
        if missing:
            raise ValueError(
                f"the module has no parameter {_examples(missing)}, which LitEMA tracks; "
                "give it a module of the same architecture, without wrappers."
            )
        for name, shadow in self.shadow.items():
            if parameters[name].shape != shadow.shape:
                raise ValueError(
                    f"parameter {name} has shape {tuple(parameters[name].shape)}, its shadow {tuple(shadow.shape)}."
                )
        return [parameters[name] for name in self.shadow]

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the shadows into a module's parameters, cast to their dtype; what is not tracked stays.

        Args:
            module: a module with (at least) the tracked parameters, any dtype and device, frozen or not.

        Raises:
            ValueError: a tracked parameter is missing or has another shape; nothing is written then.
        """
        for target, shadow in zip(self._targets(module), self.shadow.values(), strict=True):
            copy_into(target, shadow)

    @contextmanager
    def scope(self, module: nn.Module) -> Iterator[nn.Module]:
        """Give a module the EMA weights for the length of a ``with`` block.

        The raw weights come back at its end, after an exception too; changes made to tracked weights in between are
        lost.

        Args:
            module: as in :meth:`copy_to`.

        Yields:
            The same module.

        Raises:
            ValueError: a scope of this LitEMA is open already (its raw weights would be lost), or the module does not
                fit; the module is as it was.
        """
        if self._in_scope:
            raise ValueError("LitEMA.scope() is open already and cannot be nested; leave it before entering again.")
        reshard(module)
        targets = self._targets(module)
        for target, (name, shadow) in zip(targets, self.shadow.items(), strict=True):
            if is_sharded(shadow) and not is_sharded(target):
                raise ValueError(_GATHERED.format(name=name))
        raw = [local_tensor(target).detach().clone() for target in targets]
        self._in_scope = True
        try:
            self.copy_to(module)
            yield module
        finally:
            self._in_scope = False
            with torch.no_grad():
                for target, values in zip(targets, raw, strict=True):
                    local_tensor(target).copy_(values)
                self._refresh(module, targets)

    def _refresh(self, module: nn.Module, targets: list[Tensor]) -> None:
        """Undo what ``fully_shard`` keeps of the EMA weights for the next forward pass, in the module or above it."""
        if any(is_sharded(target) for target in targets):
            reshard(module)
            for target, gathered in zip(targets, self._targets(module), strict=True):
                if gathered is not target:
                    copy_into(gathered, target)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: ``decay``, ``use_num_updates``, ``num_updates`` and ``shadow``, a dict of whole copies."""
        return {
            "decay": self.decay,
            "use_num_updates": self.use_num_updates,
            "num_updates": self._num_updates,
            "shadow": {name: full_tensor(shadow).clone() for name, shadow in self.shadow.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: shadows, number of updates, decay and warm-up.

        Args:
            state_dict: what :meth:`state_dict` returned, tensors of any device.

        Raises:
            ValueError: entries are missing, or names or shapes differ from the tracked ones; nothing is changed then.
        """
        missing = {"decay", "use_num_updates", "num_updates", "shadow"} - state_dict.keys()
        if missing:
            raise ValueError(f"no state of a LitEMA: {_examples(missing)} missing.")
        given: Mapping[str, Tensor] = state_dict["shadow"]
        if given.keys() != self.shadow.keys():
            only_given, only_here = set(given) - set(self.shadow), set(self.shadow) - set(given)
            raise ValueError(
                "the state's parameters are not the tracked ones: "
                f"unknown [{_examples(only_given)}], missing [{_examples(only_here)}]."
            )
        for name, shadow in self.shadow.items():
            if given[name].shape != shadow.shape:
                raise ValueError(
                    f"shadow {name} has shape {tuple(given[name].shape)} in the state, {tuple(shadow.shape)} here."
                )
        decay, num_updates = _checked_decay(state_dict["decay"]), int(state_dict["num_updates"])
        for name, shadow in self.shadow.items():
            copy_into(shadow, given[name])
        self.decay, self.use_num_updates = decay, bool(state_dict["use_num_updates"])
        self._num_updates = num_updates


def _checked_decay(decay: Any) -> float:
    if isinstance(decay, bool) or not isinstance(decay, (int, float, np.number)) or math.isnan(decay):
        raise ValueError(f"decay={decay!r} must be a number in [0, 1].")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay!r} must lie in [0, 1]; the usual value is 0.9999.")
    return float(decay)


EMA_METADATA_NAME = "ema.json"
EMA_METADATA_FORMAT = 1


@dataclass(frozen=True)
class EmaMetadata:
    """What a pipeline's folder says of the average that its default weights are.

    Attributes:
        decay: the limit of the decay.
        num_updates: number of updates; -1 without a warm-up of the decay, as in the original.
    """

    decay: float
    num_updates: int


def save_ema_metadata(folder: str | os.PathLike[str], facts: EmaMetadata) -> None:
    """Write ``ema.json`` into a pipeline's folder.

    Args:
        folder: it exists.
        facts: of the average.
    """
    content = {"format": EMA_METADATA_FORMAT, "decay": facts.decay, "num_updates": facts.num_updates}
    Path(folder, EMA_METADATA_NAME).write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_ema_metadata(folder: str | os.PathLike[str]) -> EmaMetadata | None:
    """Read ``ema.json`` of a pipeline's folder.

    Args:
        folder: of a pipeline.

    Returns:
        What it says; None without such a file.

    Raises:
        ValueError: it is damaged or of another format.
    """
    path = Path(folder, EMA_METADATA_NAME)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != EMA_METADATA_FORMAT:
            raise ValueError(f'it says "format": {content["format"]}, this version reads {EMA_METADATA_FORMAT}')
        return EmaMetadata(_checked_decay(content["decay"]), int(content["num_updates"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
