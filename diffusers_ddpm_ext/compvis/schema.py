"""What a setting of an original configuration may hold, so that a wrong one is a sentence before anything is built."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffusers_ddpm_ext.utils import lr_lambdas

POWER = re.compile(r"[-+]?\d+[eE][-+]?\d+")  # which plain YAML takes for text


Fate = Literal["translated", "without effect", "refused"]


@dataclass(frozen=True)
class Row:
    """One key of a file.

    Attributes:
        key: dotted, as it stands in the file.
        value: as it stands in the file.
        fate: what became of it.
        note: what it is here, or why it is nothing.
    """

    key: str
    value: Any
    fate: Fate
    note: str


@dataclass(frozen=True)
class Kind:
    """Values of one sort.

    Attributes:
        words: what they are, for an error.
        fits: whether a value is one.
    """

    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        """Either of the two."""
        return Kind(f"{self.words} or {other.words}", lambda value: self.fits(value) or other.fits(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(low: int) -> Kind:
    """Whole numbers from ``low``."""
    return Kind(f"a whole number from {low}", lambda value: _is_whole(value) and value >= low)


def number(low: float = -math.inf, high: float = math.inf, *, open_ends: bool = False) -> Kind:
    """Finite numbers in a range, whose ends do not count where they are open."""
    words = "a finite number"
    if low > -math.inf:
        words = f"a number {'above' if open_ends else 'from'} {low:g}"
    if high < math.inf:
        words += f" {'and below' if open_ends else 'to'} {high:g}"

    def fits(value: Any) -> bool:
        return _is_number(value) and (low < value < high if open_ends else low <= value <= high)

    return Kind(words, fits)


def several(kind: Kind, what: str) -> Kind:
    """Lists of at least one, each of a kind."""
    return Kind(f"a list of {what}", lambda v: isinstance(v, list | tuple) and bool(v) and all(map(kind.fits, v)))


NOTHING = Kind("nothing", lambda value: value is None)
TEXT = Kind("text", lambda value: isinstance(value, str))
SWITCH = Kind("true or false", lambda value: value is None or isinstance(value, bool) or value in (0, 1))
COUNT = whole(1)
COUNTS = several(COUNT, "whole numbers")
HEADS = Kind("a whole number from 1, or -1", lambda value: _is_whole(value) and (value == -1 or value > 0))
SIZE = COUNT | Kind("height and width", lambda value: COUNTS.fits(value) and len(value) == 2)
BETA = number(0, 1, open_ends=True)
BETAS = Kind(
    "a list of betas",
    lambda value: isinstance(value, np.ndarray) or several(number(), "").fits(value),
)
NAMES = Kind("a list of names", lambda value: isinstance(value, list | tuple) and all(map(TEXT.fits, value)))

NETWORK: dict[str, Kind] = {
    "image_size": SIZE | NOTHING,
    "in_channels": COUNT,
    "model_channels": COUNT,
    "out_channels": COUNT,
    "num_res_blocks": COUNT | COUNTS,
    "attention_resolutions": Kind(
        "a list of whole numbers", lambda value: isinstance(value, list | tuple) and all(map(COUNT.fits, value))
    ),
    "dropout": number(0, 1),
    "channel_mult": several(number(0, open_ends=True), "numbers above 0"),
    "num_classes": COUNT | TEXT | NOTHING,
    "num_heads": HEADS,
    "num_head_channels": HEADS,
    "num_heads_upsample": HEADS,
    "transformer_depth": COUNT | COUNTS,
    "context_dim": COUNT | COUNTS | NOTHING,
    "disable_self_attentions": several(SWITCH, "true and false") | NOTHING,
    "adm_in_channels": COUNT | NOTHING,
    **dict.fromkeys(
        ("conv_resample", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order", "legacy",
         "use_spatial_transformer", "use_linear_in_transformer", "use_checkpoint", "use_fp16", "use_bf16"),
        SWITCH,
    ),
}  # fmt: skip
MODEL: dict[str, Kind] = {
    "timesteps": COUNT,
    "linear_start": BETA,
    "linear_end": BETA,
    "cosine_s": number(0, open_ends=True),
    "given_betas": BETAS | NOTHING,
    "v_posterior": number(0, 1),
    "l_simple_weight": number(0),
    "original_elbo_weight": number(0),
    "logvar_init": number(),
    "scale_factor": number(0, open_ends=True),
    "image_size": SIZE,
    "channels": COUNT,
    "beta_schedule": TEXT,
    "parameterization": TEXT,
    "loss_type": TEXT,
    "conditioning_key": TEXT | NOTHING,
    "ckpt_path": TEXT | NOTHING,
    "ignore_keys": NAMES | NOTHING,
    **dict.fromkeys(
        ("clip_denoised", "use_ema", "learn_logvar", "concat_mode", "force_null_conditioning", "load_only_unet",
         "make_it_fit", "reset_ema", "reset_num_ema_updates", "use_positional_encodings"),
        SWITCH,
    ),
}  # fmt: skip


RATE = {"base_learning_rate": number(0, open_ends=True), "scale_lr": SWITCH}
DROPOUT = {"p": number(0, 1), "val": number() | TEXT | NOTHING}


def checked(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str = "") -> dict[str, Any]:
    """Refuse values of another kind.

    Args:
        values: by name; names that have no kind are let through.
        kinds: what each may be.
        where: what stands before the names in an error.

    Returns:
        The values; a number such as 1e-6, which plain YAML takes for text, as the number it is.

    Raises:
        ValueError: the first that does not fit, by name, with what it takes.
    """
    made = dict(values)
    for name in kinds.keys() & values.keys():
        value = values[name]
        if not kinds[name].fits(value) and isinstance(value, str) and POWER.fullmatch(value):
            made[name] = float(value)
    for name, kind in kinds.items():
        if name in made and not kind.fits(made[name]):
            raise ValueError(f"{where}{name} takes {kind.words}, got {short(repr(made[name]))}.")
    return made


def check_course(name: str, given: Mapping[str, Any], where: str) -> None:
    """Refuse arguments that a learning-rate lambda does not take.

    Args:
        name: its class.
        given: keyword arguments.
        where: the key that they stand under.

    Raises:
        ValueError: one is missing, unknown, or no such number; it is named.
    """
    course = getattr(lr_lambdas, name)
    takes = inspect.signature(course).parameters
    for key in given:
        if key not in takes:
            raise ValueError(f"{where}.{key} is not taken by {name}, which takes {', '.join(takes)}.")
    missing = [key for key, argument in takes.items() if argument.default is argument.empty and key not in given]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)} of {name}.")
    try:
        course(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {short(error, 200)}") from None


def short(value: Any, most: int = 60) -> str:
    """A value on one line of printable characters."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))
    return text if len(text) <= most else text[: most - 3] + "..."
