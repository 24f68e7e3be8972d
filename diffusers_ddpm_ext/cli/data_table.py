"""The table of `ddpm-ext data`: lines about each set of images, duplicates, classes, and the suggested command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from diffusers_ddpm_ext.errors import printable
from diffusers_ddpm_ext.training.data.inspection.classes import ClassColumn
from diffusers_ddpm_ext.training.data.inspection.duplicates import NearPair, Place
from diffusers_ddpm_ext.training.data.inspection.histogram import Histogram
from diffusers_ddpm_ext.training.data.inspection.image_facts import (
    ANIMATED,
    COLORLESS,
    MAX_CHANNELS,
    TRANSPARENT,
    TURNED,
    Kind,
)
from diffusers_ddpm_ext.training.data.inspection.report import SET_NAMES, Inspection, frequent_sizes, quantiles
from diffusers_ddpm_ext.training.data.inspection.suggestion import Suggestion
from diffusers_ddpm_ext.training.data.inspection.summary import Named, PixelSummary, SetSummary

SHOWN = 10
"""Names of a list of findings."""
SHOWN_CHANNELS = 8
SHOWN_CLASSES = 12
NAME_WIDTH = 60
LABEL_WIDTH = 15
SPARK, PLAIN_SPARK = "▁▂▃▄▅▆▇█", " .:-=+*#"
SPARK_BINS = 32
TRAIT_NOTES = {
    ANIMATED: "the first frame of each is used",
    TURNED: "turned upright",
    TRANSPARENT: "some pixels are not opaque",
    COLORLESS: "their three colors are equal",
}


def table(inspection: Inspection) -> str:
    """All that is printed about an inspection."""
    lines: list[str] = []
    for number, summary in enumerate(inspection.summaries):
        lines += [*_set_lines(summary, inspection.not_read[number]), ""]
    if inspection.summaries[0].num_readable:
        lines += [*_duplicate_lines(inspection), ""]
        class_lines = list(_class_lines(inspection))
        lines += [*class_lines, ""] if class_lines else []
        if inspection.advice:
            lines += ["advice", *(f"  {sentence}" for sentence in inspection.advice), ""]
        lines += _suggestion_lines(inspection.suggestions)
    return "\n".join(lines).rstrip("\n") + "\n"


def _row(label: str, text: str) -> str:
    return f"  {label:<{LABEL_WIDTH}} {text}"


def _rows(label: str, texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield _row("" if number else label, text)


def _set_lines(summary: SetSummary, not_read: Mapping[str, int]) -> Iterator[str]:
    yield f"{summary.option}: {_images(summary.total)}"
    if summary.num_read < summary.total:
        yield _row(
            "read",
            f"{summary.num_read:,} of them, evenly spaced (--max_images): numbers are those of this part; faults and"
            " duplicates among the others are not found",
        )
    if not_read:
        counts = sorted(not_read.items(), key=lambda each: (-each[1], each[0]))
        shown = ", ".join(
            f"{number:,} {printable(extension or 'without extension', 20)}" for extension, number in counts[:SHOWN]
        )
        more = f" and {len(counts) - SHOWN:,} more types" if len(counts) > SHOWN else ""
        yield _row("not read", f"{shown}{more}")
    if summary.unreadable.count:
        yield from _named_rows("cannot be read", summary.unreadable)
    if summary.not_finite.count:
        yield from _named_rows("not finite", summary.not_finite)
    if summary.num_readable:
        yield from _size_rows(summary)
        yield from _pixel_rows(summary.pixels)


def _named_rows(label: str, named: Named) -> Iterator[str]:
    yield _row(label, f"{_images(named.count)}:")
    reasons = [f"{printable(name, NAME_WIDTH)}: {printable(reason, 200)}" for name, reason in named.names]
    yield from _list_rows(reasons, named.count)


def _size_rows(summary: SetSummary) -> Iterator[str]:
    sizes = summary.sizes
    if (sizes == sizes[0]).all():
        yield _row("size (H x W)", f"{sizes[0, 0]:,} x {sizes[0, 1]:,} all")
        return
    texts = []
    for name, column in (("height", 0), ("width", 1)):
        low, middle, high = quantiles(sizes[:, column])
        texts.append(f"{name} {low:,.0f} to {high:,.0f}, median {middle:,.0f}")
    frequent = ", ".join(f"{height:,} x {width:,} ({count:,})" for height, width, count in frequent_sizes(summary))
    low, middle, high = quantiles(sizes[:, 1] / sizes[:, 0])
    texts += [
        f"most frequent {frequent}",
        f"aspect ratio (width / height) {low:.2f} to {high:.2f}, median {middle:.2f}",
    ]
    yield from _rows("size (H x W)", texts)


def _pixel_rows(pixels: PixelSummary) -> Iterator[str]:
    if {*pixels.extensions} != {""}:
        yield _row("files", _counts(pixels.extensions))
    yield _row("modes", _counts(pixels.modes))
    for trait, note in TRAIT_NOTES.items():
        if trait in pixels.traits:
            named = pixels.traits[trait]
            names = ", ".join(printable(name, NAME_WIDTH) for name, _ in named.names[:3])
            yield _row(
                trait if len(trait) <= LABEL_WIDTH else "",
                f"{named.count:,} ({note}): {names}{', ...' if named.count > 3 else ''}",
            )
    for kind, count in pixels.kinds.most_common(3):
        yield from _kind_rows(pixels, kind, count)
    if len(pixels.kinds) > 3:
        yield _row("", f"and {len(pixels.kinds) - 3:,} more kinds of pixels")


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    return ", ".join(f"{printable(name, 20)} ({count:,})" for name, count in ordered[:SHOWN])


def _kind_rows(pixels: PixelSummary, kind: Kind, count: int) -> Iterator[str]:
    """Range, mean and standard deviation of each channel, and its histogram."""
    statistics = pixels.statistics[kind]
    channels = f"{kind.channels} channel{'s' if kind.channels > 1 else ''} of {kind.dtype}"
    yield _row("pixels", f"{channels} ({_images(count)}), values from {statistics.low:.6g} to {statistics.high:.6g}")
    shown = min(kind.channels, SHOWN_CHANNELS)
    for channel in range(shown):
        mean, std = statistics.moments.mean[channel], statistics.moments.std[channel]
        yield _row("", f"  {channel:>2}  mean {mean:<10.4g} std {std:<10.4g} {_spark(statistics.histogram, channel)}")
    if kind.channels > shown:
        yield _row("", f"  and {kind.channels - shown:,} more; the first {MAX_CHANNELS} are in --json")


def _spark(histogram: Histogram, channel: int) -> str:
    """A histogram as a line of blocks."""
    counts = histogram.counts[channel]
    bins = min(SPARK_BINS, len(counts))
    edges = np.linspace(0, len(counts), bins + 1).astype(int)[:-1]
    sums = np.sqrt(np.add.reduceat(counts, edges))  # the root shows small bins beside large ones
    levels = np.ceil(sums / max(sums.max(), 1) * (len(SPARK) - 1)).astype(int)
    return "".join((SPARK if _prints_blocks() else PLAIN_SPARK)[level] for level in levels)


def _prints_blocks() -> bool:
    try:
        SPARK.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _duplicate_lines(inspection: Inspection) -> Iterator[str]:
    """Images with the pixels of others, pairs that look the same, and what is in both sets."""
    found = inspection.duplicates
    yield "duplicates"
    labels = ("same pixels",) if len(inspection.summaries) == 1 else ("in training", "in validation")
    for label, copies in zip(labels, found.num_copies, strict=False):
        verb = "are copies" if copies != 1 else "is a copy"
        yield _row(label, f"{_images(copies)} {verb} of others" if copies else "none")
    in_one_set = [group for group in found.groups if len({place.set for place in group[:2]}) == 1]
    groups = [[_name(inspection, place) for place in group] for group in in_one_set]
    yield from _list_rows([" = ".join(group[:4]) + (" = ..." if len(group) > 4 else "") for group in groups])
    near = [pair for pair in found.near if not pair.crosses]
    least = "" if found.near_complete else "at least "
    yield _row("look the same", f"{least}{len(near):,} pair{'s' if len(near) != 1 else ''}" if near else "none")
    yield from _list_rows([_pair(inspection, pair) for pair in near])
    if len(inspection.summaries) == 2:
        yield from _overlap_rows(inspection, least)


def _overlap_rows(inspection: Inspection, least: str) -> Iterator[str]:
    """Validation images that are training images, too."""
    found = inspection.duplicates
    crossing = [pair for pair in found.near if pair.crosses]
    total = inspection.summaries[1].num_readable
    if not found.num_leaked and not crossing:
        yield _row("overlap", "none: no validation image is a training image, or looks like one")
        return
    yield _row("overlap", f"{found.num_leaked:,} of {_images(total)} to validate on are training images")
    yield from _list_rows([f"{_name(inspection, one)} = {_name(inspection, other)}" for one, other in found.leaked])
    if crossing:
        looks = "pairs of both sets look" if len(crossing) != 1 else "pair of both sets looks"
        yield _row("", f"{least}{len(crossing):,} {looks} the same")
        yield from _list_rows([_pair(inspection, pair) for pair in crossing])


def _list_rows(texts: Sequence[str], count: int | None = None) -> Iterator[str]:
    """The first lines of a list, and how many more of ``count`` there are."""
    yield from (_row("", f"  {text}") for text in texts[:SHOWN])
    more = (len(texts) if count is None else count) - SHOWN
    if more > 0:
        yield _row("", f"  and {more:,} more")


def _images(count: int) -> str:
    return f"{count:,} image{'s' if count != 1 else ''}"


def _pair(inspection: Inspection, pair: NearPair) -> str:
    return f"{_name(inspection, pair.first)} ~ {_name(inspection, pair.second)} ({_how(pair)})"


def _how(pair: NearPair) -> str:
    return f"{'mirrored, ' if pair.is_mirrored else ''}differ by {pair.difference:.1%}"


def _name(inspection: Inspection, place: Place) -> str:
    name = printable(inspection.name(place), NAME_WIDTH)
    return name if len(inspection.summaries) == 1 else f"{SET_NAMES[place.set]}: {name}"


def _class_lines(inspection: Inspection) -> Iterator[str]:
    if inspection.classes or inspection.class_faults:
        yield "classes"
    for column in inspection.classes:
        yield from _column_rows(column)
    for fault in inspection.class_faults:
        yield _row("unusable", printable(fault, 300))


def _column_rows(column: ClassColumn) -> Iterator[str]:
    present = [count for count in column.train if count]
    same = min(present) == max(present)
    numbers = f"{_images(present[0])} each" if same else f"{min(present):,} to {max(present):,} images"
    balance = "balanced" if column.imbalance < 1.5 else f"the largest has {column.imbalance:,.1f} times the smallest"
    yield _row(printable(column.name, LABEL_WIDTH), f"{len(present):,} classes with {numbers}, {balance}")
    order = sorted(range(len(column.names)), key=lambda number: -column.train[number])
    shown = [f"{printable(column.names[number], 24)} {column.train[number]:,}" for number in order[:SHOWN_CLASSES]]
    yield _row("", f"  {', '.join(shown)}{', ...' if len(order) > SHOWN_CLASSES else ''}")
    if column.validation is not None:
        missing = [column.names[k] for k in order if column.train[k] and not column.validation[k]]
        if missing:
            names = ", ".join(printable(name, 24) for name in missing[:3])
            yield _row("", f"  not among the validation images: {names}{', ...' if len(missing) > 3 else ''}")


def _suggestion_lines(suggestions: Sequence[Suggestion]) -> Iterator[str]:
    """The command, a flag per line, and the reasons below."""
    if not suggestions:
        return
    flags = [shlex.join(each.words) for each in suggestions]
    yield "suggested command"
    yield "  ddpm-ext train " + " \\\n    ".join(flags)
    yield ""
    width = max(len(each.flag) for each in suggestions) + 2
    for each in suggestions:
        yield f"  {'--' + each.flag:<{width}}  {each.reason}"
