"""What is wrong with a set of images that no flag of `ddpm-ext train` mends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from diffusers_ddpm_ext.training.data.inspection.duplicates import Duplicates
from diffusers_ddpm_ext.training.data.inspection.image_facts import Kind
from diffusers_ddpm_ext.training.data.inspection.summary import SetSummary

FEW_IMAGES = 1000


def advise(summaries: Sequence[SetSummary], duplicates: Duplicates) -> list[str]:
    """What no flag mends, one sentence each."""
    advice = []
    kinds = Counter[Kind]()
    for summary in summaries:
        kinds += summary.pixels.kinds
    dtypes = Counter[str]()
    for kind, count in kinds.items():
        dtypes[kind.dtype] += count
    if len(dtypes) > 1:
        shares = ", ".join(f"{count:,} of {dtype}" for dtype, count in dtypes.most_common())
        advice.append(f"the images differ in dtype ({shares}), which a run refuses: convert them to one")
    channels = sorted({kind.channels for kind in kinds})
    if len(channels) > 1 and not {*channels} <= {1, 3, 4}:
        advice.append(
            f"the images have {', '.join(map(str, channels))} channels, which a run refuses: make them agree"
        )
    if duplicates.num_leaked:
        advice.append("remove the validation images that are training images: a loss on them says nothing")
    elif any(pair.crosses for pair in duplicates.near):
        advice.append("look at the pairs of both sets: a loss on validation images that are trained on says nothing")
    elif len(summaries) == 1 and (duplicates.num_copies[0] or duplicates.near):
        advice.append("remove duplicates: --validation_fraction may put the copies of one image on both sides")
    if summaries[0].total < FEW_IMAGES:
        advice.append(
            f"a model of fewer than {FEW_IMAGES:,} images repeats them: see ddpm-ext evaluate --memorization"
        )
    return advice
