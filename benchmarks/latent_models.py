"""Compare released latent models, at tiny width, with the original classes: from the condition and x_T to the picture.

    python benchmarks/latent_models.py --latent_diffusion DIR --taming DIR --stable_diffusion DIR --stablediffusion DIR
        --open_clip DIR --clip DIR [--record]

DIR are checkouts of the repositories of these names (open_clip at v2.0.2); nothing of them is copied. Weights are a
function of their keys. The original class loads them strictly and samples with the global generator; the checkpoint
that it saves is loaded with `load_compvis`, sampled with the same seed, and written back by `save_compvis`; the class,
built from the configuration that belongs to this file, loads it strictly. With
``--record`` the numbers go to ``tests/golden/latent_models``, where the tests read them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
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
from diffusers_ddpm_ext.compvis.save import compvis_config

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from helpers.original_classes import build_quietly, forget_original, import_original  # noqa: E402
from helpers.published_models import BATCH, FOLDER, SEED, conditions, seeded_state, some_pixels, tiny  # noqa: E402
from original_conditioners import replace_packages, sample_velocities  # noqa: E402

# Row of docs/released-models.md -> its file in the checkout that its first part names.
SD2 = "configs/stable-diffusion"
FILES = {
    "latent-diffusion/latent-diffusion/celebahq-ldm-vq-4": "configs/latent-diffusion/celebahq-ldm-vq-4.yaml",
    "latent-diffusion/latent-diffusion/cin-ldm-vq-f8": "configs/latent-diffusion/cin-ldm-vq-f8.yaml",
    "latent-diffusion/latent-diffusion/cin256-v2": "configs/latent-diffusion/cin256-v2.yaml",
    "latent-diffusion/latent-diffusion/lsun_churches-ldm-kl-8": "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml",
    "latent-diffusion/latent-diffusion/txt2img-1p4B-eval": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "latent-diffusion/retrieval-augmented-diffusion/768x768": "configs/retrieval-augmented-diffusion/768x768.yaml",
    "latent-diffusion/bsr_sr": "models/ldm/bsr_sr/config.yaml",
    "latent-diffusion/celeba256": "models/ldm/celeba256/config.yaml",
    "latent-diffusion/inpainting_big": "models/ldm/inpainting_big/config.yaml",
    "latent-diffusion/layout2img-openimages256": "models/ldm/layout2img-openimages256/config.yaml",
    "latent-diffusion/semantic_synthesis256": "models/ldm/semantic_synthesis256/config.yaml",
    "latent-diffusion/semantic_synthesis512": "models/ldm/semantic_synthesis512/config.yaml",
    "latent-diffusion/text2img256": "models/ldm/text2img256/config.yaml",
    "stable-diffusion/stable-diffusion/v1-inference": "configs/stable-diffusion/v1-inference.yaml",
    "stablediffusion/stable-diffusion/intel/v2-inference-bf16": f"{SD2}/intel/v2-inference-bf16.yaml",
    "stablediffusion/stable-diffusion/intel/v2-inference-fp32": f"{SD2}/intel/v2-inference-fp32.yaml",
    "stablediffusion/stable-diffusion/v2-1-stable-unclip-h-inference": f"{SD2}/v2-1-stable-unclip-h-inference.yaml",
    "stablediffusion/stable-diffusion/v2-1-stable-unclip-l-inference": f"{SD2}/v2-1-stable-unclip-l-inference.yaml",
    "stablediffusion/stable-diffusion/v2-inference-v": f"{SD2}/v2-inference-v.yaml",
    "stablediffusion/stable-diffusion/v2-inpainting-inference": f"{SD2}/v2-inpainting-inference.yaml",
    "stablediffusion/stable-diffusion/v2-midas-inference": f"{SD2}/v2-midas-inference.yaml",
    "stablediffusion/stable-diffusion/x4-upscaling": f"{SD2}/x4-upscaling.yaml",
}
STAGES = ("cond_stage_model.", "embedder.")


def original_condition(original: Any, content: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The condition as the original's scripts and ``get_input`` make it, and the arguments of our pipeline."""
    given, stage = conditions(content), content["model"]["params"]["cond_stage_config"]
    if stage == "__is_unconditional__":
        return None, {}
    if stage == "__is_first_stage__":  # scripts/inpaint.py
        encoded = original.cond_stage_model.encode(given["picture"])
        condition = torch.cat([encoded, given["mask"]], dim=1)
        return condition, {"concat_inputs": condition}
    name = stage["target"].rpartition(".")[2]
    if name == "ClassEmbedder":
        condition = original.get_learned_conditioning({"class_label": given["classes"]})
        return condition, {"class_labels": given["classes"].tolist()}
    if name == "SpatialRescaler":
        return original.get_learned_conditioning(given["segments"]), {"concat_images": given["segments"]}
    if name == "Identity" and content["model"]["params"].get("conditioning_key") == "crossattn":  # retrieved ones
        return given["embeddings"], {"encoder_hidden_states": given["embeddings"]}
    if name == "Identity":
        condition = original.get_learned_conditioning(given["small"])
        return condition, {"concat_inputs": condition}
    if type(original).__name__ == "LatentDiffusion":
        text: Any = given["tokens"] if stage.get("params", {}).get("use_tokenizer") is False else ["a"] * BATCH
        return original.get_learned_conditioning(text), {"input_ids": given["tokens"]}
    return _finetuned_condition(original, given)


