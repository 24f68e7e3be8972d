"""Conditioning stages that are converted, by the last part of their class' path."""

from __future__ import annotations

from diffusers_ddpm_ext.compvis.conditioner.bert import BERT, TRANSFORMER
from diffusers_ddpm_ext.compvis.conditioner.clip import CLIP
from diffusers_ddpm_ext.compvis.conditioner.clip_vision import IMAGE_ENCODERS
from diffusers_ddpm_ext.compvis.conditioner.kinds import ConditionerKind
from diffusers_ddpm_ext.compvis.conditioner.open_clip import OPEN_CLIP
from diffusers_ddpm_ext.compvis.conditioner.rescaler import RESCALER
from diffusers_ddpm_ext.compvis.conditioner.t5 import T5

KINDS: dict[str, ConditionerKind] = {
    kind.name: kind for kind in (CLIP, OPEN_CLIP, BERT, TRANSFORMER, T5, RESCALER, *IMAGE_ENCODERS)
}
