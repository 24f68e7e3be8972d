"""Allowed values of an original configuration, checked before anything is built, and rows that report on its keys."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffusers_ddpm_ext.utils import lr_lambdas
from diffusers_ddpm_ext.utils.network_budget import MAX_CLASSES, MAX_LAYERS, MAX_LEVELS, MAX_WIDTH

EXPONENT_FLOAT = re.compile(r"[-+]?\d+[eE][-+]?\d+")  # plain YAML reads 1e-6 as text
REPORT_FILE = "conversion.json"
# Facts in it, besides the network's arguments: what the way back needs.
FIXED_LOGVAR = "fixed_logvar"  # a logvar that a class saves without learning it
FIRST_STAGE_SECTION = "first_stage_config"
CONDITION_STAGE = "cond_stage"  # the target of the conditioning stage
CONDITIONERS = "conditioners"  # section and layout of each conditioning stage that is converted, by section
MODEL_CLASS = "model_class"  # target and own parameters of a class other than LatentDiffusion and its base class
SCALE_FACTOR_BUFFER = "scale_factor_buffer"  # whether the file had the factor, not only the configuration
COMPVIS_EMA_DECAY = 0.9999
REFERENCE = "${"  # OmegaConf's reference to another key
REFERENCE_ERROR = "refers to another key, whose value is not in this file: give the value itself."

Fate = Literal["translated", "without effect", "refused"]


@dataclass(frozen=True)
class ConfigRow:
    """One key of a configuration. The fields' names are keys of ``conversion.json``.

    Attributes:
        key: dotted, as in the file.
        value: as in the file.
        fate: whether it is translated, has no effect here, or is refused.
        note: its counterpart here, or the reason.
    """

    key: str
    value: Any
    fate: Fate
    note: str

    def cells(self) -> tuple[str, str, str, str]:
        """The row as text for a table, its value shortened."""
        return self.key, " ".join(str(self.value).split())[:40], self.fate, self.note


@dataclass(frozen=True)
class ValueType:
    """A set of allowed values.

    Attributes:
        description: for an error message.
        allows: whether a value is allowed.
    """

    description: str
    allows: Callable[[Any], bool]

    def __or__(self, other: ValueType) -> ValueType:
        """Values of either type."""
        return ValueType(
            f"{self.description} or {other.description}", lambda value: self.allows(value) or other.allows(value)
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


MAX_NUMBER = 1e300


def number(low: float = -math.inf, high: float = math.inf, *, exclusive: bool = False) -> ValueType:
    """Finite numbers from ``low`` to ``high``, without the two if ``exclusive``."""
    description = "a finite number"
    if low > -math.inf:
        description = f"a number {'above' if exclusive else 'from'} {low:g}"
    if high < math.inf:
        description += f" {'and below' if exclusive else 'to'} {high:g}"

    def allows(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if abs(value) > MAX_NUMBER or value != value:  # a huge integer has no float
            return False
        return low < value < high if exclusive else low <= value <= high

    return ValueType(description, allows)


def list_of(items: ValueType, description: str, *, allow_empty: bool = False) -> ValueType:
    """Lists of a type."""

    def allows(value: Any) -> bool:
        return isinstance(value, list | tuple) and (allow_empty or bool(value)) and all(map(items.allows, value))

    return ValueType(f"a list of {description}", allows)


NULL = ValueType("nothing", lambda value: value is None)
TEXT = ValueType("text", lambda value: isinstance(value, str))
BOOLEAN = ValueType("true or false", lambda value: value is None or isinstance(value, bool) or value in (0, 1))
POSITIVE_INT = ValueType("a whole number from 1", lambda value: _is_integer(value) and value >= 1)
POSITIVE_INTS = list_of(POSITIVE_INT, "whole numbers")


def whole(high: int) -> ValueType:
    """Whole numbers from 1 to ``high``: a network of more takes too long, or more memory than any machine has."""
    return ValueType(f"a whole number from 1 to {high:,}", lambda value: _is_integer(value) and 1 <= value <= high)


def wholes(high: int, most: int = MAX_LEVELS) -> ValueType:
    """Lists of up to ``most`` of them."""
    entries = list_of(whole(high), "")
    return ValueType(f"a list of up to {most} of them", lambda value: entries.allows(value) and len(value) <= most)


WIDTH, LAYERS = whole(MAX_WIDTH), whole(MAX_LAYERS)
HEAD_COUNT = ValueType("a whole number from 1, or -1", lambda value: _is_integer(value) and (value == -1 or value > 0))
IMAGE_SIZE = WIDTH | ValueType("height and width", lambda value: wholes(MAX_WIDTH).allows(value) and len(value) == 2)
MULTIPLIERS = ValueType(
    f"a list of up to {MAX_LEVELS} numbers above 0",
    lambda value: list_of(number(0, exclusive=True), "").allows(value) and len(value) <= MAX_LEVELS,
)
BETA_RANGE = number(0, 1, exclusive=True)
BETA_LIST = ValueType(
    "a list of betas", lambda value: isinstance(value, np.ndarray) or list_of(number(), "").allows(value)
)

UNET_PARAM_TYPES: dict[str, ValueType] = {
    "image_size": IMAGE_SIZE | NULL,
    "in_channels": WIDTH,
    "model_channels": WIDTH,
    "out_channels": WIDTH,
    "num_res_blocks": LAYERS | wholes(MAX_LAYERS),
    "attention_resolutions": list_of(POSITIVE_INT, "whole numbers", allow_empty=True),
    "dropout": number(0, 1),
    "channel_mult": MULTIPLIERS,
    "num_classes": whole(MAX_CLASSES) | TEXT | NULL,
    "num_heads": HEAD_COUNT,
    "num_head_channels": HEAD_COUNT,
    "num_heads_upsample": HEAD_COUNT,
    "transformer_depth": LAYERS | wholes(MAX_LAYERS),
    "context_dim": WIDTH | wholes(MAX_WIDTH) | NULL,
    "disable_self_attentions": list_of(BOOLEAN, "true and false") | NULL,
    "adm_in_channels": WIDTH | NULL,
    **dict.fromkeys(
        ("conv_resample", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order", "legacy",
         "use_spatial_transformer", "use_linear_in_transformer", "use_checkpoint", "use_fp16", "use_bf16"),
        BOOLEAN,
    ),
}  # fmt: skip
MODEL_PARAM_TYPES: dict[str, ValueType] = {
    "timesteps": POSITIVE_INT,
    "linear_start": BETA_RANGE,
    "linear_end": BETA_RANGE,
    "cosine_s": number(0, exclusive=True),
    "given_betas": BETA_LIST | NULL,
    "v_posterior": number(0, 1),
    "l_simple_weight": number(0),
    "original_elbo_weight": number(0),
    "logvar_init": number(),
    "scale_factor": number(0, exclusive=True),
    "image_size": IMAGE_SIZE,
    "channels": POSITIVE_INT,
    "beta_schedule": TEXT,
    "parameterization": TEXT,
    "loss_type": TEXT,
    "conditioning_key": TEXT | NULL,
    "ckpt_path": TEXT | NULL,
    "ignore_keys": list_of(TEXT, "names", allow_empty=True) | NULL,
    **dict.fromkeys(
        ("clip_denoised", "use_ema", "learn_logvar", "concat_mode", "force_null_conditioning", "load_only_unet",
         "make_it_fit", "reset_ema", "reset_num_ema_updates", "scale_by_std", "use_positional_encodings"),
        BOOLEAN,
    ),
}  # fmt: skip
# Parameters that only concern training: not checked where a checkpoint is converted.
TRAINING_PARAMS = (
    "loss_type", "l_simple_weight", "original_elbo_weight", "ckpt_path", "ignore_keys", "load_only_unet",
    "make_it_fit", "reset_ema", "reset_num_ema_updates",
)  # fmt: skip
LEARNING_RATE_TYPES = {"base_learning_rate": number(0, exclusive=True), "scale_lr": BOOLEAN}
UCG_TYPES = {"p": number(0, 1), "val": number() | TEXT | NULL}


def check_values(values: Mapping[str, Any], types: Mapping[str, ValueType], prefix: str = "") -> dict[str, Any]:
    """Refuse values of a wrong type, and return them with text such as 1e-6 converted to float.

    Names without a type are not checked; ``prefix`` stands before the names in an error message.

    Raises:
        ValueError: the first value that is not allowed, with its name and what is allowed.
    """
    checked = dict(values)
    for name in types.keys() & values.keys():
        value = values[name]
        if not types[name].allows(value) and isinstance(value, str) and EXPONENT_FLOAT.fullmatch(value):
            checked[name] = float(value)
    for name, allowed in types.items():
        if name in checked and not allowed.allows(checked[name]):
            if isinstance(checked[name], str) and REFERENCE in checked[name]:
                raise ValueError(f"{prefix}{name} {one_line(checked[name])!r} {REFERENCE_ERROR}")
            raise ValueError(f"{prefix}{name} takes {allowed.description}, got {one_line(repr(checked[name]))}.")
    return checked


def check_lr_lambda(name: str, arguments: Mapping[str, Any], key: str) -> None:
    """Refuse arguments, of a key of the configuration, that a class of learning-rate lambdas does not take.

    Raises:
        ValueError: one is missing, unknown, or not allowed; the message names it.
    """
    lr_lambda = getattr(lr_lambdas, name)
    parameters = inspect.signature(lr_lambda).parameters
    for argument in arguments:
        if argument not in parameters:
            raise ValueError(f"{key}.{argument} is not an argument of {name}, which takes {', '.join(parameters)}.")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise ValueError(f"{key} lacks {', '.join(missing)} of {name}.")
    try:
        lr_lambda(**arguments)
    except ValueError as error:
        raise ValueError(f"{key}: {one_line(error, 200)}") from None


def one_line(value: Any, max_length: int = 60) -> str:
    """A value as one line of printable characters, shortened."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


def listed(names: list[str], most: int = 8) -> str:
    """Names separated by commas; of many names the first and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name, 200) for name in names[:most]) + more
