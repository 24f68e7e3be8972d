"""Compare converted first stages with the original classes, outside this repository, at random weights.

    python benchmarks/first_stages.py --checkout DIR [--taming DIR] [--full_width NAME ...]

DIR is a checkout of CompVis/latent-diffusion or Stability-AI/stablediffusion; the former also needs one of
CompVis/taming-transformers. Nothing of them is copied; pytorch_lightning is replaced by an empty class, einops must be
installed. For each configuration in ``models/first_stage_models`` (Stability's: the first stages of its models) it
prints the largest difference of encoding and decoding in float64 and float32, the number of different codes, and
whether the original class loads the converted weights back, strictly and bit-equal. In float32 random weights amplify
the rounding of Diffusers' attention (its other operations are the same to the bit).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import types
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from diffusers_ddpm_ext.compvis.first_stage.architecture import FirstStageConfig, read_first_stage
from diffusers_ddpm_ext.compvis.first_stage.weights import convert_first_stage, export_first_stage

TINY_WIDTH = 32
CODES = 16_384  # draws of codes to compare


def import_originals(checkout: Path, taming: Path | None) -> Any:
    """The module ``ldm.models.autoencoder`` of a checkout, with pytorch_lightning replaced."""
    lightning: Any = types.ModuleType("pytorch_lightning")
    lightning.LightningModule = nn.Module
    sys.modules["pytorch_lightning"] = lightning
    sys.path[:0] = [str(path) for path in (checkout, taming) if path is not None]
    with contextlib.redirect_stdout(io.StringIO()):
        from ldm.models import autoencoder
    return autoencoder


def configurations(checkout: Path) -> dict[str, dict[str, Any]]:
    """The first stages that a checkout publishes, by name."""
    found = {}
    for path in sorted(checkout.glob("models/first_stage_models/*/config.yaml")):
        found[path.parent.name] = yaml.safe_load(path.read_text())["model"]
    for path in sorted(checkout.glob("configs/stable-diffusion/**/*.yaml")):
        stage = yaml.safe_load(path.read_text())["model"]["params"].get("first_stage_config")
        if stage is not None and stage["params"] not in [other["params"] for other in found.values()]:
            found[path.stem] = stage
    return found


def random_original(module: Any, stage: dict[str, Any], width: int | None, seed: int) -> tuple[nn.Module, dict]:
    """An original autoencoder with random weights and a codebook as wide as its latents."""
    params = dict(stage["params"], lossconfig={"target": "torch.nn.Identity"})
    params.pop("monitor", None)
    params["ddconfig"] = dict(params["ddconfig"]) if width is None else dict(params["ddconfig"], ch=width)
    section = {"target": stage["target"], "params": params}
    if params["ddconfig"].get("attn_type") == "vanilla-xformers":  # the same function of the same weights
        params = dict(params, ddconfig=dict(params["ddconfig"], attn_type="vanilla"))
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        original = getattr(module, stage["target"].rpartition(".")[2])(**params)
    with torch.no_grad():
        for name, tensor in original.named_parameters():
            if "norm" in name:
                tensor += 0.2 * torch.randn_like(tensor)
            if name == "quantize.embedding.weight":
                tensor.normal_()
    return original.eval().requires_grad_(False), section


@torch.no_grad()
def compare(original: Any, config: FirstStageConfig, size: int) -> dict[str, Any]:
    """Largest differences of encoding, decoding and codes, and whether the weights go back."""
    weights = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    ours: Any = convert_first_stage(weights, config)[0]
    images = torch.rand(2, config.ddconfig["in_channels"], size, size) * 2 - 1
    result: dict[str, Any] = {}
    if config.kind == "vq":
        draws = torch.randn(1, config.embed_dim, 128, CODES // 128)
        theirs, mine = original.quantize(draws)[2][2], ours.quantize(draws)[2][2]
        result["codes differ"] = f"{int((theirs != mine).sum())} of {theirs.numel()}"
    back = export_first_stage(ours)
    original.load_state_dict(back, strict=True)
    result["back"] = all(torch.equal(back[name], tensor) for name, tensor in weights.items()) and len(back)
    for precision, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        original, ours, images = original.to(dtype), nn.Module.to(ours, dtype), images.to(dtype)
        hidden = original.quant_conv(original.encoder(images))
        encoded = ours.encode(images)
        result[f"encode {precision}"] = difference(
            hidden, encoded.latents if config.kind == "vq" else encoded.latent_dist.parameters
        )
        latents = hidden[:, : config.embed_dim]
        quantized = latents if config.kind == "kl" else original.quantize(latents)[0]
        decoded = original.decoder(original.post_quant_conv(quantized))
        result[f"decode {precision}"] = difference(decoded, ours.decode(latents).sample)
    return result


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def main() -> None:
    """Compare every configuration and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--taming", type=Path)
    parser.add_argument("--full_width", nargs="*", default=(), metavar="NAME", help="at their own width")
    options = parser.parse_args()
    module = import_originals(options.checkout, options.taming)
    for seed, (name, stage) in enumerate(configurations(options.checkout).items()):
        full = name in options.full_width
        original, section = random_original(module, stage, None if full else TINY_WIDTH, seed)
        config = read_first_stage(section, name)
        factor = 2 ** (len(config.ddconfig["ch_mult"]) - 1)
        result = compare(original, config, 4 * factor)
        line = ", ".join(f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in result.items())  # fmt: skip
        print(f"{name}{' (full width)' if full else ''}: {line}", flush=True)


if __name__ == "__main__":
    main()
