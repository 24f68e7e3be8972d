"""Options of `ddpm-ext train-vae`: those of its first stage, and those of `ddpm-ext train` that it shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffusers_ddpm_ext.training.config.option_table import OptionTable, changed
from diffusers_ddpm_ext.training.config.options import SECTIONS
from diffusers_ddpm_ext.utils.option import option, options_of

DEFAULT_WIDTHS = (24, 48, 96, 192, 384, 384)
"""Of the levels, from the pixels down; a run takes as many as its compression needs."""


@dataclass(frozen=True)
class AutoencoderOptions:
    """The first stage and its loss. There is no discriminator; see below."""

    first_stage_type: Literal["kl", "vq"] = option(
        "kl", "Diffusers' AutoencoderKL, whose latents have a little noise, or VQModel, whose latents are codes."
    )
    ckpt_path: str | None = option(
        None,
        "Start from this autoencoder: its folder, or that of a pipeline with one. It decides the kind and the sizes of"
        " the network, so that their options are left out.",
        unset="random weights",
        path=True,
    )
    compression: Literal[2, 4, 8, 16, 32] = option(
        4, "Pixels per latent along each side: the images are halved 1 to 5 times."
    )
    latent_channels: int = option(4, "Channels of the latents.", low=1, high=1024)
    block_out_channels: tuple[int, ...] | None = option(
        None,
        "Width of each level, one more than halvings. More is better and slower; 128 256 512 512 is Stable"
        " Diffusion's at compression 8.",
        low=1,
        high=65_536,
        unset="24 48 96 192 384 384, as many as there are levels",
    )
    layers_per_block: int = option(
        1, "Residual blocks per level of the encoder; the decoder has one more.", low=1, high=64
    )
    norm_num_groups: int = option(8, "Groups of the group normalization. Must divide every width.", low=1, high=65_536)
    mid_block_attention: bool = option(False, "Self-attention between encoder and latents, and latents and decoder.")
    num_vq_embeddings: int = option(1024, "Number of codes of vq.", low=2, high=1_000_000)
    reconstruction_loss: Literal["l1", "l2"] = option(
        "l1",
        "Distance between image and reconstruction. l1, the original's, is sharper; l2 gains a little PSNR.",
        answers={"mse": "use l2", "mae": "use l1"},
    )
    kl_weight: float = option(
        1e-6,
        "Weight of the KL divergence of kl's posterior from a standard normal, in nats per image, against the"
        " reconstruction loss summed over the image's values.",
        low=0,
    )
    commitment_weight: float = option(
        0.25, "Weight of vq's commitment loss, of the encoder's output to its code; the codebook's own has 1.", low=0
    )
    perceptual_model: str | None = option(
        None, "Backbone of a perceptual distance: folder or Hub id of a `transformers` vision model.", path=True
    )
    perceptual_weight: float = option(1.0, "Weight of the perceptual distance; the reconstruction loss has 1.", low=0)


LEFT_OUT = (
    "class_balance", "class_names",
    "class_column", "concat_column", "context_column", "caption_column", "conditioning_dropout",
    "validation_bpd", "validation_bpd_steps", "validation_metrics", "validation_samples", "feature_extractor",
    "trust_feature_extractor", "ddpm_num_inference_steps", "preview_guidance_scale",
)  # fmt: skip
"""Options of shared sections that only a diffusion model has."""
SHARED = ("data", "optim", "ema", "loop", "validation", "checkpoint", "monitoring", "output")
VAE_SECTIONS: dict[str, type] = {"autoencoder": AutoencoderOptions} | {name: SECTIONS[name] for name in SHARED}


def _vae_table() -> OptionTable:
    declared = [each for section, cls in VAE_SECTIONS.items() for each in options_of(cls, section).values()]
    options = {each.name: each for each in declared if each.name not in LEFT_OUT}
    defaults: dict[str, Any] = {
        "learning_rate": 1e-3,
        "lr_warmup_steps": 100,
        "adam_beta1": 0.9,
        "ema_decay": 0.999,
        "num_epochs": 20,
    }
    options |= {name: changed(options[name], default) for name, default in defaults.items()}
    texts: dict[str, dict[str, str]] = {
        "output_dir": {
            "help": "Folder of the run and of the trained first stage, for --vae.",
            "unset": "a new one: runs/digits-vae, runs/digits-vae-2, ...",
        },
        "monitor": {"unset": "val/psnr_ema, or val/psnr without EMA"},
        "use_ema": {"help": "Track the EMA. Without it the saved first stage has the raw weights."},
        "adam_weight_decay": {"help": "Weight decay of the network."},
        "save_images_epochs": {"help": "Draw images above their reconstructions every N epochs."},
        "num_preview_images": {"help": "Images that are reconstructed in a preview."},
        "save_model_epochs": {"help": "Save the first stage every N epochs, and at the end."},
    }
    return OptionTable(
        "train-vae",
        VAE_SECTIONS,
        options | {name: changed(options[name], options[name].default, **text) for name, text in texts.items()},
    )


TRAIN_VAE = _vae_table()
