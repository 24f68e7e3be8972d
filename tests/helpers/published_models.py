"""The released latent models at tiny width, with weights that are a function of their keys."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.first_stage.architecture import FirstStageConfig, read_first_stage
from diffusers_ddpm_ext.compvis.first_stage.weights import export_first_stage
from diffusers_ddpm_ext.compvis.weights import export_unet
from helpers.paths import GOLDEN

STEPS, SEED, WIDTH, CONTEXT, BATCH = 6, 3, 32, 16, 2
VOCABULARY, POSITIONS, EMBEDDING = 64, 7, 24
"""Tokens of a text encoder's table, its positions, and the width of an image's embedding."""
FOLDER = GOLDEN / "latent_models"


def facts() -> dict[str, Any]:
    """Name of a released model to its configuration at tiny width."""
    loaded: dict[str, Any] = json.loads((FOLDER / "models.json").read_text())
    return loaded


def stage_shapes() -> dict[str, Any]:
    """Name of a released model to the shapes of its conditioning stages' tensors, by their keys in a checkpoint."""
    loaded: dict[str, Any] = json.loads((FOLDER / "stages.json").read_text())
    return loaded


def first_stages() -> dict[str, Any]:
    """Name of a first stage to its configuration, the keys of its class, and recorded numbers."""
    loaded: dict[str, Any] = json.loads((FOLDER / "first_stages.json").read_text())
    return loaded


def tiny(content: Mapping[str, Any]) -> dict[str, Any]:
    """A published configuration with narrow networks, small images, few steps; everything else as it is."""
    content = {"model": copy.deepcopy(content["model"])}
    params = content["model"]["params"]
    unet = params["unet_config"]["params"]
    size = max(8, 2 ** (len(unet["channel_mult"]) - 1))
    params |= {"timesteps": STEPS, "image_size": size}
    for name in ("monitor", "scheduler_config", "loss_type", "ckpt_path"):
        params.pop(name, None)
    unet |= {"model_channels": WIDTH, "num_res_blocks": 1, "image_size": size, "use_checkpoint": False}
    unet |= {name: False for name in ("use_fp16", "use_bf16") if name in unet}
    if "context_dim" in unet:
        unet["context_dim"] = CONTEXT
    if unet.get("num_head_channels", 0) > WIDTH:
        unet["num_head_channels"] = WIDTH
    if "adm_in_channels" in unet:
        unet["adm_in_channels"] = 2 * EMBEDDING
    tiny_first_stage(params["first_stage_config"])
    for name in ("cond_stage_config", "embedder_config", "noise_aug_config", "low_scale_config"):
        if isinstance(params.get(name), dict):
            tiny_stage(params[name])
    if "depth_stage_config" in params:  # the depth itself is given
        params["depth_stage_config"] = {"target": "torch.nn.Identity"}
    return content


TINY_ARGUMENTS: dict[str, dict[str, Any]] = {
    "ClassEmbedder": {"embed_dim": CONTEXT, "n_classes": 11},
    "BERTEmbedder": {"n_embed": CONTEXT, "n_layer": 2, "vocab_size": VOCABULARY, "max_seq_len": POSITIONS},
    "FrozenOpenCLIPEmbedder": {"device": "cpu"},
    "FrozenCLIPEmbedder": {"max_length": POSITIONS},
    "CLIPEmbeddingNoiseAugmentation": {"timestep_dim": EMBEDDING, "clip_stats_path": None},
}


def tiny_stage(section: dict[str, Any]) -> None:
    """A conditioning stage at tiny width; changed in place."""
    arguments = TINY_ARGUMENTS.get(section["target"].rpartition(".")[2])
    if arguments is not None:
        section["params"] = dict(section.get("params") or {}) | arguments


