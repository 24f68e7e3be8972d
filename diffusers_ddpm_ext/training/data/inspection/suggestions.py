"""The command of `ddpm-ext train` that fits a set of images, with a reason for each of its flags."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_ddpm_ext.training.data.inspection.classes import ClassColumn
from diffusers_ddpm_ext.training.data.inspection.duplicates import Duplicates
from diffusers_ddpm_ext.training.data.inspection.image_facts import ALPHA, COLORLESS, TRANSPARENT, Kind
from diffusers_ddpm_ext.training.data.inspection.summary import SetSummary
from diffusers_ddpm_ext.training.data.resizing import resized_size

LARGEST_SIDE = 128
"""Pixels of the longer side that are suggested: larger ones take very long without latents."""
DEFAULT_HALVINGS = 5
"""How often the default network halves an image."""
SMALLEST_LEVEL = 4
"""Pixels of the shorter side at the lowest level of a suggested network."""
WIDTHS = (128, 256, 256, 512)
LEAST_KEPT = 0.6
"""Share of the median image below which a crop loses too much."""
SAME_ASPECT = 1.1
"""Aspect ratios that differ by up to this factor are one."""
SHARE_NOT_ENLARGED = 0.9
"""Share of the images that the suggested size does not enlarge."""
IMBALANCE = 10.0
"""Images of the largest class for each of the smallest, from which on classes are drawn equally often."""
FEW_VALUES = 0.25
"""Share of an integer dtype's range below which a range of their own is suggested for the values."""
FEW_IMAGES = 1000
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


@dataclass(frozen=True)
class Suggestion:
    """A flag of `ddpm-ext train`, its values, and one sentence why."""

    flag: str
    values: tuple[str, ...]
    reason: str

    @property
    def words(self) -> list[str]:
        """The flag as the words of a command line."""
        return [f"--{self.flag}", *self.values]


@dataclass(frozen=True)
class Origin:
    """Where the images come from: the flags that select them.

    Attributes:
        name: of the folder or dataset.
        flags: that were given, and their values.
    """

    name: str
    flags: Sequence[tuple[str, tuple[str, ...]]]


def plain_number(value: float) -> str:
    """A number for a command line, whose parser takes none with an exponent below zero."""
    return np.format_float_positional(value, trim="-")


def command_line(suggestions: Sequence[Suggestion]) -> str:
    """The suggested command, for a POSIX shell."""
    return shlex.join(["ddpm-ext", "train", *(word for each in suggestions for word in each.words)])


def suggest(origin: Origin, summaries: Sequence[SetSummary], classes: ClassColumn | None) -> list[Suggestion]:
    """Suggest the flags of a run on these images.

    Args:
        origin: of the images.
        summaries: of the training images, of which one must be readable, and perhaps of the validation images.
        classes: of both.
    """
    summary = summaries[0]
    flags = [Suggestion(name, values, REASONS.get(name, "as given")) for name, values in origin.flags]
    sizes = list(_sizes(summary))
    is_square = len(sizes[0].values) == 1
    flags += sizes
    flags += _channels(summary)
    flags += _arrays(origin, summaries)
    flags += _flips(summary, is_square)
    large = list(_large_sets(origin, summary))
    flags += _classes(classes, may_balance=not large or large[0].flag != "streaming")
    flags += large
    height, width = int(sizes[0].values[0]), int(sizes[0].values[-1])
    count = sum(each.unreadable.count + each.not_finite.count + _strips(each, height, width) for each in summaries)
    if count:
        flags.append(Suggestion("skip_bad_images", (), f"{count:,} cannot be trained on; or repair or remove them"))
    name = re.sub(r"[^\w.-]+", "-", origin.name).strip("-.") or "images"
    return [*flags, Suggestion("output_dir", (f"runs/{name}",), "where the run is saved")]


def _sizes(summary: SetSummary) -> Iterator[Suggestion]:
    """Resolution, and the network's levels where the default ones do not fit it."""
    sizes = summary.sizes
    height, width, reason = _resolution(sizes)
    ratios = sizes[:, 1] / sizes[:, 0] * height / width
    kept = float(np.median(np.minimum(ratios, 1 / ratios)))
    values = (str(height),) if height == width else (str(height), str(width))
    yield Suggestion("resolution", values, reason)
    if kept < LEAST_KEPT:
        yield Suggestion(
            "resize", ("pad",), f"a crop keeps {kept:.0%} of half of the images or less; or stretch, which distorts"
        )
    halvings = _halvings(height, width)
    if halvings < DEFAULT_HALVINGS:
        levels = [WIDTHS[min(level, len(WIDTHS) - 1)] for level in range(halvings + 1)]
        size = f"{height}" if height == width else f"{height} x {width}"
        how = ("cannot be halved", "can be halved once", "can be halved twice")[halvings : halvings + 1]
        yield Suggestion(
            "block_out_channels",
            tuple(map(str, levels)),
            f"{size} {how[0] if how else f'can be halved {halvings} times'}, down to {min(height, width) >> halvings}"
            f" pixels; the default network halves {DEFAULT_HALVINGS} times",
        )


def _strips(summary: SetSummary, height: int, width: int) -> int:
    """Number of images that are too long to be resized to a size."""
    count = 0
    for own, number in Counter(map(tuple, summary.sizes.tolist())).items():
        try:
            resized_size((own[0], own[1]), (height, width), "crop")
        except ValueError:
            count += number
    return count


