"""Random dropout of conditions during training, so that the model can be used with guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.training.config.condition_checks import MAX_CLASSES, read_dropout
from diffusers_ddpm_ext.utils import random_keys as keys


@dataclass(frozen=True)
class ConditionDropout:
    """How often a condition is dropped during training, and what replaces it (CompVis' ``ucg_training``).

    Attributes:
        probability: by condition.
        null: by condition: the null class, what fills an embedding or an image, or the number of the empty prompt.
    """

    probability: Mapping[str, float]
    null: Mapping[str, float]

    def apply(self, conditions: Conditions, seed: int, step: int, positions: Tensor) -> Conditions:
        """Replace conditions by their null values at random, with a separate key for each sample and condition.

        Args:
            conditions: of a micro-batch.
            seed: of the run.
            step: optimizer steps done.
            positions: in the effective batch, (b,).
        """
        result = conditions.as_dict()
        for name, probability in self.probability.items():
            value = result[name].clone()
            for index, position in enumerate(positions.tolist()):
                if keys.key(keys.CONDITION, seed, step, position, name) < probability * 2**32:
                    value[index] = self.null[name]
            result[name] = value
        return Conditions(**result)

    def only(self, *names: str) -> ConditionDropout | None:
        """The dropout of these conditions alone; None if none of them is dropped."""
        chosen = {name: value for name, value in self.probability.items() if name in names}
        return replace(self, probability=chosen) if chosen else None


def make_condition_dropout(
    option: Mapping[str, Any] | None, required: Sequence[str], num_classes: int | None
) -> tuple[ConditionDropout | None, int | None]:
    """Check the option; return the dropout, None without the option, and the null class, None if there is none.

    Args:
        option: condition to probability, or to ``{"p": probability, "val": null value}``.
        required: conditions of the run.
        num_classes: of the data; the default null class is the one after them.

    Raises:
        ConfigError: the run has no such condition, or a number is out of range.
    """
    dropped = read_dropout(option, required)
    if not dropped:
        return None, None
    null = {}
    for name, entry in dropped.items():
        default = num_classes if name == "class_labels" and num_classes is not None else 0
        null[name] = default if entry.null is None else entry.null
    label = null.get("class_labels")
    if label is not None and num_classes is not None and (label != int(label) or not 0 <= label <= MAX_CLASSES):
        raise ConfigError(
            f"--conditioning_dropout class_labels: val {label:g} is no class: use a whole number from 0 to"
            f" {MAX_CLASSES:,}"
        )
    dropout = ConditionDropout({name: entry.probability for name, entry in dropped.items()}, null)
    return dropout, None if label is None or num_classes is None else int(label)
