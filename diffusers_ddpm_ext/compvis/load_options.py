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
        text_heads: number of attention heads of a CLIP text encoder, which no file tells; None: 64 channels per head.

    Raises:
        ValueError: ``weights`` or ``schedule_from`` is not one of the allowed values, or ``text_heads`` not positive.
    """

    weights: WeightChoice = "auto"
    ignore_keys: tuple[str, ...] = ()
    load_only_unet: bool = False
    schedule_from: ScheduleSource = "config"
    text_heads: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("weights", get_args(WeightChoice)), ("schedule_from", get_args(ScheduleSource))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if self.text_heads is not None and (type(self.text_heads) is not int or self.text_heads < 1):
            raise ValueError(f"text_heads is {self.text_heads!r}; it must be a whole number from 1.")