def _finetuned_condition(original: Any, given: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """Conditions of text and something else, by the class' own ``get_input``; images of a batch have channels last."""
    last = {key: given[key].movedim(1, -1) for key in ("picture", "small", "mask")}
    batch = {"jpg": last["picture"], "txt": ["a"] * BATCH, "lr": last["small"], "midas_in": given["depth"]}
    batch |= {"mask": last["mask"], "masked_image": last["picture"]}
    torch.manual_seed(SEED)
    condition = original.get_input(batch, "jpg")[1]
    arguments: dict[str, Any] = {"input_ids": given["tokens"]}
    if "c_concat" in condition:
        arguments["concat_inputs"] = condition["c_concat"][0]
    if "c_adm" in condition:
        arguments["class_labels"] = condition["c_adm"]
    return {k: v if k == "c_adm" or isinstance(v, list) else [v] for k, v in condition.items()}, arguments


@torch.no_grad()
def compare(original: Any, content: dict[str, Any], base: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Differences from the original, and its numbers; ``base`` says whether the way back needs its checkpoint."""
    if original.use_ema:
        original.model_ema.num_updates.fill_(5)
        for name, key in original.model_ema.m_name2s_name.items():
            dict(original.model_ema.named_buffers())[key].copy_(dict(original.model.named_parameters())[name])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path, target = Path(folder, "model.ckpt"), Path(folder, "back.ckpt")
        torch.save({"state_dict": original.state_dict()}, path)
        pipeline = load_compvis(path, content)
        save_compvis(pipeline, target, base=path if base else None, use_ema=original.use_ema)
        back = torch.load(target, weights_only=True)["state_dict"]
        written = compvis_config(pipeline, original.use_ema, path if base else None)["model"]
    state = original.state_dict()
    assert written["target"] == content["model"]["target"]
    build_quietly(type(original), **written["params"]).load_state_dict(back, strict=True)
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
        "condition": condition_difference(original, pipeline, content, condition),
        "mode": difference(mode, pipeline.first_stage.encode_condition(conditions(content)["picture"])),
        "latents": difference(theirs, ours),
        "decoded": difference(picture, pipeline.decode_latents(theirs)),
        "picture": difference(picture, pipeline.decode_latents(ours)),
        "8-bit": float((as_bytes(picture) == as_bytes(pipeline.decode_latents(ours))).float().mean()),
        "back": len(back) if all(torch.equal(back[key], state[key]) for key in state) else "differs",
    }
    recorded = {"latents": theirs, "picture": some_pixels(picture), "mode": some_pixels(mode)}
    for name in ("concat_inputs", "class_labels"):
        if isinstance(arguments.get(name), Tensor):
            recorded[name] = arguments[name]
    return result, {name: tensor.numpy() for name, tensor in recorded.items()}


def condition_difference(original: Any, pipeline: Any, content: dict[str, Any], condition: Any) -> float:
    """Between what the original's conditioning stages and ours make of the same inputs; 0 where there are none."""
    given, differences = conditions(content), [0.0]
    if pipeline.text_encoder is not None:
        theirs = condition["c_crossattn"][0] if isinstance(condition, dict) else condition
        differences.append(difference(theirs, pipeline.text_encoder_stage.encode(given["tokens"])))
    if pipeline.concat_encoder is not None:
        differences.append(difference(condition, pipeline.concat_encoder(given["segments"])))
    if pipeline.image_encoder is not None:
        theirs = original.embedder(given["picture"])
        pixels = original.embedder.preprocess(given["picture"])
        differences.append(difference(theirs, pipeline.image_encoder(pixel_values=pixels).image_embeds))
    return max(differences)


def build(module: Any, content: dict[str, Any]) -> tuple[Any, dict[str, list[int]]]:
    """The original model with seeded weights, and the shapes of its conditioning stages' tensors."""
    model = content["model"]
    original = build_quietly(getattr(module, model["target"].rpartition(".")[2]), **copy.deepcopy(model["params"]))
    stage = model["params"]["cond_stage_config"]
    converted = isinstance(stage, str) or stage["target"].endswith(".ClassEmbedder")
    shapes = {
        key: list(tensor.shape)
        for key, tensor in original.state_dict().items()
        if key.startswith(STAGES) and not (converted and key.startswith(STAGES[0]))
    }
    missing = original.load_state_dict(seeded_state(content, shapes), strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys[:3]
    tables = ("model_ema.", "lvlb", "low_scale_model.", "noise_augmentor.")
    left = [key for key in missing.missing_keys if not key.startswith(tables) and "." in key]
    assert not left, left[:3]
    sample_velocities(original)
    return original, shapes


def difference(theirs: Any, ours: Any) -> float:
    """The largest absolute difference; 0 where there is nothing to compare."""
    return 0.0 if theirs is None or ours is None else float((theirs - ours).abs().max())


def as_bytes(picture: Tensor) -> Tensor:
    """A picture of 8 bits."""
    return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def main() -> None:
    """Compare every model and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("latent_diffusion", "taming", "stable_diffusion", "stablediffusion", "open_clip", "clip"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("--record", action="store_true", help=f"write {FOLDER.relative_to(ROOT)}")
    options = parser.parse_args()
    models, stages, arrays = {}, {}, {}
    imported = ""
    for name, file in FILES.items():
        if options.only not in name:
            continue
        repository = name.split("/")[0]
        checkout = getattr(options, repository.replace("-", "_"))
        content = tiny(yaml.safe_load((checkout / file).read_text()))
        if repository != imported:
            forget_original()
            module, imported = import_original("ldm.models.diffusion.ddpm", checkout, options.taming), repository
            replace_packages(conditions(content)["tokens"], options.open_clip, options.clip)
        original, shapes = build(module, content)
        result, recorded = compare(original, content, bool(shapes))
        models[name], stages[name] = content, shapes
        arrays |= {f"{name} {key}": value for key, value in recorded.items()}
        numbers = (f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}"
                   for key, value in result.items())  # fmt: skip
        print(f"{name}: {', '.join(numbers)}", flush=True)
    if options.record:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "models.json").write_text(json.dumps(models, indent=1) + "\n")
        (FOLDER / "stages.json").write_text(json.dumps({n: s for n, s in stages.items() if s}, indent=None) + "\n")
        np.savez_compressed(FOLDER / "models.npz", **arrays)


if __name__ == "__main__":
    main()
