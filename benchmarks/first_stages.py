"""Compare converted first stages with the original classes of a checkout outside this repository.

    python benchmarks/first_stages.py --checkout DIR [--taming DIR] [--full_width NAME ...] [--record]

DIR is a checkout of CompVis/latent-diffusion or Stability-AI/stablediffusion; the former also needs one of
CompVis/taming-transformers. Nothing of them is copied. Weights are a function of their keys. For each configuration in
``models/first_stage_models`` (Stability's: the first stages of its models) it prints the largest difference of
encoding and decoding in float32 and float64, the number of different codes, and whether the original class loads the
converted weights back, strictly and bit-equal. ``--layers 2`` gives every level another number of blocks.

With ``--record`` the keys and some numbers go to ``tests/golden/latent_models``, where the tests read them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.first_stage.architecture import FirstStageConfig, read_first_stage
from diffusers_ddpm_ext.compvis.first_stage.weights import convert_first_stage, export_first_stage
from diffusers_ddpm_ext.models.first_stage import FirstStage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.original_classes import build_quietly, import_original  # noqa: E402
from helpers.published_models import FOLDER, digest, first_stage_inputs, samples_of, seeded_tensor, tiny_first_stage  # noqa: E402

CODES = 16_384  # draws of codes to compare


def configurations(checkout: Path) -> dict[str, dict[str, Any]]:
    """The first stages that a checkout publishes, by name."""
    found = {}
    for path in sorted(checkout.glob("models/first_stage_models/*/config.yaml")):
        model = yaml.safe_load(path.read_text())["model"]
        found[path.parent.name] = {"target": model["target"], "params": model["params"]}
    for path in sorted(checkout.glob("configs/stable-diffusion/**/*.yaml")):
        stage = yaml.safe_load(path.read_text())["model"]["params"].get("first_stage_config")
        if stage is not None and stage["params"] not in [other["params"] for other in found.values()]:
            found[path.stem] = stage
    return found


def seeded_original(module: Any, section: dict[str, Any]) -> Any:
    """An original autoencoder with seeded weights; xformers' attention is the same function of the same weights."""
    params = dict(section["params"])
    if params["ddconfig"].get("attn_type") == "vanilla-xformers":
        params["ddconfig"] = dict(params["ddconfig"], attn_type="vanilla")
    original = build_quietly(getattr(module, section["target"].rpartition(".")[2]), **params)
    state = {key: seeded_tensor(key, tuple(tensor.shape)) for key, tensor in original.state_dict().items()}
    original.load_state_dict(state)
    return original


@torch.no_grad()
def compare(original: Any, config: FirstStageConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Largest differences, whether the weights go back, and the original's numbers."""
    weights = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    ours: Any = convert_first_stage(weights, config)[0]
    images = first_stage_inputs(config)
    result: dict[str, Any] = {}
    if config.kind == "vq":
        draws = torch.randn(1, config.embed_dim, 128, CODES // 128, generator=torch.Generator().manual_seed(0))
        theirs, mine = original.quantize(draws)[2][2], ours.quantize(draws)[2][2]
        result["codes differ"] = f"{int((theirs != mine).sum())} of {theirs.numel()}"
    back = export_first_stage(ours)
    original.load_state_dict(back, strict=True)
    result["back"] = len(back) if all(torch.equal(back[name], weights[name]) for name in weights) else "differs"
    numbers: dict[str, Any] = {"keys": digest({name: tuple(tensor.shape) for name, tensor in weights.items()})}
    for precision, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        original, ours, images = original.to(dtype), nn.Module.to(ours, dtype), images.to(dtype)
        hidden = original.quant_conv(original.encoder(images))
        stage = FirstStage(ours)
        encoded, std = stage.posterior(images)
        latents = hidden[:, : config.embed_dim]
        quantized = latents if config.kind == "kl" else original.quantize(latents)[0]
        decoded = original.decoder(original.post_quant_conv(quantized))
        result[f"encode {precision}"] = difference(latents, encoded)
        if std is not None:
            log_variance = hidden[:, config.embed_dim :].clamp(-30, 20)
            result[f"encode {precision}"] = max(
                result[f"encode {precision}"], difference((log_variance / 2).exp(), std)
            )
        result[f"decode {precision}"] = difference(decoded, stage.decode(stage.normalize(latents)))
        numbers |= {"encoded": samples_of(hidden), "decoded": samples_of(decoded)}
    return result, numbers


def difference(theirs: Tensor, ours: Tensor) -> float:
    """The largest absolute difference."""
    assert theirs.shape == ours.shape
    return float((theirs - ours).abs().max())


def main() -> None:
    """Compare every configuration and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--taming", type=Path)
    parser.add_argument("--full_width", nargs="*", default=(), metavar="NAME", help="at their own width")
    parser.add_argument("--layers", type=int, help="blocks per level, instead of 1 (or the file's, at full width)")
    parser.add_argument("--record", action="store_true", help=f"add to {FOLDER.relative_to(ROOT)}/first_stages.json")
    options = parser.parse_args()
    module = import_original("ldm.models.autoencoder", options.checkout, options.taming)
    file = FOLDER / "first_stages.json"
    recorded = json.loads(file.read_text()) if options.record and file.is_file() else {}
    for name, stage in configurations(options.checkout).items():
        full = name in options.full_width
        section = tiny_first_stage(stage, full_width=full)
        if options.layers:
            section["params"]["ddconfig"]["num_res_blocks"] = options.layers
        config = read_first_stage(section, name)
        result, numbers = compare(seeded_original(module, section), config)
        recorded[name] = {"section": section, **numbers}
        line = ", ".join(f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in result.items())  # fmt: skip
        print(f"{name}{' (full width)' if full else ''}: {line}", flush=True)
    if options.record:
        file.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
