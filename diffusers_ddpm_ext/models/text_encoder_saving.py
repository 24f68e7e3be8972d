"""Saving of a text or image encoder under names of tensors that all versions of Transformers read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.utils.wrappers import plain_state_dict, unwrap

PREFIXES = {"clip_text_model": "text_model.", "clip_vision_model": "vision_model."}
"""Model type -> what Transformers 4 has in front of the names. Transformers 5 writes CLIP without it and reads both;
Transformers 4 would load random weights, with a warning."""


def save_encoder(encoder: nn.Module, folder: str | os.PathLike[str], variant: str | None = None) -> None:
    """Save an encoder of Transformers: ``config.json`` and ``model.safetensors``.

    Args:
        encoder: with or without wrappers.
        folder: created if it is missing.
        variant: of the weights.
    """
    from diffusers_ddpm_ext.models.text_encoder_loading import quiet_transformers

    network: Any = unwrap(encoder)
    with quiet_transformers():
        network.save_pretrained(
            os.fspath(folder), state_dict=plain_state_dict(encoder), safe_serialization=True, variant=variant
        )
    prefix_names(Path(folder))


def prefix_names(folder: Path) -> None:
    """Rewrite the names of tensors in the folder of a CLIP encoder, as Transformers 4 has them.

    Args:
        folder: just written; others than those of CLIP stay as they are, and so do files with the names already.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    prefix = PREFIXES.get(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    if prefix is None:
        return
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            metadata, names = tensors.metadata(), list(tensors.keys())
            if all(_with_prefix(name, prefix) == name for name in names):
                continue
            renamed = {_with_prefix(name, prefix): tensors.get_tensor(name).clone() for name in names}
        save_file(renamed, file, metadata=metadata)
    for file in folder.glob("*.index*.json"):
        index = json.loads(file.read_text(encoding="utf-8"))
        index["weight_map"] = {_with_prefix(name, prefix): shard for name, shard in index["weight_map"].items()}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_vocabulary(folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt``, or ``vocab.txt``, next to the ``tokenizer.json`` of a tokenizer.

    Transformers 5 writes ``tokenizer.json`` alone; the classes of Transformers 4 that pipelines name do not read it.
    What the last call padded and cut to, which is written there too, is taken out.

    Args:
        folder: of a tokenizer; files that are there stay.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("truncation") or content.get("padding"):
        content |= {"truncation": None, "padding": None}
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    model = content.get("model", {})
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        return
    if model.get("type") == "BPE" and not (folder / "vocab.json").exists():
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
        lines = ["#version: 0.2", *merges]
        (folder / "merges.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if model.get("type") == "WordPiece" and not (folder / "vocab.txt").exists():
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[word] for word in words] == list(range(len(words))):
            (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")


def _with_prefix(name: str, prefix: str) -> str:
    outside = ("text_model.", "vision_model.", "text_projection.", "visual_projection.")
    return name if name.startswith(outside) else prefix + name


def encoder_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of an encoder under names that do not depend on the version of Transformers; not copied.

    CLIP's have no ``text_model.`` or ``vision_model.``; tables of positions' numbers are left out.

    Args:
        encoder: with or without wrappers.
    """
    tensors = {}
    for name, tensor in plain_state_dict(encoder).items():
        if not name.endswith("position_ids"):
            assert isinstance(tensor, torch.Tensor)
            tensors[name.removeprefix("text_model.").removeprefix("vision_model.")] = tensor
    return tensors
