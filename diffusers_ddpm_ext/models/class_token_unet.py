"""A network that trains its tokens of cross attention: one per class (CompVis' ``ClassEmbedder``)."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

CLASS_TABLE = "class_embedder.weight"
"""Name of the table among the network's parameters."""


class ClassTokenUNet(UNet2DConditionModel):
    """`UNet2DConditionModel` with a table from a class to its token.

    A training run uses it; the saved pipeline has a stock network and the table as its ``class_embedder``.
    """

    def add_class_embedder(self, num_classes: int) -> None:
        """Add the table, normally distributed as in the original; the null class counts.

        Raises:
            ValueError: the width of the cross attention is not one number.
        """
        width = self.config.get("cross_attention_dim")
        if not isinstance(width, int) or self.config.get("encoder_hid_dim_type") is not None:
            raise ValueError(
                f"cross_attention_dim is {width!r}; classes become tokens of one width, given as a number"
            )
        self.class_embedder = nn.Embedding(num_classes, width)

    def forward(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor, **kwargs: Any) -> Any:
        """Denoise; ``class_labels`` is (B,), integer, and the other arguments are those of the base class."""
        tokens = self.class_embedder(class_labels)[:, None]
        return super().forward(sample, timestep, encoder_hidden_states=tokens, **kwargs)
