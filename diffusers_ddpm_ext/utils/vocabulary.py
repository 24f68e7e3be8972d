"""Names of noise schedules, prediction and variance types, conditions and decoders: Diffusers' and CompVis'.

The one place where each set of names is listed. Nothing heavy is imported, so that ``--help`` can use it.
"""

from __future__ import annotations

from typing import Literal, get_args

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "sqrt"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
ConditioningKey = Literal["concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm"]
ConcatThroughVae = Literal["mode", "sample"]
"""How pictures that are conditions become latents: the posterior's mode, not scaled; or a sample of it, scaled."""
Decoder = Literal["exact", "improved_diffusion", "continuous"]
NamedTimesteps = Literal["samples", "bound", "even"]
"""Timesteps fitted to samples, fitted to the variational bound, and evenly spaced ones."""
SAMPLE_TIMESTEPS = "sample_timesteps"
"""Key of a scheduler's config, where `ddpm-ext fit-steps` has been run: class -> K as a string -> the K steps."""

BETA_SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
VARIANCE_TYPES: tuple[VarianceType, ...] = get_args(VarianceType)
CONDITIONING_KEYS: tuple[ConditioningKey, ...] = get_args(ConditioningKey)
CONCAT_THROUGH_VAE: tuple[ConcatThroughVae, ...] = get_args(ConcatThroughVae)
DECODERS: tuple[Decoder, ...] = get_args(Decoder)
NAMED_TIMESTEPS: tuple[NamedTimesteps, ...] = get_args(NamedTimesteps)

LATENTS_KEY = "_latents"
"""Key in ``model_config`` of a network whose samples are latents of an autoencoder: such a run is refused."""

# conditioning key -> the conditions that it requires
REQUIRED_CONDITIONS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "concat": ("concat_inputs",),
    "crossattn": ("encoder_hidden_states",),
    "hybrid": ("concat_inputs", "encoder_hidden_states"),
    "adm": ("class_labels",),
    "hybrid-adm": ("concat_inputs", "encoder_hidden_states", "class_labels"),
    "crossattn-adm": ("encoder_hidden_states", "class_labels"),
}
CLASS_TOKEN_KEYS = ("crossattn", "hybrid")
"""Keys whose tokens of cross attention may be made from classes."""


def required_conditions(conditioning_key: str | None, embeds_classes: bool = False) -> tuple[str, ...]:
    """Names of the conditions that a key requires; class labels in place of tokens where classes become tokens."""
    names = REQUIRED_CONDITIONS[conditioning_key]
    if not embeds_classes:
        return names
    return tuple("class_labels" if name == "encoder_hidden_states" else name for name in names)


# CompVis' name -> Diffusers' name of the same betas. CompVis' linear is linear in the square root of beta.
FROM_COMPVIS_BETA_SCHEDULE: dict[str, BetaSchedule] = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "cosine": "squaredcos_cap_v2",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
    "sqrt": "sqrt",
}
# Diffusers' name -> CompVis' name; sigmoid and laplace have none.
TO_COMPVIS_BETA_SCHEDULE: dict[str, str] = {
    ours: theirs for theirs, ours in reversed(FROM_COMPVIS_BETA_SCHEDULE.items())
}
FROM_COMPVIS_PREDICTION_TYPE: dict[str, PredictionType] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
TO_COMPVIS_PREDICTION_TYPE: dict[str, str] = {ours: theirs for theirs, ours in FROM_COMPVIS_PREDICTION_TYPE.items()}
# Arguments of CompVis' classes that have another name here; their values may differ, too.
FROM_COMPVIS_ARGUMENT: dict[str, str] = {
    "parameterization": "prediction_type",
    "timesteps": "num_train_timesteps",
    "linear_start": "beta_start",
    "linear_end": "beta_end",
    "given_betas": "trained_betas",
    "clip_denoised": "clip_sample",
}

SAMPLE_METRICS = ("fd", "kid", "prdc")
"""Of `ddpm-ext evaluate --metrics` and `--validation_metrics`."""
SCORES = {"fd": ("fd", "fd_extrapolated"), "kid": ("kid",), "prdc": ("precision", "recall", "density", "coverage")}
"""The numbers of each."""
