"""Compare converted text encoders with the original classes of a checkout outside this repository.

    python benchmarks/text_stages.py --checkout DIR [--taming DIR] [--open_clip DIR] [--record]

DIR is a checkout of CompVis/latent-diffusion (BERTEmbedder, TransformerEmbedder; needs CompVis/taming-transformers) or
of Stability-AI/stablediffusion (FrozenCLIPEmbedder, FrozenT5Embedder, FrozenOpenCLIPEmbedder; needs open_clip 2.0.2).
Nothing of them is copied. Weights are a function of their keys. Of each class it prints, at three shapes, the largest
difference of the tokens, and whether the original class loads the converted weights back, strictly and bit-equal; then
of a whole LatentDiffusion from token ids to the picture.

With ``--record`` keys and some numbers go to ``tests/golden/text_stages.json``, where the tests read them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_ddpm_ext.compvis import load_compvis, save_compvis
from diffusers_ddpm_ext.compvis.conditioner.architecture import read_conditioner
from diffusers_ddpm_ext.compvis.conditioner.weights import convert_conditioner, export_conditioner
from diffusers_ddpm_ext.models.text_encoder import TextEncoder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.original_classes import build_quietly, import_original  # noqa: E402
from helpers.published_models import SEED, samples_of, seeded_tensor  # noqa: E402
from helpers.text_stages import FILE, SHAPES, TextShape, token_ids, whole_model  # noqa: E402


class IdsOnCpu:
    """Token ids that stay on the CPU."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def to(self, device: str) -> Tensor:
        """The ids."""
        return self.ids


class NoTokenizer:
    """In place of a tokenizer: prompts are token ids already."""

    @classmethod
    def from_pretrained(cls, name: str) -> NoTokenizer:
        """An instance."""
        return cls()

    def __call__(self, text: Tensor, **options: Any) -> dict[str, IdsOnCpu]:
        """The ids."""
        return {"input_ids": IdsOnCpu(text)}


def prepare(module: Any, shape: TextShape) -> None:
    """Let the original class make a network of this shape, of random weights."""
    import transformers

    for name in ("CLIPTokenizer", "T5Tokenizer"):
        setattr(module, name, NoTokenizer)
    transformers.BertTokenizerFast = NoTokenizer
    if shape.name == "FrozenCLIPEmbedder":
        config = transformers.CLIPTextConfig(**shape.network)
        module.CLIPTextModel = type("", (), {"from_pretrained": lambda name: transformers.CLIPTextModel(config)})
    elif shape.name == "FrozenT5Embedder":
        config = transformers.T5Config(**shape.network)
        module.T5EncoderModel = type("", (), {"from_pretrained": lambda name: transformers.T5EncoderModel(config)})
    elif shape.name == "FrozenOpenCLIPEmbedder":
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        def create(*args: Any, **options: Any) -> tuple[Any, None, None]:
            vision = CLIPVisionCfg(layers=1, width=64, image_size=32, patch_size=16)
            return CLIP(24, vision, CLIPTextCfg(**shape.network), quick_gelu=shape.quick_gelu), None, None

        module.open_clip.create_model_and_transforms = create
        module.open_clip.tokenize = lambda text: text


def seeded_original(module: Any, shape: TextShape) -> Any:
    """The original class with seeded weights."""
    prepare(module, shape)
    original = build_quietly(getattr(module, shape.name), device="cpu", **shape.params)
    state = {
        key: seeded_tensor(key, tuple(tensor.shape)) if tensor.is_floating_point() else tensor
        for key, tensor in original.state_dict().items()
    }
    if shape.name == "FrozenT5Embedder":  # one table under two names
        state["transformer.encoder.embed_tokens.weight"] = state["transformer.shared.weight"]
    original.load_state_dict(state)
    return original


