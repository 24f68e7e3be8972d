"""FrozenCLIPEmbedder: transformers' `CLIPTextModel`, whose names it has.

transformer.text_model.X     X, or text_model.X, as the release of transformers has it; written here as it was
position_ids                 counts from 0: in files of older releases, not part of the module

A file does not tell the number of heads, nor the activation: they follow from ``version``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.conditioner.kinds import (
    Argument,
    ConditionerKind,
    ConditionerPlan,
    TokenizerRule,
    unused,
)
from diffusers_ddpm_ext.compvis.conditioner.sizes import (
    LENGTH,
    count_layers,
    folder_config,
    head_count,
    one_of,
    size_of,
)
from diffusers_ddpm_ext.compvis.key_map import TensorMapping
from diffusers_ddpm_ext.compvis.schema import BOOLEAN, NULL, TEXT, ValueType, one_line
from diffusers_ddpm_ext.models.text_encoder_loading import transformers_class
from diffusers_ddpm_ext.utils.wrappers import plain_state_dict, unwrap

PREFIX, INNER = "transformer.", "text_model."
TOKENS = "embeddings.token_embedding.weight"
POSITIONS = "embeddings.position_ids"
POSITION_TYPES = ("int64", "int32", "float32", "float16", "bfloat16", "float64")
# Width and layers of released encoders, against which a file is checked.
RELEASED = {
    "openai/clip-vit-large-patch14": (768, 12),
    "openai/clip-vit-large-patch14-336": (768, 12),
    "openai/clip-vit-base-patch32": (512, 12),
    "openai/clip-vit-base-patch16": (512, 12),
}
LARGE = {"width": 768, "layers": 12, "activation": "quick_gelu"}  # the first of them, Stable Diffusion's
RELEASED_WIDTHS = (256, 384, 512, 640, 768, 1024, 1280)  # of OpenAI's and open_clip's, with 64 channels per head
HEADS_KEY = "text_heads (--text_heads)"
# Keys beside the arguments: what the caller says, and a config.json beside the tokenizer.
TEXT_HEADS, TEXT_CONFIG = "text_heads", "text_config"
LAYERS = ("last", "pooled", "hidden")


def text_config(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `CLIPTextConfig`: sizes of the tensors, by the names of `CLIPTextModel`, and what is known.

    Raises:
        ValueError: a tensor is missing or has no such shape, or the number of heads is not known.
    """
    vocabulary, width = (size_of(tensors, TOKENS, axis) for axis in (0, 1))
    is_small = vocabulary < 49408  # else the class' defaults
    ends = {"bos_token_id": max(0, vocabulary - 2), "eos_token_id": vocabulary - 1, "pad_token_id": 0}
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": size_of(tensors, "encoder.layers.0.mlp.fc1.weight", 0),
        "projection_dim": width,
        "num_hidden_layers": count_layers(tensors, "encoder.layers."),
        "num_attention_heads": head_count(width, known.get("num_attention_heads"), HEADS_KEY),
        "max_position_embeddings": size_of(tensors, "embeddings.position_embedding.weight", 0),
        "hidden_act": known.get("hidden_act", "quick_gelu"),
        "layer_norm_eps": known.get("layer_norm_eps", 1e-5),
        **(ends if is_small else {}),
    }


def build_text_model(config: Mapping[str, Any]) -> nn.Module:
    """transformers' `CLIPTextModel` with random weights."""
    config_class, model_class = (
        transformers_class("transformers", name) for name in ("CLIPTextConfig", "CLIPTextModel")
    )
    model: nn.Module = model_class(config_class(**config))
    return model


def fill_positions(module: nn.Module) -> None:
    """Give values to the buffers that no file has: positions, which count from 0."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, torch.arange(buffer.shape[-1]).expand(buffer.shape))


def module_shapes(build: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's tensors, by names without ``text_model.``, in its order."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def bare(name: str) -> str:
    """A name of `CLIPTextModel` as releases of transformers from 5 on have it."""
    return name.removeprefix(INNER)


def _known(params: Mapping[str, Any], width: int) -> dict[str, Any]:
    """What the version and the caller tell of an encoder, beside the shapes of its tensors."""
    activation = {"hidden_act": "gelu"} if str(params["version"]).startswith("laion/") else {}
    folder = folder_config(params["version"], "text_config")
    if folder.get("hidden_size", width) != width:
        raise ValueError(
            f"version names an encoder of width {folder['hidden_size']}, but the checkpoint's has {width}: give the "
            "configuration that belongs to it."
        )
    return activation | beside_tokenizer(params, width) | folder | heads_of(params)


def beside_tokenizer(params: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A ``config.json`` beside the tokenizer, if it is of an encoder of that width."""
    config = params.get(TEXT_CONFIG, {})
    return dict(config) if config.get("hidden_size") == width else {}


def heads_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The number of heads that the caller gives."""
    return {} if params.get(TEXT_HEADS) is None else {"num_attention_heads": params[TEXT_HEADS]}


def heads_notes(config: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[str, ...]:
    """A note where the number of heads is assumed, and no released text encoder has that width."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if "num_attention_heads" in known or width in RELEASED_WIDTHS:
        return ()
    return (
        f"No file tells the number of attention heads of the text encoder, of width {width}: {heads} is assumed; give "
        f"another with {HEADS_KEY}.",
    )


