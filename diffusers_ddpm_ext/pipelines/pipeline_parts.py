"""The parts of a pipeline that decide which class its folder names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PipelineParts:
    """What decides which class a folder names.

    Attributes:
        unet: the network.
        scheduler: its scheduler.
        config: of the pipeline.
        vae: the first stage.
        text_encoder: makes the tokens of cross attention.
        tokenizer: of the text encoder.
        has_other_encoders: whether there are encoders that no stock class takes.
    """

    unet: Any
    scheduler: Any
    config: Mapping[str, Any]
    vae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    has_other_encoders: bool = False
