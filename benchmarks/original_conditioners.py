"""What the original conditioning stages take from other packages, in their place at tiny width.

Encoders are those of Transformers, of open_clip and of OpenAI's CLIP, from checkouts. Tokenizers return the token ids
of `published_models.conditions`, whatever the text. Pictures are resized by torch, as Kornia does without blurring.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from helpers.published_models import CONTEXT, EMBEDDING, POSITIONS, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional

# Before the replacements, among which is torchvision: Transformers looks for it when it is imported.
from transformers import BertTokenizerFast, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

__all__ = ["Ids", "T5EncoderModel", "T5Tokenizer", "replace_packages"]

PATCH, SIDE = 56, 224  # pixels of an image encoder, which the original classes fix


class Ids:
    """Token ids on any device: the original moves them to a GPU by default."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def to(self, device: Any) -> Tensor:
        """The ids, where they are."""
        return self.ids


def replace_packages(ids: Tensor, open_clip: Path, clip: Path) -> None:
    """Let the original's encoders be small, and its tokenizers return the same ids for every text.

    Args:
        ids: (B, tokens), integer.
        open_clip: checkout of open_clip 2.0.2, for which Stable Diffusion 2 was written.
        clip: checkout of OpenAI's CLIP.
    """

    def tokenizer(*args: Any, **kwargs: Any) -> Any:
        return lambda text, **options: {"input_ids": Ids(ids)}

    def text_model(*args: Any, **kwargs: Any) -> CLIPTextModel:
        sizes = {"hidden_size": CONTEXT, "intermediate_size": 2 * CONTEXT, "num_attention_heads": 1}
        counts = {"num_hidden_layers": 2, "max_position_embeddings": POSITIONS, "vocab_size": VOCABULARY}
        return CLIPTextModel(CLIPTextConfig(**sizes, **counts)).eval()

    for cls in (CLIPTokenizer, BertTokenizerFast):
        cls.from_pretrained = tokenizer  # type: ignore[method-assign, assignment]
    CLIPTextModel.from_pretrained = text_model  # type: ignore[method-assign, assignment]
    ours, theirs = _module(open_clip / "src/open_clip/model.py"), _module(clip / "clip/model.py")
    vision = {"layers": 1, "width": CONTEXT, "head_width": CONTEXT, "patch_size": PATCH, "image_size": SIDE}
    text = {"context_length": POSITIONS, "vocab_size": VOCABULARY, "width": CONTEXT, "heads": 1, "layers": 2}
    _offer(
        "open_clip",
        create_model_and_transforms=lambda *a, **k: (ours.CLIP(EMBEDDING, vision, text), None, None),
        tokenize=lambda text: ids,
    )

    def load(*args: Any, **kwargs: Any) -> tuple[nn.Module, None]:
        model = theirs.CLIP(EMBEDDING, SIDE, 1, 64, PATCH, POSITIONS, VOCABULARY, CONTEXT, 1, 1)
        return model.eval(), None

    _offer("clip", load=load)
    geometry, enhance = types.ModuleType("kornia.geometry"), types.ModuleType("kornia.enhance")
    geometry.resize = _resize  # type: ignore[attr-defined]
    enhance.normalize = lambda x, mean, std: (x - mean[:, None, None]) / std[:, None, None]  # type: ignore[attr-defined]
    _offer("kornia", geometry=geometry, enhance=enhance)


def _resize(x: Tensor, size: Any, interpolation: str, align_corners: bool, antialias: bool) -> Tensor:
    assert min(size) >= max(x.shape[2:]), "smaller pictures would be blurred"
    return functional.interpolate(x, size=size, mode=interpolation, align_corners=align_corners)


def _module(path: Path) -> Any:
    """A file as a module of a package of its own, whose ``__init__`` is not run."""
    package = types.ModuleType(f"original_{path.parent.name}")
    package.__path__ = [str(path.parent)]
    sys.modules[package.__name__] = package
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _offer(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


@torch.no_grad()
def sample_velocities(original: Any) -> None:
    """Let a model of velocities be sampled: the original's ``p_mean_variance`` knows two other parameterizations."""

    def p_mean_variance(x: Tensor, c: Any, t: Tensor, clip_denoised: bool, **kwargs: Any) -> Any:
        start = original.predict_start_from_z_and_v(x, t, original.apply_model(x, t, c))
        return original.q_posterior(x_start=start, x_t=x, t=t)

    if original.parameterization == "v":
        original.p_mean_variance = p_mean_variance