def _plan(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConditionerPlan:
    by_name = {bare(key.removeprefix(PREFIX)): key for key in tensors if key.startswith(PREFIX)}
    layout = _layout_of(tensors)
    left_out = {by_name[POSITIONS]: "positions, which count from 0"} if POSITIONS in by_name else {}
    notes = _position_notes(tensors[by_name[POSITIONS]]) if left_out else ()
    start = PREFIX + (INNER if layout["text_model"] else "")
    own = {name: tensors[key] for name, key in by_name.items()}
    known = _known(params, size_of(own, TOKENS, 1))
    config = text_config(own, known)
    _check_released(params["version"], config)
    _check_length(params["max_length"], config["max_position_embeddings"])
    mappings = tuple(
        TensorMapping(name, by_name.get(bare(name), start + bare(name)), "same", 1, shape)
        for name, shape in module_shapes(lambda: build_text_model(config)).items()
    )
    notes += heads_notes(config, known) + _activation_notes(params["version"], known)
    return ConditionerPlan(lambda: build_text_model(config), mappings, left_out, layout, fill_positions, notes)


def _layout_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whether names have ``text_model.``, and the type of the positions, if the file has them."""
    has_inner = any(key.startswith(PREFIX + INNER) for key in tensors) or not tensors
    positions = tensors.get(PREFIX + (INNER if has_inner else "") + POSITIONS)
    return {"text_model": has_inner} | (
        {} if positions is None else {"position_ids": str(positions.dtype).removeprefix("torch.")}
    )


def _position_notes(positions: Tensor) -> tuple[str, ...]:
    """A note where positions do not count from 0, as in some merges of half precision."""
    if torch.equal(positions.flatten().double(), torch.arange(positions.numel(), dtype=torch.float64)):
        return ()
    return ("The text encoder's position_ids do not count from 0, as in some merged checkpoints: here they do.",)


def _activation_notes(version: Any, known: Mapping[str, Any]) -> tuple[str, ...]:
    """A note where the activation is assumed, because the version is not known."""
    if "hidden_act" in known or str(version).startswith("openai/"):
        return ()
    return (
        f"The activation of the text encoder {one_line(version)} is not known, and OpenAI's, quick_gelu, is assumed: "
        "let version name a folder with its config.json.",
    )


def _check_released(version: Any, config: Mapping[str, Any]) -> None:
    width, layers = RELEASED.get(str(version), (None, None))
    if width == config["hidden_size"] and layers != config["num_hidden_layers"]:
        raise ValueError(
            f"The checkpoint has {config['num_hidden_layers']} layers of {version}, which has {layers}: the file is "
            "damaged."
        )


def _check_length(length: int, positions: int) -> None:
    if length > positions:
        raise ValueError(
            f"max_length {length} is more than the {positions} positions of the text encoder in the checkpoint: give "
            "the configuration that belongs to it."
        )


def _export(module: nn.Module, layout: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = PREFIX + (INNER if layout.get("text_model", True) else "")
    state = {start + bare(key): tensor.detach() for key, tensor in plain_state_dict(module).items()}
    if "position_ids" in layout:
        config: Any = unwrap(module).config
        if layout["position_ids"] not in POSITION_TYPES:
            raise ValueError(f"position_ids of the recorded layout is not one of {', '.join(POSITION_TYPES)}.")
        positions = torch.arange(config.max_position_embeddings)[None]
        state[start + POSITIONS] = positions.to(getattr(torch, layout["position_ids"]))
    return state


def _params_of(module: nn.Module, recorded: Mapping[str, Any]) -> dict[str, Any]:
    if recorded:
        return dict(recorded)
    config: Any = unwrap(module).config
    sizes = {"width": config.hidden_size, "layers": config.num_hidden_layers, "activation": config.hidden_act}
    known = next(iter(RELEASED)) if sizes == LARGE else config._name_or_path
    return {"version": known or next(iter(RELEASED)), "max_length": config.max_position_embeddings}


def _reason_to_leave_out(params: Mapping[str, Any]) -> str:
    if params["layer"] == "last":
        return ""
    what = (
        "its pooled output" if params["layer"] == "pooled" else "the hidden states of a layer, without the last norm"
    )
    return f"layer {params['layer']} takes {what}, which no text encoder of a pipeline returns"


CLIP = ConditionerKind(
    "FrozenCLIPEmbedder",
    "text_encoder",
    "CLIPTextModel",
    PREFIX,
    {
        "version": Argument("heads and activation of pipeline.text_encoder", TEXT, "openai/clip-vit-large-patch14"),
        "device": unused("pipe.to(device)"),
        "max_length": Argument("model_max_length of pipeline.tokenizer", LENGTH, 77),
        "freeze": Argument("--train_text_encoder", BOOLEAN, True),
        "layer": Argument("the output of the last layer", one_of(*LAYERS), "last"),
        "layer_idx": Argument("of layer hidden", ValueType("a whole number", lambda v: type(v) is int) | NULL),
    },
    _plan,
    _export,
    _params_of,
    _layout_of,
    _reason_to_leave_out,
    lambda params: TokenizerRule(params["max_length"]),
)
