"""Folding of the scale of latents into an autoencoder's weights, for readers that know only ``scaling_factor``.

Stock ``LDMPipeline`` decodes ``x / scaling_factor``. With the symbols of `latent_scale`, an autoencoder whose latents
are ``z' = (z - m) / r`` needs only ``scaling_factor = r / s``, so that ``x = scaling_factor * z'``. Its two 1x1
convolutions W z + b next to the latents take m and r:

    after the encoder    mean of z'          (W / r) h + (b - m) / r
                         log-variance of z'  W h + b - 2 log r
    before the decoder   W z + b           = (W r) z' + (W m + b)
    codebook (VQ)        e' = e - m, with r = 1: the nearest code stays the nearest

A quantizer compares distances, which another r for each channel would change. Nothing else next to the latents is
linear, or not up to the border: these autoencoders keep their own configuration.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.models.latent_scale import latent_rule


def reason_not_to_fold(autoencoder: nn.Module) -> str:
    """Why ``scaling_factor`` alone cannot say the scale of an autoencoder, as one phrase; empty if it can.

    Args:
        autoencoder: of a `FirstStage`.
    """
    stage = FirstStage(autoencoder)
    shift, factors = latent_rule(stage.autoencoder)
    if _is_plain(shift, factors) or stage.kind == "kl":
        return ""
    if stage.kind == "vq":
        if len(set(factors)) > 1:
            return "its latents_std differ between the channels, before quantization"
        return "its decoder reads the shifted latents" if stage.autoencoder.config.norm_type == "spatial" else ""
    return f"its {type(stage.autoencoder).__name__} has a scale per channel or a shift"


def fold_scale(autoencoder: nn.Module) -> Any:
    """The same function from pixels to ``x`` and back as an autoencoder with a ``scaling_factor`` alone.

    Args:
        autoencoder: of a `FirstStage`, without wrappers, and foldable (`reason_not_to_fold`).

    Returns:
        A new autoencoder, which shares all but the two convolutions and the codebook with the old one.
    """
    stage = FirstStage(autoencoder)
    shift, factors = latent_rule(stage.autoencoder)
    uniform = len(set(factors)) == 1
    folded = copy.copy(stage.autoencoder)
    config: dict[str, Any] = {"scaling_factor": factors[0] if uniform else 1.0}
    config |= {key: None for key in ("latents_mean", "latents_std") if folded.config.get(key) is not None}
    if folded.config.get("shift_factor"):
        config["shift_factor"] = None
    if not _is_plain(shift, factors):
        m = torch.tensor(shift, dtype=torch.float64).expand(stage.latent_channels)
        r = torch.tensor([1.0 if uniform else 1 / factor for factor in factors], dtype=torch.float64)
        r = r.expand(stage.latent_channels)
        folded._modules = dict(folded._modules)  # the convolutions of the old one stay its own
        _fold_into(folded, stage.kind, m, r)
        config |= {"use_quant_conv": True, "use_post_quant_conv": True} if stage.kind == "kl" else {}
    folded.register_to_config(**config)
    return folded


def _is_plain(shift: list[float], factors: list[float]) -> bool:
    return not any(shift) and len(set(factors)) == 1


def _fold_into(model: Any, kind: str, m: Tensor, r: Tensor) -> None:
    if kind == "kl":
        weight, bias = _matrix(model.quant_conv, 2 * len(m))
        both, offset = torch.cat([r, torch.ones_like(r)]), torch.cat([m / r, 2 * r.log()])
        model.quant_conv = _convolution(model, weight / both[:, None], bias / both - offset)
    else:
        weight, bias = _matrix(model.quant_conv, len(m))
        model.quant_conv = _convolution(model, weight, bias - m)
        model.quantize = copy.deepcopy(model.quantize)
        codes = model.quantize.embedding.weight
        codes.data = (codes.data.double().cpu() - m).to(codes)
    weight, bias = _matrix(model.post_quant_conv, len(m))
    model.post_quant_conv = _convolution(model, weight * r, weight @ m + bias)


def _matrix(convolution: Any, channels: int) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a 1x1 convolution, in double precision; without one the identity."""
    if convolution is None:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    weight: Tensor = convolution.weight.detach()
    return weight[:, :, 0, 0].double().cpu(), convolution.bias.detach().double().cpu()


def _convolution(model: Any, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    like = next(model.parameters())
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1).to(like)
    convolution.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
    return convolution.requires_grad_(like.requires_grad)
