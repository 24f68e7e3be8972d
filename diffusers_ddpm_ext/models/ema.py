"""Exponential moving average of a network's weights (LitEMA, as in CompVis).

Update k (counted from 1) moves every shadow s towards its parameter p by ``s += (1 - d) (p - s)`` with the decay
``d = min(decay, (1 + k) / (10 + k))``, so that the average follows the first steps quickly. The decay is a float32
number, as in the original: 1 - 0.9999 is then 1.0001659e-4, not 1e-4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.models.ema_metadata import MAX_UPDATES
from diffusers_ddpm_ext.models.ema_update import update_in_chunks
from diffusers_ddpm_ext.utils.checks import checked_flag, checked_integer, checked_number
from diffusers_ddpm_ext.utils.dtensor import copy_into, distribute_like, full_tensor, is_sharded, local_tensor, reshard
from diffusers_ddpm_ext.utils.named_parameters import NamedParameters
from diffusers_ddpm_ext.utils.wrappers import plain_name, unwrap

_NOT_SHARDED = (
    "parameter {name} is not sharded, but its shadow is: fully_shard keeps the weights unsharded after a forward pass "
    "without a backward pass. Call diffusers_ddpm_ext.utils.dtensor.reshard with the outermost sharded module "
    "first."
)
_NOT_OFFLOADED = (
    "the module is sharded, and its average is to stay in main memory (offload=True), which is for modules that are "
    "not: leave it out, since the average is sharded too."
)


def _examples(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class LitEMA:
    """Exponential moving average of a module's trainable parameters.

    Parameters that require a gradient at construction are tracked; frozen ones and buffers are not. A shadow has its
    parameter's dtype, but at least float32, and moves with its parameter to another device and to the sharding of
    ``fully_shard``. An update is one fused pass over the local shards, for any dtype of the module.

    Two options save memory of the device. ``dtype=torch.bfloat16`` halves the shadows and rounds stochastically, so
    that small updates count on average (`diffusers_ddpm_ext.models.ema_update`). ``offload`` keeps them in main
    memory, with the same values to the bit, and copies them to the network's device and back for each update.

    The methods are collective calls for a sharded module: every process must make them, with the weights sharded as
    after an optimizer step; after a forward pass without a backward pass,
    `diffusers_ddpm_ext.utils.dtensor.reshard` shards them again.

    Args:
        module: the module to average. Names are those of the module under its wrappers (DDP, ``torch.compile``), and
            every method takes it with or without them.
        decay: in [0, 1]; 0.9999 averages over about the last 10,000 steps.
        use_num_updates: whether the decay warms up; without it every update uses ``decay``.
        untracked: names of trainable parameters that are not averaged.
        dtype: of the shadows: ``torch.bfloat16``; None for at least float32.
        offload: keep the shadows in main memory (pinned, for a module on CUDA). Not for sharded modules.

    Attributes:
        decay: the limit of the decay.
        use_num_updates: whether the decay warms up.
        untracked: names of trainable parameters that are not averaged.
        dtype: of the shadows, as given.
        offload: whether the shadows stay in main memory.

    Raises:
        ValueError: ``decay`` is outside [0, 1], ``dtype`` is another one, ``untracked`` is one text, or no parameter
            requires a gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float = 0.9999,
        use_num_updates: bool = True,
        untracked: Collection[str] = (),
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        self.decay = _checked_decay(decay)
        self.use_num_updates = checked_flag("use_num_updates", use_num_updates)
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype={dtype} must be torch.bfloat16, or None for at least float32.")
        self.dtype, self.offload = dtype, checked_flag("offload", offload)
        self._num_updates = 0 if use_num_updates else -1
        self._skipped: Tensor | None = None  # of these updates, not read from the device yet
        self._num_steps = 0
        self._in_scope = False
        self._names = NamedParameters()
        self._updating: torch.device | None = None
        if isinstance(untracked, str):
            raise ValueError(f"untracked={untracked!r} must be several names: write [{untracked!r}].")
        self.untracked = frozenset(untracked)
        self._shadow: dict[str, Tensor] = {}
        for name, parameter in _named_parameters(module).items():
            if parameter.requires_grad and name not in self.untracked:
                self._shadow[name] = self._new_shadow(parameter.detach())
        if not self._shadow:
            raise ValueError("the module has no parameter that requires a gradient, so there is nothing to average.")

    def _new_shadow(self, parameter: Tensor) -> Tensor:
        dtype = self.dtype or torch.promote_types(parameter.dtype, torch.float32)
        if not self.offload:
            return parameter.to(dtype, copy=True)
        shadow = parameter.to("cpu", dtype, copy=True)
        return shadow.pin_memory() if parameter.is_cuda else shadow

    @property
    def shadow(self) -> dict[str, Tensor]:
        """Averaged values by parameter name; not copies. Waits for an update of shadows in main memory."""
        if self._updating is not None:
            torch.cuda.synchronize(self._updating)
            self._updating = None
        return self._shadow

    @property
    def num_updates(self) -> int:
        """Number of updates so far; always -1 without ``use_num_updates``, as in the original."""
        if self._skipped is not None:
            self._num_updates -= int(self._skipped)
            self._skipped = None
        return self._num_updates

    @property
    def scalars(self) -> dict[str, Any]:
        """State besides the shadows, as JSON: ``decay``, ``use_num_updates`` and ``num_updates``.

        In bfloat16 also ``num_steps``, the number of calls of `step`, which the rounding follows from.
        """
        counts = {} if self.dtype is None else {"num_steps": self._num_steps}
        return {"decay": self.decay, "use_num_updates": self.use_num_updates, "num_updates": self.num_updates} | counts

    @property
    def in_scope(self) -> bool:
        """Whether a module has the EMA weights at the moment, in `scope`."""
        return self._in_scope

    def _weight(self, num_updates: int) -> float:
        """``1 - d`` of an update, in the float32 arithmetic of the original."""
        decay = np.float32(self.decay)
        if self.use_num_updates:
            decay = min(decay, np.float32(1 + num_updates) / np.float32(10 + num_updates))
        return float(np.float32(1) - decay)

    def _weight_on_device(self, attempts: int, skipped: Tensor) -> Tensor:
        """The same where only the device knows how many updates were skipped, 0 in a skipped step: 0-dim, float32."""
        if not self.use_num_updates:
            return (1 - skipped) * self._weight(attempts)
        count = torch.zeros_like(skipped, dtype=torch.int64) if self._skipped is None else self._skipped
        self._skipped = count + skipped.long()
        updates = attempts - self._skipped
        decay = ((1 + updates).float() / (10 + updates).float()).clamp(max=self.decay)
        return (1 - skipped) * (1 - decay)

    @torch.no_grad()
    def step(self, module: nn.Module, skipped: Tensor | None = None) -> None:
        """Move the shadows towards the module's parameters, once after each optimizer step.

        Args:
            module: the module given at construction, or one with the same trainable parameters, any dtype and device.
            skipped: 1 where the optimizer step was skipped, so that nothing is updated, else 0: 0-dim, float32, on the
                module's device, from which it is not read. None: it was not skipped.

        Raises:
            ValueError: the trainable parameters are not the tracked ones, in name or shape, or the module has the EMA
                weights at the moment (`scope`).
        """
        if self._in_scope:
            raise ValueError(
                "LitEMA.step() inside scope() would average the EMA weights with themselves; leave it first."
            )
        named = self._names.of(_checked_module(module)).items()
        parameters = {name: p for name, p in named if p.requires_grad and name not in self.untracked}
        if parameters.keys() != self._shadow.keys():
            self._refuse_other_names(set(parameters))
        self._follow(parameters)
        shadows = [local_tensor(shadow) for shadow in self._shadow.values()]
        sources = [local_tensor(parameters[name]) for name in self._shadow]
        num_updates = self._num_updates + 1 if self.use_num_updates else self._num_updates
        if skipped is None and self._skipped is not None:
            skipped = torch.zeros_like(self._skipped, dtype=torch.float32)
        weight = self._weight(num_updates) if skipped is None else self._weight_on_device(num_updates, skipped)
        device = sources[0].device
        if self.dtype is not None or shadows[0].device != device:
            update_in_chunks(shadows, sources, weight, self._num_steps)
            self._updating = device if device.type == "cuda" and self.offload else None
        else:
            # A `to` costs time even if it does nothing.
            sources = [p if p.dtype == s.dtype else p.to(s.dtype) for p, s in zip(sources, shadows, strict=True)]
            weights: Any = [weight] * len(shadows) if isinstance(weight, Tensor) else weight
            torch._foreach_lerp_(shadows, sources, weights)
        self._num_steps += 1
        self._num_updates = num_updates

    def _refuse_other_names(self, trainable: set[str]) -> None:
        tracked = set(self._shadow)
        frozen, new = tracked - trainable, trainable - tracked
        parts = [f"no longer trainable or present: {_examples(frozen)}"] if frozen else []
        parts += [f"trainable but not tracked: {_examples(new)}"] if new else []
        raise ValueError(
            f"LitEMA tracks what was trainable when it was made, and that has changed ({'; '.join(parts)}). "
            "Make a new LitEMA after freezing or unfreezing."
        )

    def _follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the shadows to the parameters' device and sharding."""
        for name, shadow in self._shadow.items():
            parameter = parameters[name]
            if parameter.shape != shadow.shape:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}, but LitEMA tracks {tuple(shadow.shape)}; "
                    "give it a module of the same architecture."
                )
            if is_sharded(parameter) and self.offload:
                raise ValueError(_NOT_OFFLOADED)
            if is_sharded(parameter) and not is_sharded(shadow):
                self._shadow[name] = distribute_like(shadow, parameter, from_main_process=False)
            elif is_sharded(shadow) and not is_sharded(parameter):
                raise ValueError(_NOT_SHARDED.format(name=name))
            elif shadow.device != parameter.device and not self.offload:
                self._shadow[name] = shadow.to(parameter.device)

    def _targets(self, module: nn.Module) -> list[Tensor]:
        """The module's tracked parameters in the order of ``shadow``, frozen or not."""
        parameters = _named_parameters(module)
        missing = self.shadow.keys() - parameters.keys()
        if missing:
            raise ValueError(
                f"the module has no parameter {_examples(missing)}, which LitEMA tracks; "
                "give it a module of the same architecture."
            )
        for name, shadow in self.shadow.items():
            if parameters[name].shape != shadow.shape:
                raise ValueError(
                    f"parameter {name} has shape {tuple(parameters[name].shape)}, its shadow {tuple(shadow.shape)}."
                )
        return [parameters[name] for name in self.shadow]

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the shadows into a module's parameters, cast to their dtype; others are unchanged.

        Args:
            module: a module with (at least) the tracked parameters, any dtype and device, frozen or not.

        Raises:
            ValueError: a tracked parameter is missing or has another shape; then nothing is written.
        """
        for target, shadow in zip(self._targets(module), self.shadow.values(), strict=True):
            copy_into(target, shadow)

    @contextmanager
    def scope(self, module: nn.Module) -> Iterator[nn.Module]:
        """Use the EMA weights in a module during a ``with`` block.

        The raw weights are restored at its end, after an exception too; changes of tracked weights in the block are
        lost.

        Args:
            module: as in `copy_to`.

        Yields:
            The same module.

        Raises:
            ValueError: a scope of this LitEMA is already open, whose raw weights would be lost, or the module does not
                fit; then the module is unchanged.
        """
        if self._in_scope:
            raise ValueError("LitEMA.scope() is already open and cannot be nested; leave it before entering it again.")
        _named_parameters(module)
        reshard(module)
        targets = self._targets(module)
        for target, (name, shadow) in zip(targets, self.shadow.items(), strict=True):
            if is_sharded(shadow) and not is_sharded(target):
                raise ValueError(_NOT_SHARDED.format(name=name))
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
        """Free the unsharded EMA weights that ``fully_shard`` keeps for the next forward pass."""
        if any(is_sharded(target) for target in targets):
            reshard(module)
            for target, unsharded in zip(targets, self._targets(module), strict=True):
                if unsharded is not target:
                    copy_into(unsharded, target)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: `scalars`, and ``shadow``, a dict of unsharded copies."""
        return self.scalars | {"shadow": {name: full_tensor(shadow).clone() for name, shadow in self.shadow.items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a `state_dict`: shadows, number of updates, decay and warm-up.

        Args:
            state_dict: what `state_dict` returned, tensors of any device.

        Raises:
            ValueError: entries are missing, or names or shapes differ from the tracked ones; then nothing is changed.
        """
        missing = {"decay", "use_num_updates", "num_updates", "shadow"} - state_dict.keys()
        if missing:
            raise ValueError(f"not the state of a LitEMA: {_examples(missing)} missing.")
        loaded: Mapping[str, Tensor] = state_dict["shadow"]
        if not isinstance(loaded, Mapping) or loaded.keys() != self.shadow.keys():
            names = {str(name) for name in loaded} if isinstance(loaded, Mapping) else set()
            unknown, absent = names - set(self.shadow), set(self.shadow) - names
            raise ValueError(
                "the state's parameters are not the tracked ones: "
                f"unknown [{_examples(unknown)}], missing [{_examples(absent)}]."
            )
        for name, shadow in self.shadow.items():
            _check_shadow(name, loaded[name], shadow)
        decay, use_num_updates = _checked_decay(state_dict["decay"]), state_dict["use_num_updates"]
        use_num_updates = checked_flag("use_num_updates", use_num_updates)
        num_updates = _checked_count("num_updates", state_dict["num_updates"], -1)
        num_steps = _checked_count("num_steps", state_dict.get("num_steps", 0), 0)
        if use_num_updates != (num_updates >= 0):
            raise ValueError(
                f"num_updates={num_updates} contradicts use_num_updates={use_num_updates}: it is -1 without a warm-up "
                "of the decay, and 0 or more with it."
            )
        for name, shadow in self.shadow.items():
            copy_into(shadow, loaded[name])
        self.decay, self.use_num_updates = decay, use_num_updates
        self._num_updates, self._skipped = num_updates, None
        self._num_steps = num_steps


def _checked_module(module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        way_out = (
            "use ema.copy_to(network), or `with ema.scope(network):`" if isinstance(module, LitEMA) else "pass it"
        )
        raise ValueError(f"module={type(module).__name__} is not the network (a torch.nn.Module): {way_out}.")
    return module


def _named_parameters(module: Any) -> dict[str, Tensor]:
    """Parameters of the module under its wrappers, by their plain names."""
    named = unwrap(_checked_module(module)).named_parameters()
    return {plain_name(name): parameter for name, parameter in named}


def _check_shadow(name: str, loaded: Any, shadow: Tensor) -> None:
    if not isinstance(loaded, Tensor) or not loaded.is_floating_point():
        got = loaded.dtype if isinstance(loaded, Tensor) else type(loaded).__name__
        raise ValueError(f"shadow {name} must be a floating tensor, got {got}.")
    if loaded.shape != shadow.shape:
        raise ValueError(f"shadow {name} has shape {tuple(loaded.shape)} in the state, {tuple(shadow.shape)} here.")
    if not bool(torch.isfinite(local_tensor(loaded)).all()):
        raise ValueError(f"shadow {name} has values that are NaN or infinite.")


def _checked_count(name: str, count: Any, low: int) -> int:
    """A number of updates, or -1 where ``low`` allows it."""
    allowed = "an integer: " + ("-1 (no warm-up of the decay) or " if low < 0 else "") + "a number of updates"
    return checked_integer(name, count, allowed, low=low, high=MAX_UPDATES)


def _checked_decay(decay: Any) -> float:
    return float(checked_number("decay", decay, "in [0, 1]; the usual value is 0.9999", lambda d: 0 <= d <= 1))
