"""Flags of openai/improved-diffusion and guided-diffusion, translated to our options, with a row for every flag.

Both save a ``state_dict`` only; the network's architecture is in their command line. CompVis' UNetModel is based on
theirs. The two differ in defaults: improved-diffusion passes ``1000 t / T`` to the network.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffusers_ddpm_ext.compvis.schema import ConfigRow, Fate, one_line
from diffusers_ddpm_ext.utils.input_files import read_json_object

OpenAIFamily = Literal["improved", "guided"]
OPENAI_FAMILIES: tuple[OpenAIFamily, ...] = get_args(OpenAIFamily)
IMAGENET_CLASSES = 1000
SHARED_DEFAULTS: dict[str, Any] = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "attention_resolutions": "16,8", "dropout": 0.0, "learn_sigma": False, "class_cond": False,
    "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "", "use_kl": False,
    "predict_xstart": False, "use_checkpoint": False, "use_scale_shift_norm": True,
}  # fmt: skip
FAMILY_DEFAULTS: dict[OpenAIFamily, dict[str, Any]] = {
    "improved": {"sigma_small": False, "rescale_timesteps": True, "rescale_learned_sigmas": True},
    "guided": {
        "num_head_channels": -1, "channel_mult": "", "resblock_updown": False, "use_fp16": False,
        "use_new_attention_order": False, "rescale_timesteps": False, "rescale_learned_sigmas": False,
    },
}  # fmt: skip
# Flags that only one of the two has, and that identify it.
FAMILY_FLAGS: dict[OpenAIFamily, tuple[str, ...]] = {
    "improved": ("sigma_small",),
    "guided": tuple(name for name in FAMILY_DEFAULTS["guided"] if "rescale" not in name),
}
DEFAULT_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
FLAG_NOTES: dict[str, tuple[Fate, str]] = {
    "image_size": ("translated", "sample_size"),
    "num_channels": ("translated", "block_out_channels"),
    "num_res_blocks": ("translated", "layers_per_block"),
    "num_heads": ("translated", "attention_head_dim, or num_attention_heads of a UNet2DExtModel"),
    "num_heads_upsample": ("translated", "num_attention_heads_up of a UNet2DExtModel"),
    "num_head_channels": ("translated", "attention_head_dim"),
    "attention_resolutions": ("translated", "block types; in pixels there"),
    "channel_mult": ("translated", "block_out_channels"),
    "dropout": ("translated", "dropout"),
    "learn_sigma": ("translated", "variance_type learned_range, twice the output channels"),
    "sigma_small": ("translated", "variance_type fixed_small, else fixed_large"),
    "class_cond": ("translated", "conditioning_key adm: class_labels"),
    "diffusion_steps": ("translated", "num_train_timesteps"),
    "noise_schedule": ("translated", "beta_schedule, beta_start, beta_end"),
    "predict_xstart": ("translated", "prediction_type sample"),
    "rescale_timesteps": ("translated", "timestep_scale of a UNet2DExtModel, if T is not 1000"),
    "use_scale_shift_norm": ("translated", "resnet_time_scale_shift"),
    "resblock_updown": ("translated", "block types"),
    "use_new_attention_order": ("translated", "order of the heads' weights"),
    "timestep_respacing": ("without effect", "pipe(num_inference_steps=...) chooses the steps"),
    "use_kl": ("without effect", "the loss of training"),
    "rescale_learned_sigmas": ("without effect", "the loss of training"),
    "use_checkpoint": ("without effect", "pipeline.unet.enable_gradient_checkpointing()"),
    "use_fp16": ("without effect", "weights are float32; load with torch_dtype=torch.float16"),
}
REFUSED_FLAGS = {
    "large_size": "a super-resolution model, whose input is the small image: not supported yet",
    "small_size": "a super-resolution model, whose input is the small image: not supported yet",
    "classifier": "a flag of a classifier, which is not a diffusion model",
}


@dataclass(frozen=True)
class OpenAIConfig:
    """Translated flags.

    Attributes:
        family: ``improved`` or ``guided``.
        unet_params: keyword arguments of UNetModel.
        timestep_scale: factor applied to the timestep before the network gets it.
        schedule: keyword arguments of `DDPMExtScheduler`.
        class_cond: whether the network takes class labels.
        rows: one per flag.
    """

    family: OpenAIFamily
    unet_params: dict[str, Any]
    timestep_scale: float
    schedule: dict[str, Any]
    class_cond: bool
    rows: tuple[ConfigRow, ...]


def read_flags(
    source: str | os.PathLike[str] | Mapping[str, Any],
    family: str = "auto",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> OpenAIConfig:
    """Translate the flags of a model and its diffusion.

    Args:
        source: a JSON object of flags, or a file with one; missing flags have the family's defaults. ``"family"`` may
            be one of them.
        family: ``improved``, ``guided``, or ``auto``: identified by a flag that only one of them has.
        shapes: of the checkpoint's tensors, by their keys: the channels, and ``learn_sigma`` where it is no flag, are
            read off them. Without them there are 3 channels.

    Raises:
        ValueError: a flag is unknown or cannot be expressed, or the family is ambiguous; the message names the flag.
    """
    given = dict(source if isinstance(source, Mapping) else read_json_object(source).content)
    family = _identify_family(given, given.pop("family", family))
    defaults = SHARED_DEFAULTS | FAMILY_DEFAULTS[family]
    channels = _pop_channels(given)
    for name in given:
        why = REFUSED_FLAGS.get(name, REFUSED_FLAGS["classifier"] if name.startswith("classifier_") else None)
        if why is not None:
            raise ValueError(f"{name} {one_line(given[name])} is not supported: {why}.")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{family}-diffusion has no such flag."
            raise ValueError(f"{one_line(name)} is not a flag of the model or its diffusion: {hint}")
    flags = defaults | {name: _parse_flag(name, value, defaults[name]) for name, value in given.items()}
    channels = _read_channels(channels, flags, "learn_sigma" in given, shapes or {})
    rows = tuple(ConfigRow(name, value, *FLAG_NOTES[name]) for name, value in flags.items())
    steps = flags["diffusion_steps"]
    if steps < 1:
        raise ValueError(f"diffusion_steps {steps} must be 1 or more.")
    scale = 1000.0 / steps if flags["rescale_timesteps"] else 1.0
    return OpenAIConfig(
        family, _unet_params(flags) | channels, scale, _schedule_config(flags), flags["class_cond"], rows
    )


def _pop_channels(given: dict[str, Any]) -> dict[str, int]:
    """Take the channels, flags of forks, out of the flags."""
    channels: dict[str, int] = {name: given.pop(name) for name in ("in_channels", "out_channels") if name in given}
    for name, value in channels.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} {one_line(repr(value))} must be a whole number from 1.")
    return channels


def _read_channels(
    given: Mapping[str, int], flags: dict[str, Any], told: bool, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Channels of the network, from its weights; sets ``learn_sigma`` in the flags unless it was told.

    Raises:
        ValueError: the weights have other channels than the flags, or the network's input is more than an image.
    """
    first, last = shapes.get("input_blocks.0.0.weight", ()), shapes.get("out.2.bias", ())
    inputs = first[1] if len(first) == 4 else given.get("in_channels", 3)
    learned = 2 * inputs if flags["learn_sigma"] else inputs
    outputs = last[0] if len(last) == 1 else given.get("out_channels", learned)
    for name, value in (("in_channels", inputs), ("out_channels", outputs)):
        if given.get(name, value) != value:
            raise ValueError(f"{name} is {given[name]}, but the weights have {value}: leave it out.")
    if not told:
        flags["learn_sigma"] = outputs == 2 * inputs
        learned = 2 * inputs if flags["learn_sigma"] else inputs
    if outputs != learned:
        raise ValueError(
            f"The network has {inputs} input and {outputs} output channels, which does not fit learn_sigma "
            f"{str(flags['learn_sigma']).lower()}: a fork joins its condition to the image, or the flag is wrong."
        )
    return {"in_channels": inputs, "out_channels": outputs}