def _resolution(sizes: np.ndarray) -> tuple[int, int, str]:
    """Height, width, and why."""
    if (sizes == sizes[0]).all() and sizes.max() <= LARGEST_SIDE:
        height, width = int(sizes[0, 0]), int(sizes[0, 1])
        fitted = (_rounded(height), _rounded(width))
        same = (
            "all images have this size" if fitted == (height, width) else f"all images have {height} x {width} pixels"
        )
        return *fitted, same
    short = int(np.quantile(sizes.min(axis=1), 1 - SHARE_NOT_ENLARGED))
    ratios = sizes[:, 1] / sizes[:, 0]
    low, high = np.quantile(ratios, [0.05, 0.95])
    ratio = float(np.median(ratios)) if high <= SAME_ASPECT * low and not 1 / SAME_ASPECT < low < SAME_ASPECT else 1.0
    scale = min(short, LARGEST_SIDE / max(ratio, 1 / ratio))
    height, width = _rounded(scale * max(1.0, 1 / ratio)), _rounded(scale * max(1.0, ratio))
    shape = "" if ratio == 1 else f", in their aspect ratio of {ratio:.2f}"
    if short > 2 * LARGEST_SIDE:
        return (
            height,
            width,
            (
                f"short sides have {short:,} pixels or more{shape}; {LARGEST_SIDE} are slow in pixels already:"
                " see --vae for latents"
            ),
        )
    return (
        height,
        width,
        f"{SHARE_NOT_ENLARGED:.0%} of the images have a short side of {short:,} pixels or more{shape}",
    )


def _rounded(pixels: float) -> int:
    """A side that a network can halve: the next smaller multiple of 32, or of a lower power of two."""
    whole = int(pixels)
    step = 32 if whole >= 32 else 4 if whole >= 8 else 1
    exact = whole % 4 == 0 and whole < 64
    return whole if exact else max(step, whole // step * step)


def _halvings(height: int, width: int) -> int:
    """How often both sides can be halved, down to `SMALLEST_LEVEL` pixels unless the default network does."""
    common = math.gcd(height, width)
    factors = (common & -common).bit_length() - 1
    if factors >= DEFAULT_HALVINGS:
        return DEFAULT_HALVINGS
    room = max(0, int(math.log2(max(1, min(height, width) / SMALLEST_LEVEL))))
    return min(factors, room, len(WIDTHS) - 1)


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


def _arrays(origin: Origin, summaries: Sequence[SetSummary]) -> Iterator[Suggestion]:
    """How arrays are read, where that was not on the command line, and the range of their values."""
    reading, given = summaries[0].reading, {flag for flag, _ in origin.flags}
    if reading.key is not None and "array_key" not in given:
        yield Suggestion("array_key", (reading.key,), "the only array in the files with the shape of an image")
    if reading.layout is not None and "array_layout" not in given:
        yield Suggestion("array_layout", (reading.layout,), "the first axis of the arrays is the shortest")
    if "data_range" in given:
        return
    dtype = summaries[0].pixels.main_kind.dtype
    ranges = [
        (statistics.low, statistics.high)
        for summary in summaries
        for kind, statistics in summary.pixels.statistics.items()
        if kind.dtype == dtype
    ]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    suggested = _data_range(dtype, low, high, reading.data_range is not None)
    if suggested is not None:
        values = (plain_number(suggested[0]), plain_number(suggested[1]))
        yield Suggestion("data_range", values, f"values are from {low:.6g} to {high:.6g}{suggested[2]}")


def _data_range(dtype: str, low: float, high: float, is_needed: bool) -> tuple[float, float, str] | None:
    """A range that holds all values, and a remark; None where the default fits.

    Args:
        dtype: of the values.
        low: the smallest value.
        high: the largest value.
        is_needed: whether the dtype has no default.
    """
    if np.dtype(dtype).kind == "f":
        if low >= 0 and high <= 1:
            return None
        if low >= -1 and high <= 1:
            return -1, 1, ""
        if low >= 0 and 100 < high <= 255:
            return 0, 255, ""
        if low == high:
            return min(low, 0.0), max(high, 0.0), ", all the same"
        step = 10.0 ** (math.floor(math.log10(max(high - low, abs(high), 1e-300))) - 1)
        return min(low, _outward(low, step, math.floor)), max(high, _outward(high, step, math.ceil)), ""
    limits = np.iinfo(dtype)
    if not is_needed and high - low >= FEW_VALUES * (int(limits.max) - int(limits.min)):
        return None
    if low == high < 0:
        return low, 0, ", all the same"
    if low >= 0:
        bits = max(1, int(high).bit_length())
        return 0, 2**bits - 1, f", which are {bits} bits"
    step = 2.0 ** max(0, int(high - low).bit_length() - 5)
    low, high = _outward(low, step, math.floor), _outward(high, step, math.ceil)
    return max(low, int(limits.min)), min(high, int(limits.max)), ""


def _outward(value: float, step: float, to_integer: Callable[[float], int]) -> float:
    """A value rounded to a multiple of a step, without the rounding errors of the product."""
    return float(f"{to_integer(value / step) * step:.12g}")


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
    if duplicates.num_leaked or any(pair.crosses for pair in duplicates.near):
        advice.append("remove the validation images that are training images: a loss on them says nothing")
    elif len(summaries) == 1 and (duplicates.num_copies[0] or duplicates.near):
        advice.append("remove duplicates: --validation_fraction may put the copies of one image on both sides")
    if summaries[0].num_readable < FEW_IMAGES:
        advice.append(
            f"a model of fewer than {FEW_IMAGES:,} images repeats them: see ddpm-ext evaluate --memorization"
        )
    return advice
