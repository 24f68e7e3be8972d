"""Keys of the first stage, and of conditioning stages, in the checkpoint of a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusers_ddpm_ext.compvis.schema import listed

FIRST_STAGE_PREFIX, CONDITION_PREFIX = "first_stage_model.", "cond_stage_model."
StageRole = Literal["first stage", "condition"]
# Beginning of a key of an autoencoder -> why it is not converted.
LEFT_OUT = {
    "loss.": "training loss of the first stage",
    "model_ema.": "EMA of the first stage: the original's diffusion models take the raw weights",
    "colorize": "shows segmentations in logged images",
    "quantize.used": "renumbers the codes, which are not part of a latent",
}


@dataclass(frozen=True)
class KnownStages:
    """What a checkpoint may contain besides the network.

    Attributes:
        class_embedder: whether the conditioning stage is a ClassEmbedder.
        first_stage: keys of the first stage, without the prefix; None if it is not converted.
        first_stage_as_condition: whether the conditioning stage is the first stage again.
        conditioners: prefixes of the conditioning stages that are converted.
    """

    class_embedder: bool = False
    first_stage: frozenset[str] | None = None
    first_stage_as_condition: bool = False
    conditioners: tuple[str, ...] = ()

    @property
    def prefixes(self) -> list[tuple[StageRole, str]]:
        """Prefixes of keys that belong to the first stage."""
        if self.first_stage is None:
            return []
        again: list[tuple[StageRole, str]] = [("condition", CONDITION_PREFIX)] if self.first_stage_as_condition else []
        return [("first stage", FIRST_STAGE_PREFIX), *again]


def why_left_out(name: str) -> str | None:
    """Why a tensor of an autoencoder is not converted; None if it is, or does not belong there."""
    return next((why for prefix, why in LEFT_OUT.items() if name.startswith(prefix)), None)


def check_first_stage(first: Mapping[str, Tensor], condition: Mapping[str, Tensor], required: Iterable[str]) -> None:
    """Refuse an incomplete first stage, and a conditioning stage that should be the same, but is not.

    Raises:
        ValueError: the message names tensors.
    """
    missing = sorted(set(required) - first.keys())
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} tensors of the first stage that the configuration describes: "
            f"{listed(missing)}. Give the configuration that belongs to it, or leave the whole first stage out with "
            f"ignore_keys {FIRST_STAGE_PREFIX}"
        )
    differs = sorted(name for name, tensor in condition.items() if not torch.equal(tensor, first[name]))
    if differs:
        raise ValueError(
            f"The configuration's conditioning stage is its first stage, but {len(differs)} tensors of them differ in "
            f"the checkpoint, such as {CONDITION_PREFIX}{differs[0]}: the file is damaged, or leave one of them out "
            f"with ignore_keys {CONDITION_PREFIX}"
        )
