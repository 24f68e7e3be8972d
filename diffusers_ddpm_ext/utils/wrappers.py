"""Wrappers of networks: the network under ``torch.compile``, DDP, FSDP and Accelerate, and its class.

A wrapper has another type, no ``config``, and other names for the same tensors. Whoever asks for one of these asks the
network under it.
"""

from __future__ import annotations

from torch import Tensor, nn

_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}
"""Class of a wrapper -> attribute with the module under it. Named as texts: importing them takes a second."""
_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of tensor names that wrappers of submodules add; no module of Diffusers has such a name."""


def unwrap(module: nn.Module) -> nn.Module:
    """The module under any number of wrappers around it; a module without wrappers as it is.

    Args:
        module: e.g. ``torch.compile(unet)``, or ``DistributedDataParallel(unet)``.
    """
    while True:
        names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
        attribute = next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)
        inner = None if attribute is None else getattr(module, attribute, None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def network_class(module: nn.Module) -> type[nn.Module]:
    """The class of the module under the wrappers; ``fully_shard`` and ``replicate`` replace it by one of their own."""
    cls = type(unwrap(module))
    while cls.__module__.startswith("torch.distributed.") and issubclass(cls.__bases__[-1], nn.Module):
        cls = cls.__bases__[-1]
    return cls


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers of submodules (``torch.compile(unet.mid_block)``) add to it."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The tensors under their names without wrappers, not copied."""
    return {plain_name(name): tensor for name, tensor in unwrap(module).state_dict().items()}


def has_inner_wrappers(module: nn.Module) -> bool:
    """Whether wrappers of submodules change the names of tensors."""
    return any(plain_name(name) != name for name in unwrap(module).state_dict())
