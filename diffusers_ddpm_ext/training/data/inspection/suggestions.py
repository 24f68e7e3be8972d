"""The command of `ddpm-ext train` that fits a set of images, with a reason for each of its flags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from diffusers_ddpm_ext.training.data.inspection.array_suggestions import suggest_reading
from diffusers_ddpm_ext.training.data.inspection.classes import ClassColumn
from diffusers_ddpm_ext.training.data.inspection.image_facts import ALPHA, COLORLESS, TRANSPARENT
from diffusers_ddpm_ext.training.data.inspection.size_suggestions import count_strips, suggest_size
from diffusers_ddpm_ext.training.data.inspection.suggestion import Origin, Suggestion
from diffusers_ddpm_ext.training.data.inspection.summary import SetSummary

IMBALANCE = 10.0
"""Images of the largest class for each of the smallest, from which on classes are drawn equally often."""
STREAMED, STREAMED_STEPS = 1_000_000, 100_000
"""Images from which on a stream is suggested, and its steps."""
CACHED_BY_DEFAULT = 10_000
"""Images from which on a run keeps decoded images without being told to."""
DECODED_PER_SECOND, SLOW_START = 5e7, 20.0
"""Pixels of a JPEG that a core decodes in a second; seconds from which on a cache is suggested."""
REASONS = {
    "train_data_dir": "the images",
    "dataset_name": "the images",
    "validation_data_dir": "the images to validate on",
    "validation_split": "the images to validate on",
}
MOVED = {"random_flip": "mirrored", "vertical_flip": "upside-down", "rotate90": "turned"}


def suggest(origin: Origin, summaries: Sequence[SetSummary], classes: ClassColumn | None) -> list[Suggestion]:
    """Suggest the flags of a run on these images.

    Args:
        origin: of the images.
        summaries: of the training images, of which one must be readable, and perhaps of the validation images.
        classes: of both.
    """
    summary = summaries[0]
    flags = [Suggestion(name, values, REASONS.get(name, "as given")) for name, values in origin.flags]
    sizes = list(suggest_size(summary))
    is_square = len(sizes[0].values) == 1
    flags += sizes
    flags += _channels(summary)
    flags += suggest_reading(origin, summaries)
    flags += _flips(summary, is_square)
    large = list(_large_sets(origin, summary))
    flags += _classes(classes, may_balance=not large or large[0].flag != "streaming")
    flags += large
    height, width = int(sizes[0].values[0]), int(sizes[0].values[-1])
    count = sum(
        each.unreadable.count + each.not_finite.count + count_strips(each, height, width) for each in summaries
    )
    if count:
        flags.append(Suggestion("skip_bad_images", (), f"{count:,} cannot be trained on; or repair or remove them"))
    name = re.sub(r"[^\w.-]+", "-", origin.name).strip("-.") or "images"
    return [*flags, Suggestion("output_dir", (f"runs/{name}",), "where the run is saved")]


def _channels(summary: SetSummary) -> Iterator[Suggestion]:
    """Channels, where the images differ or have some that say nothing."""
    pixels, count = summary.pixels, summary.num_readable
    channels = {kind.channels for kind in pixels.kinds}
    if not channels <= {1, 3, 4}:
        return
    gray = sum(number for kind, number in pixels.kinds.items() if kind.channels == 1)
    if max(channels) > 1 and pixels.count_of(COLORLESS) + gray == count and not pixels.count_of(TRANSPARENT):
        yield Suggestion("channels", ("1",), "the three colors of every pixel are equal")
    elif ALPHA in pixels.traits and not pixels.count_of(TRANSPARENT):
        yield Suggestion("channels", ("3",), "images with an alpha channel are opaque in every pixel")
    elif len(channels) > 1:
        shares = ", ".join(
            f"{sum(n for kind, n in pixels.kinds.items() if kind.channels == each):,} have {each}"
            for each in sorted(channels)
        )
        yield Suggestion("channels", ("3",), f"the images differ in channels ({shares})")


def _flips(summary: SetSummary, is_square: bool) -> Iterator[Suggestion]:
    test = summary.pixels.symmetry
    for flag, moved in MOVED.items():
        if test.fits(flag) and (is_square or flag != "rotate90"):
            yield Suggestion(
                flag,
                (),
                f"{moved} images do not differ from the others (asymmetry {test.asymmetry(flag):.2f}); not for text",
            )


def _large_sets(origin: Origin, summary: SetSummary) -> Iterator[Suggestion]:
    """Streaming, or a cache where the images take long to decode and the default keeps none."""
    if summary.total >= STREAMED:
        yield Suggestion("streaming", (), f"{summary.total:,} images: the run starts at once and holds few in memory")
        yield Suggestion("max_train_steps", (str(STREAMED_STEPS),), "a stream has steps instead of epochs")
        if not {"validation_data_dir", "validation_split"} & {flag for flag, _ in origin.flags}:
            yield Suggestion("validation_examples", ("1000",), "the first images, which are not trained on")
        return
    pixels = float(summary.sizes.prod(axis=1).sum()) / summary.num_readable * summary.total
    seconds = pixels / DECODED_PER_SECOND
    if seconds >= SLOW_START and summary.total < CACHED_BY_DEFAULT:
        yield Suggestion("cache_images", ("always",), f"decoding takes about {seconds:,.0f} s at each start otherwise")


def _classes(classes: ClassColumn | None, may_balance: bool) -> Iterator[Suggestion]:
    if classes is None:
        return
    number = sum(count > 0 for count in classes.train)
    if number < 2:
        return
    yield Suggestion("conditioning_key", ("adm",), f"the network draws the class that is asked for, one of {number:,}")
    yield Suggestion("class_column", (classes.name,), "where the classes are")
    if may_balance and classes.imbalance >= IMBALANCE:
        yield Suggestion(
            "class_balance", (), f"the largest class has {classes.imbalance:,.0f} times the images of the smallest"
        )
