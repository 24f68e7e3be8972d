"""A config that is always obeyed: changing it rebuilds the scheduler as its constructor would, or is refused.

Diffusers' ``register_to_config`` and its scripts (``scheduler._internal_dict = FrozenDict(...)``) change the record of
a scheduler that has computed its tables already. Both go through `LiveConfig._internal_dict` here. ``FrozenDict``
itself can be changed in place, since its guard looks for a name that Python mangles; `FrozenConfig` cannot.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import FrozenDict

from diffusers_ddpm_ext.diffusion.schedule import MAX_TRAIN_TIMESTEPS
from diffusers_ddpm_ext.schedulers.config import check_names, normalize_config
from diffusers_ddpm_ext.utils.checks import describe
from diffusers_ddpm_ext.utils.input_files import exists, read_json_object

_KEY = "_internal_dict"
SCHEDULER_CONFIG = "scheduler_config.json"


class FrozenConfig(FrozenDict):
    """``FrozenDict`` without a way to change it in place, which no scheduler would notice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["_is_frozen"] = True

    def __reduce__(self) -> tuple[type[FrozenConfig], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)

    def _refuse(self, *names: Any, **changes: Any) -> Any:
        name = str(names[0]) if names and isinstance(names[0], str) else next(iter(changes), "name")
        raise ValueError(
            f"a scheduler's config cannot be changed in place ({name}): use "
            f"scheduler.register_to_config({name}=...), or scheduler.from_config(scheduler.config, {name}=...)."
        )

    def __setitem__(self, name: str, value: Any) -> None:
        if "_is_frozen" in self.__dict__ and not name.startswith("_"):  # Diffusers sets _class_name when it saves
            self._refuse(name)
        super().__setitem__(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_is_frozen" in self.__dict__:
            self._refuse(name)
        super().__setattr__(name, value)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self}

    __delitem__ = __delattr__ = __ior__ = _refuse
    clear = move_to_end = pop = popitem = setdefault = update = _refuse


class LiveConfig:
    """Mixin, before Diffusers' classes: every change of the config is obeyed as a new scheduler would, or refused."""

    _is_built = False
    register_to_config: Callable[..., None]
    _replace_by: Callable[[Any], None]  # takes over the state of another scheduler of the class

    @property
    def _internal_dict(self) -> FrozenConfig:
        """The config; assigning one changes the scheduler."""
        if _KEY not in self.__dict__:  # before the constructor
            raise AttributeError(_KEY)
        config: FrozenConfig = self.__dict__[_KEY]
        return config

    @_internal_dict.setter
    def _internal_dict(self, config: Mapping[str, Any]) -> None:
        if not self._is_built:
            self.__dict__[_KEY] = FrozenConfig(config)
            return
        defaults, old = constructor_defaults(type(self)), self._internal_dict
        check_names(config.keys() - old.keys(), defaults)
        new = {key: config.get(key, default) for key, default in defaults.items()}
        changes = {key: value for key, value in new.items() if not _is_same(value, old[key])}
        if changes:
            values = normalize_config({key: old[key] for key in new}, changes) | changes
            rebuilt = type(self)(**{key: values[key] for key in new if key in values})
            check_obeyed(rebuilt, changes)
            self._replace_by(rebuilt)
            old = rebuilt._internal_dict
        self.__dict__[_KEY] = FrozenConfig({**config, **{key: old[key] for key in new}})

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute; a key of the config is registered, since only the config is read."""
        if self._is_built and name in self._internal_dict:
            self.register_to_config(**{name: value})
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from the config of this class or of a compatible one; ``kwargs`` override it.

        What a network was trained with (betas, number of steps, prediction type) is kept even if it is the other
        class's default; its other defaults are replaced by ours, as everywhere in Diffusers.

        Args:
            config: ``scheduler.config``, or a dict.
            return_unused_kwargs: whether to return ``(scheduler, unused)``.
            **kwargs: arguments of the constructor.

        Raises:
            ValueError: a value is out of its range, another key of the config would keep it from being obeyed, or a
                name is CompVis' or misspelled.
        """
        if isinstance(config, dict):
            check_names(kwargs, constructor_defaults(cls))
            config = normalize_config(config, kwargs)
        result = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]
        scheduler = result[0] if return_unused_kwargs else result
        names = constructor_defaults(type(scheduler))
        check_obeyed(scheduler, {key: value for key, value in kwargs.items() if key in names})
        return result

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As ``SchedulerMixin.from_pretrained``, with the same arguments."""
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path", "")
        file = Path(source, kwargs.get("subfolder") or "", SCHEDULER_CONFIG)
        if exists(file):
            read_json_object(file, allow_infinity=True)  # Diffusers' own reader knows no limits
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        scheduler = loaded[0] if isinstance(loaded, tuple) else loaded
        scheduler._internal_dict = {
            key: value for key, value in scheduler.config.items() if key != "_use_default_values"
        }
        return loaded


def constructor_defaults(cls: type) -> dict[str, Any]:
    """Names and defaults of a class's constructor arguments: the keys of its config."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def check_obeyed(scheduler: Any, requested: Mapping[str, Any]) -> None:
    """Raise ValueError if the config of a new scheduler has another value than was requested for a key.

    ``trained_betas=None`` asks for the betas of the name, which the config may have to contain.
    """
    for key, value in requested.items():
        if not _is_same(value, scheduler.config[key]) and not (key == "trained_betas" and value is None):
            others = [name for name in ("v_posterior", "trained_betas") if scheduler.config.get(name) is not None]
            raise ValueError(
                f"{key}={describe(value)} is overridden by {' and '.join(others)} of the config, which leaves "
                f"{key}={describe(scheduler.config[key])}: set {'=None and '.join(others)}=None as well."
            )


def _is_same(first: Any, second: Any) -> bool:
    return bool(_plain(first) == _plain(second))


def _plain(value: Any) -> Any:
    """A config's value as JSON would have it: lists instead of arrays, tensors and tuples, text as keys."""
    if hasattr(value, "tolist"):
        if math.prod(value.shape) > MAX_TRAIN_TIMESTEPS:  # refused by its description; a list would fill the memory
            return describe(value)
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, (list, tuple)) else value