def tiny_first_stage(section: dict[str, Any], full_width: bool = False) -> dict[str, Any]:
    """The configuration of a first stage, narrow unless ``full_width``; changed in place."""
    section["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    for name in ("monitor", "ckpt_path"):
        section["params"].pop(name, None)
    if section["params"]["ddconfig"].get("attn_type") == "vanilla-xformers":  # the same function, on a GPU
        section["params"]["ddconfig"]["attn_type"] = "vanilla"
    if not full_width:
        section["params"]["ddconfig"] |= {"ch": WIDTH, "num_res_blocks": 1}
    return section


def first_stage_inputs(config: FirstStageConfig) -> Tensor:
    """Images for a first stage, of 4x4 latents."""
    side = 4 * 2 ** (len(config.ddconfig["ch_mult"]) - 1)
    shape = (BATCH, config.ddconfig["in_channels"], side, side)
    return torch.rand(shape, generator=torch.Generator().manual_seed(SEED)) * 2 - 1


def samples_of(tensor: Tensor, count: int = 24) -> list[float]:
    """Some numbers of a tensor, from its start to its end."""
    flat = tensor.flatten().double()
    return [round(float(flat[index]), 12) for index in torch.linspace(0, len(flat) - 1, count).long()]


def some_pixels(images: Tensor) -> Tensor:
    """Every third row and column of images, to record."""
    return images[..., ::3, ::3]


def seeded_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """A weight as a function of its key, about as large as an initial one."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(key.encode()).hexdigest()[:12], 16))
    noise = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 0.1 * noise + float(key.endswith("weight"))
    return noise if "embedding" in key else noise / float(torch.Size(shape[1:]).numel()) ** 0.5


def digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """sha256 of keys and shapes."""
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def seeded_state(content: Mapping[str, Any], stages: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
    """The tensors of a whole model, named by our export, with seeded values; without tables of the schedule.

    Args:
        content: of its configuration.
        stages: shapes of further tensors by their keys.
    """
    params = content["model"]["params"]
    unet = params["unet_config"]["params"]
    weights = {f"model.diffusion_model.{key}": t for key, t in export_unet(translate_unet(unet).build(), unet).items()}
    first = export_first_stage(read_first_stage(params["first_stage_config"], "first_stage_config").build())
    weights |= {f"first_stage_model.{key}": tensor for key, tensor in first.items()}
    state = {key: seeded_tensor(key, tuple(tensor.shape)) for key, tensor in weights.items()}
    stage = params["cond_stage_config"]
    if stage == "__is_first_stage__":
        state |= {f"cond_stage_model.{key}": state[f"first_stage_model.{key}"] for key in first}
    elif isinstance(stage, dict) and "n_classes" in stage.get("params", {}):
        key = "cond_stage_model.embedding.weight"
        state[key] = seeded_tensor(key, (stage["params"]["n_classes"], stage["params"]["embed_dim"]))
    state |= {key: seeded_tensor(key, tuple(shape)) for key, shape in (stages or {}).items()}
    if params.get("scale_by_std"):
        state["scale_factor"] = torch.tensor(0.75)
    return state


def call_arguments(pipeline: Any, content: Mapping[str, Any], recorded: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of a pipeline's call for the condition that the original was recorded with.

    Args:
        pipeline: converted.
        content: of its configuration.
        recorded: conditions that no part of the pipeline makes.
    """
    given, stage = conditions(content), content["model"]["params"]["cond_stage_config"]
    arguments: dict[str, Any] = dict(recorded)
    if pipeline.text_encoder is not None:
        arguments["input_ids"] = given["tokens"]
    elif pipeline.class_embedder is not None:
        arguments["class_labels"] = given["classes"].tolist()
    elif pipeline.concat_encoder is not None:
        arguments["concat_images"] = given["segments"]
    elif pipeline.config.get("conditioning_key") == "crossattn":
        arguments["encoder_hidden_states"] = given["embeddings"]
    elif pipeline.config.get("conditioning_key") == "concat" and stage != "__is_first_stage__":
        arguments["concat_inputs"] = given["small"]
    return arguments


def conditions(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs of a model: pictures, a mask, depth, a map of one of 182 segments a pixel, labels, embeddings, tokens."""
    generator = torch.Generator().manual_seed(SEED)
    ddconfig = content["model"]["params"]["first_stage_config"]["params"]["ddconfig"]
    size = content["model"]["params"]["image_size"]
    side = size * 2 ** (len(ddconfig["ch_mult"]) - 1)
    return {
        "picture": torch.rand(BATCH, 3, side, side, generator=generator) * 2 - 1,
        "small": torch.rand(BATCH, 3, size, size, generator=generator) * 2 - 1,
        "mask": (torch.rand(BATCH, 1, size, size, generator=generator) > 0.5).float() * 2 - 1,
        "classes": torch.randint(11, (BATCH,), generator=generator),
        "embeddings": torch.randn(BATCH, 3, CONTEXT, generator=generator),
        "tokens": torch.randint(VOCABULARY, (BATCH, POSITIONS), generator=torch.Generator().manual_seed(SEED)),
        "depth": torch.rand(BATCH, 1, side, side, generator=generator),
        "segments": functional.one_hot(torch.randint(182, (BATCH, side, side), generator=generator), 182)
        .permute(0, 3, 1, 2)
        .float(),
    }
