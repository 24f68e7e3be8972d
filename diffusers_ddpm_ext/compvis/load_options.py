"""Options of loading an original checkpoint. Imports nothing heavy, so that the command line can use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

WeightSet = Literal["ema", "raw"]
WeightChoice = Literal["auto", "ema", "raw"]
ScheduleSource = Literal["config", "checkpoint"]


@dataclass(frozen=True)
class LoadOptions:
    """How to load a checkpoint; the arguments of `load_compvis`.

    Attributes:
        weights: ``raw``, ``ema``, or ``auto``: EMA if the file has it, else raw.
        ignore_keys: prefixes of keys in the file that are left out.
        load_only_unet: load the network only, without logvar.
        schedule_from: whose schedule to use if the file's differs from the configuration's.

    Raises:
        ValueError: ``weights`` or ``schedule_from`` is not one of the allowed values.
    """

    weights: WeightChoice = "auto"
    ignore_keys: tuple[str, ...] = ()
    load_only_unet: bool = False
    schedule_from: ScheduleSource = "config"

    def __post_init__(self) -> None:
        for name, allowed in (("weights", get_args(WeightChoice)), ("schedule_from", get_args(ScheduleSource))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