@torch.no_grad()
def compare(original: Any, shape: TextShape) -> tuple[dict[str, Any], dict[str, Any]]:
    """Largest difference, whether the weights go back, and the original's numbers."""
    weights = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    config = read_conditioner(shape.section, "cond_stage_config")
    assert config is not None
    converted = convert_conditioner(weights, shape.with_heads(config))
    ids = token_ids(shape)
    theirs = original.encode(ids)
    ours = TextEncoder(converted.module).encode(ids)
    back = export_conditioner(converted.module, shape.name, converted.plan.layout, weights)
    original.load_state_dict(back, strict=True)
    same = back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    result = {"tokens": difference(theirs, ours), "back": len(back) if same else "differs"}
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    return result, {"shapes": shapes, "tokens": samples_of(theirs)}


@torch.no_grad()
def compare_whole(modules: Any, module: Any, shape: TextShape, first: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Differences of a whole model with this text encoder, and the original's numbers."""
    prepare(modules, shape)
    content = whole_model(shape, first)
    params = json.loads(json.dumps(content["model"]["params"]))
    params["cond_stage_config"].setdefault("params", {})["device"] = "cpu"
    original = build_quietly(module.LatentDiffusion, **params)
    state = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.ndim and not key.startswith(("model_ema.", "lvlb")) and "." in key:
            state[key] = seeded_tensor(key, tuple(tensor.shape))
    name = "cond_stage_model.transformer.encoder.embed_tokens.weight"
    if name in state:
        state[name] = state["cond_stage_model.transformer.shared.weight"]
    original.load_state_dict(state)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "model.ckpt")
        torch.save({"state_dict": original.state_dict()}, path)
        pipeline = load_compvis(path, content, text_heads=shape.heads)
        save_compvis(pipeline, Path(folder, "back.ckpt"), base=path, use_ema=False)
        back = torch.load(Path(folder, "back.ckpt"), weights_only=True)["state_dict"]
    state = original.state_dict()
    original.load_state_dict(back, strict=True)
    ids = token_ids(shape)
    condition = original.get_learned_conditioning(ids)
    size = (len(ids), original.channels, original.image_size, original.image_size)
    torch.manual_seed(SEED)
    theirs = original.p_sample_loop(condition, size, verbose=False)
    picture = original.decode_first_stage(theirs)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(SEED)
    ours = pipeline(batch_size=len(ids), output_type="latent", input_ids=ids).images
    result = {
        "latents": difference(theirs, ours),
        "picture": difference(picture, pipeline.decode_latents(ours)),
        "back": len(back) if all(torch.equal(back[key], state[key]) for key in state) else "differs",
    }
    shapes = {name: list(tensor.shape) for name, tensor in state.items() if name.startswith("cond_stage_model.")}
    return result, {"shapes": shapes, "latents": samples_of(theirs), "picture": samples_of(picture)}


def difference(theirs: Tensor, ours: Tensor) -> float:
    """The largest absolute difference."""
    assert theirs.shape == ours.shape
    return float((theirs - ours).abs().max())


def main() -> None:
    """Compare every class of the checkout and print a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--taming", type=Path)
    parser.add_argument("--open_clip", type=Path)
    parser.add_argument("--record", action="store_true", help=f"add to {FILE.relative_to(ROOT)}")
    options = parser.parse_args()
    module = import_original("ldm.modules.encoders.modules", options.checkout, options.taming, options.open_clip)
    model = import_original("ldm.models.diffusion.ddpm", options.checkout)
    recorded = json.loads(FILE.read_text()) if options.record and FILE.is_file() else {}
    for name, shape in SHAPES.items():
        if not hasattr(module, shape.name):
            continue
        result, numbers = compare(seeded_original(module, shape), shape)
        recorded[name] = numbers
        for first in shape.first_stages:
            whole, more = compare_whole(module, model, shape, first)
            recorded[f"{name} {first}"] = more
            result |= {f"{first} {key}": value for key, value in whole.items()}
        line = ", ".join(f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in result.items())  # fmt: skip
        print(f"{name}: {line}", flush=True)
    if options.record:
        FILE.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
