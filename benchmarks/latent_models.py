"""Compare released latent models, at tiny width, with the original LatentDiffusion: from x_T to the picture.

    python benchmarks/latent_models.py --checkout DIR --taming DIR [--record]

DIR are checkouts of CompVis/latent-diffusion and CompVis/taming-transformers; nothing of them is copied. Weights are a
function of their keys. The original class loads them strictly and samples with the global generator; the checkpoint
that it saves is loaded with `load_compvis`, sampled with the same seed, and written back by `save_compvis`. With
``--record`` the numbers go to ``tests/golden/latent_models``, where the tests read them.
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

import numpy as np
import torch
import yaml
from torch import Tensor

from diffusers_ddpm_ext.compvis import load_compvis, save_compvis

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.original_classes import build_quietly, import_original  # noqa: E402
from helpers.published_models import BATCH, FOLDER, SEED, conditions, seeded_state, tiny  # noqa: E402

# Row of docs/released-models.md -> its file in the checkout. These need no text encoder.
FILES = {
    "latent-diffusion/latent-diffusion/celebahq-ldm-vq-4": "configs/latent-diffusion/celebahq-ldm-vq-4.yaml",
    "latent-diffusion/latent-diffusion/cin-ldm-vq-f8": "configs/latent-diffusion/cin-ldm-vq-f8.yaml",
    "latent-diffusion/latent-diffusion/cin256-v2": "configs/latent-diffusion/cin256-v2.yaml",
    "latent-diffusion/latent-diffusion/lsun_churches-ldm-kl-8": "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml",
    "latent-diffusion/retrieval-augmented-diffusion/768x768": "configs/retrieval-augmented-diffusion/768x768.yaml",
    "latent-diffusion/bsr_sr": "models/ldm/bsr_sr/config.yaml",
    "latent-diffusion/celeba256": "models/ldm/celeba256/config.yaml",
    "latent-diffusion/inpainting_big": "models/ldm/inpainting_big/config.yaml",
}


def original_condition(original: Any, content: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The condition as the original's scripts make it, and the arguments of our pipeline."""
    given, stage = conditions(content), content["model"]["params"]["cond_stage_config"]
    if stage == "__is_unconditional__":
        return None, {}
    if stage == "__is_first_stage__":  # scripts/inpaint.py
        encoded = original.cond_stage_model.encode(given["picture"])
        condition = torch.cat([encoded, given["mask"]], dim=1)
        return condition, {"concat_inputs": condition}
    if stage["target"].endswith("ClassEmbedder"):
        condition = original.get_learned_conditioning({"class_label": given["classes"]})
        return condition, {"class_labels": given["classes"].tolist()}
    if content["model"]["params"].get("conditioning_key") == "crossattn":  # retrieved embeddings
        return given["embeddings"], {"encoder_hidden_states": given["embeddings"]}
    condition = original.get_learned_conditioning(given["small"])
    return condition, {"concat_inputs": condition}


@torch.no_grad()
def compare(module: Any, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Differences from the original, and its numbers."""
    params = {**content["model"]["params"]}
    original = build_quietly(module.LatentDiffusion, **params)
    missing = original.load_state_dict(seeded_state(content), strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys[:3]
    left = [key for key in missing.missing_keys if not key.startswith(("model_ema.", "lvlb")) and "." in key]
    assert not left, left[:3]
    if original.use_ema:
        original.model_ema.num_updates.fill_(5)
        for name, key in original.model_ema.m_name2s_name.items():
            dict(original.model_ema.named_buffers())[key].copy_(dict(original.model.named_parameters())[name])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "model.ckpt")
        torch.save({"state_dict": original.state_dict()}, path)
        pipeline = load_compvis(path, content)
        save_compvis(pipeline, Path(folder, "back.ckpt"), use_ema=original.use_ema)
        back = torch.load(Path(folder, "back.ckpt"), weights_only=True)["state_dict"]
    state = original.state_dict()
    original.load_state_dict(back, strict=True)
    condition, arguments = original_condition(original, content)
    shape = (BATCH, original.channels, original.image_size, original.image_size)
    torch.manual_seed(SEED)
    theirs = original.p_sample_loop(condition, shape, verbose=False)
    picture = original.decode_first_stage(theirs)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(SEED)
    ours = pipeline(batch_size=BATCH, output_type="latent", **arguments).images
    encoded = original.first_stage_model.encode(conditions(content)["picture"])
    mode = encoded if isinstance(encoded, Tensor) else encoded.mode()
    result = {
        "condition": difference(condition, arguments.get("concat_inputs")),
        "mode": difference(mode, pipeline.first_stage.encode_condition(conditions(content)["picture"])),
        "latents": difference(theirs, ours),
        "decoded": difference(picture, pipeline.decode_latents(theirs)),
        "picture": difference(picture, pipeline.decode_latents(ours)),
        "8-bit": float((as_bytes(picture) == as_bytes(pipeline.decode_latents(ours))).float().mean()),
        "back": len(back) if all(torch.equal(back[key], state[key]) for key in state) else "differs",
    }
    recorded = {"latents": theirs, "picture": picture, "mode": mode}
    if "concat_inputs" in arguments:
        recorded["concat_inputs"] = condition
    return result, {name: tensor.numpy() for name, tensor in recorded.items()}


def difference(theirs: Any, ours: Any) -> float:
    """The largest absolute difference; 0 where there is nothing to compare."""
    return 0.0 if theirs is None or ours is None else float((theirs - ours).abs().max())


def as_bytes(picture: Tensor) -> Tensor:
    """A picture of 8 bits."""
    return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def main() -> None:
    """Compare every model and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--taming", type=Path, required=True)
    parser.add_argument("--record", action="store_true", help=f"write {FOLDER.relative_to(ROOT)}")
    options = parser.parse_args()
    module = import_original("ldm.models.diffusion.ddpm", options.checkout, options.taming)
    models, arrays = {}, {}
    for name, file in FILES.items():
        content = tiny(yaml.safe_load((options.checkout / file).read_text()))
        result, recorded = compare(module, content)
        models[name] = content
        arrays |= {f"{name} {key}": value for key, value in recorded.items()}
        numbers = (f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}"
                   for key, value in result.items())  # fmt: skip
        print(f"{name}: {', '.join(numbers)}", flush=True)
    if options.record:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "models.json").write_text(json.dumps(models, indent=1) + "\n")
        np.savez_compressed(FOLDER / "models.npz", **arrays)


if __name__ == "__main__":
    main()