def _identify_family(given: Mapping[str, Any], family: Any) -> OpenAIFamily:
    for name in OPENAI_FAMILIES:
        if family == name:
            return name
    if family != "auto":
        raise ValueError(f"family {one_line(repr(family))} is not one of {', '.join(OPENAI_FAMILIES)}, auto.")
    matches = [name for name in OPENAI_FAMILIES if any(flag in given for flag in FAMILY_FLAGS[name])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        flags = [flag for name in OPENAI_FAMILIES for flag in FAMILY_FLAGS[name] if flag in given]
        raise ValueError(f'{" and ".join(flags)} are flags of different families: add "family".')
    if "rescale_timesteps" in given or given.get("diffusion_steps", 1000) == 1000:
        return "improved"  # the other defaults are the same
    raise ValueError(
        "These flags may belong to improved-diffusion or guided-diffusion, whose rescale_timesteps differ: add "
        '"family": "improved" or "guided".'
    )


def _parse_flag(name: str, value: Any, default: Any) -> Any:
    """A flag's value, of its default's type; text as on a command line is parsed."""
    if isinstance(default, bool):
        word = str(value).lower()
        if word not in ("true", "false", "1", "0"):
            raise ValueError(f"{name} {one_line(repr(value))} must be true or false.")
        return word in ("true", "1")
    if name in ("attention_resolutions", "channel_mult", "timestep_respacing"):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if name == "noise_schedule":
        if value not in ("linear", "cosine"):
            raise ValueError(f"noise_schedule {one_line(repr(value))} is not one of linear, cosine.")
        return value
    try:
        return type(default)(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} {one_line(repr(value))} must be a number.") from None


def _parse_numbers(name: str, text: str) -> list[float]:
    try:
        numbers = [float(part) if "." in part else int(part) for part in text.split(",")]
        if not all(0 < number < 2**31 for number in numbers):
            raise ValueError
        return numbers
    except ValueError:
        raise ValueError(f"{name} {one_line(text)!r} must be numbers above 0, separated by commas.") from None


def _unet_params(flags: Mapping[str, Any]) -> dict[str, Any]:
    size = flags["image_size"]
    text = flags.get("channel_mult", "")
    mult = _parse_numbers("channel_mult", text) if text else list(DEFAULT_CHANNEL_MULT.get(size, ()))
    if not mult:
        raise ValueError(f"image_size {size} has no default channel_mult: set channel_mult.")
    pixels = _parse_numbers("attention_resolutions", flags["attention_resolutions"])
    if any(number < 1 for number in pixels):
        raise ValueError(
            f"attention_resolutions {one_line(flags['attention_resolutions'])!r} must be 1 pixel or more."
        )
    return {
        "image_size": size,
        "model_channels": flags["num_channels"],
        "num_res_blocks": flags["num_res_blocks"],
        "attention_resolutions": sorted({size // int(number) for number in pixels}),
        "dropout": flags["dropout"],
        "channel_mult": mult,
        "num_classes": IMAGENET_CLASSES if flags["class_cond"] else None,
        "num_heads": flags["num_heads"],
        "num_head_channels": flags.get("num_head_channels", -1),
        "num_heads_upsample": flags["num_heads_upsample"],
        "use_scale_shift_norm": flags["use_scale_shift_norm"],
        "resblock_updown": flags.get("resblock_updown", False),
        "use_new_attention_order": flags.get("use_new_attention_order", False),
    }


def _schedule_config(flags: Mapping[str, Any]) -> dict[str, Any]:
    steps = flags["diffusion_steps"]
    fixed = "fixed_small" if flags.get("sigma_small") else "fixed_large"
    schedule: dict[str, Any] = {
        "num_train_timesteps": steps,
        "variance_type": "learned_range" if flags["learn_sigma"] else fixed,
        "prediction_type": "sample" if flags["predict_xstart"] else "epsilon",
        "clip_sample": True,
    }
    if flags["noise_schedule"] == "cosine":
        return schedule | {"beta_schedule": "squaredcos_cap_v2"}
    scale = 1000 / steps
    return schedule | {"beta_schedule": "linear", "beta_start": scale * 0.0001, "beta_end": scale * 0.02}
