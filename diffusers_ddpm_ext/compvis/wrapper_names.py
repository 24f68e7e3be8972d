"""Names that wrappers add to the keys of a checkpoint: DDP, ``torch.compile``, FSDP, DeepSpeed, a class around it all.

``module.model.diffusion_model.x``, ``model._orig_mod.diffusion_model.x``, ``_forward_module.model.diffusion_model.x``
and ``model.model.diffusion_model.x`` are ``model.diffusion_model.x``. An EMA's names have no dots: there a wrapper's
stands inside of them.
"""

from __future__ import annotations

from collections.abc import Iterable

WRAPPERS = ("_forward_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
EMA_PREFIX = "model_ema."
OUTER = "model."  # of a class around the whole model, if its inner keys start with it too


def plain_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each key of a checkpoint by its name without wrappers; no module of the original has a wrapper's name.

    Raises:
        ValueError: two keys are equal without them.
    """
    plain = {key: _without_wrappers(key) for key in keys}
    while any(name.startswith(OUTER * 2) for name in plain.values()):
        plain = {key: name.removeprefix(OUTER) for key, name in plain.items()}
    by_name: dict[str, str] = {}
    for key, name in plain.items():
        if name in by_name:
            raise ValueError(f"The checkpoint contains {name} twice, as {by_name[name]} and as {key}.")
        by_name[name] = key
    return by_name


def _without_wrappers(key: str) -> str:
    parts = key.split(".")
    if not parts[0]:
        return key
    kept = [part for part in parts[:-1] if part not in WRAPPERS] + parts[-1:]
    name = ".".join(kept)
    if EMA_PREFIX in name:
        head, _, flat = name.partition(EMA_PREFIX)
        for wrapper in WRAPPERS:
            flat = flat.replace(wrapper, "")
        name = head + EMA_PREFIX + flat
    return name
