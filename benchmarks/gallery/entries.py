"""What the gallery shows: data, training commands and how samples are measured, an entry each."""

from __future__ import annotations

from dataclasses import dataclass

BEST_SAMPLER = "DPMSolverMultistepScheduler"
OWN_SAMPLER = "DDPMExtScheduler"
"""The scheduler that a model is saved with: the ancestral one."""
QUIET = {
    "--report_to": "none",
    "--seed": "0",
    "--save_images_epochs": "1000000",
    "--save_model_epochs": "1000000",
    "--checkpoints_total_limit": "1",
    "--resume_from_checkpoint": "auto",
}


@dataclass(frozen=True)
class Training:
    """A training command of ``ddpm-ext``.

    Attributes:
        name: of its folder, and in the table.
        command: `train` or `train-vae`.
        steps: optimizer steps, at full scale.
        options: all others; ``{folder}`` is that of the entry, ``{data}`` of the set, ``{vae}`` of the first stage.
    """

    name: str
    command: str
    steps: int
    options: str


@dataclass(frozen=True)
class Entry:
    """One row of the gallery.

    Attributes:
        title: in the tables.
        data: script that builds the set, beside this file or in ``latents``; None: the digits.
        training: commands in order; the last one's folder is the model that is shown.
        features: name of `--feature_extractor`, or ``classes``: a small network that is trained to name the classes.
        scheduler: Diffusers' class that draws the large sheet and the measured samples.
        calls: of the network, for those.
        guidance: classifier-free guidance scale.
        num_samples: that are measured.
        has_bound: whether bits per dimension of images exist; a model of latents has none.
        enlarge: factor of the sheets' pixels.
    """

    title: str
    data: str | None
    training: tuple[Training, ...]
    features: str
    scheduler: str = BEST_SAMPLER
    calls: int = 25
    guidance: float = 1.0
    num_samples: int = 1000
    has_bound: bool = True
    enlarge: int = 1


DIFFUSION = (
    "--train_data_dir {data}/train --validation_data_dir {data}/held_out --resolution 64 --conditioning_key adm "
    "--class_column folder --conditioning_dropout '{{\"class_labels\": 0.1}}' --prediction_type v_prediction "
    "--beta_schedule squaredcos_cap_v2 --learning_rate 1e-3 --lr_scheduler linear --lr_warmup_steps 200 "
    "--validation_steps 2000 --checkpointing_steps 500 --ddpm_num_inference_steps 50 --eval_batch_size 32 "
)
PIXELS = (
    DIFFUSION + "--block_out_channels 32 64 128 128 --attention_levels 3 --layers_per_block 1 --attention_head_dim 32 "
)
FIRST_STAGE = Training(
    "first stage",
    "train-vae",
    3500,
    "--train_data_dir {data}/train --validation_data_dir {data}/held_out --resolution 64 --compression 4 "
    "--block_out_channels 32 64 128 --norm_num_groups 8 --train_batch_size 8 --reconstruction_loss l2 "
    "--kl_weight 1e-4 --learning_rate 1e-3 --lr_warmup_steps 100 --lr_scheduler cosine --random_flip "
    "--validation_steps 1000 --checkpointing_steps 500 "
    "--mixed_precision bf16",
)
LATENTS = (
    DIFFUSION + "--vae {vae} --cache_latents --scale_factor data --block_out_channels 64 128 256 "
    "--layers_per_block 1 --attention_levels 1 2 --attention_head_dim 32 --train_batch_size 16 "
    "--ema_decay 0.9995 --mixed_precision bf16"
)
ENTRIES = {
    "digits": Entry(
        "Digits", None, (Training("model", "train", 1800, "--checkpointing_steps 600"),), "digits", enlarge=6
    ),
    "digits-classes": Entry(
        "Digits by class",
        None,
        (Training("model", "train", 1800, "--config digits_classes --checkpointing_steps 600"),),
        "digits",
        enlarge=6,
    ),
    "emoji-latents": Entry(
        "Emoji by group, in latents",
        "../latents/emoji.py",
        (FIRST_STAGE, Training("model", "train", 14000, LATENTS)),
        "classes",
        guidance=3.0,
        num_samples=500,
        has_bound=False,
    ),
    "emoji-latents-longer": Entry(
        "Emoji by group, in latents, trained longer, 100 calls",
        "../latents/emoji.py",
        (
            FIRST_STAGE,
            Training("first half", "train", 14000, LATENTS),
            Training("model", "train", 14000, LATENTS + " --ckpt_path {folder}/first-half"),
        ),
        "classes",
        scheduler=OWN_SAMPLER,
        calls=100,
        guidance=3.0,
        num_samples=500,
        has_bound=False,
    ),
    "emoji-pixels": Entry(
        "Emoji by group, in pixels",
        "../latents/emoji.py",
        (Training("model", "train", 5700, PIXELS + "--train_batch_size 16 --ema_decay 0.999 --mixed_precision bf16"),),
        "classes",
        guidance=3.0,
        num_samples=500,
    ),
    "brain": Entry(
        "Slices of a brain, three bands of 16 bits",
        "brain.py",
        (Training("model", "train", 3000, PIXELS + "--train_batch_size 8 --ema_decay 0.998"),),
        "classes",
        num_samples=500,
    ),
}
