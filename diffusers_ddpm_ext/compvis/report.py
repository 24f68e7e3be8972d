"""What a conversion did: a record for ``conversion.json``, and a table for people.

conversion.json   {"format": 1, "from", "source", "network", "weights", "ema", "configuration", "tensors", ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diffusers_ddpm_ext.compvis.schema import Row
from diffusers_ddpm_ext.compvis.state_dict import LeftOut
from diffusers_ddpm_ext.compvis.weights import Moved

FILE = "conversion.json"
FORMAT = 1


@dataclass
class Report:
    """What went where.

    Attributes:
        family: whose checkpoint: ``compvis`` or ``openai``.
        source: name of the file, without its folder.
        network: class of the Diffusers network.
        default: which weights are the default files: ``ema`` or ``raw``.
        raw_variant: whether the raw weights are there too, as ``variant="raw"``.
        parameters: of the network.
        tensors: by set of weights (``raw``, ``ema``), one row a target.
        left_out: what has no place in the pipeline.
        configuration: one row a key.
        facts: what is carried beside the weights, by name.
        notes: sentences a person should read.
    """

    family: str
    source: str
    network: str
    default: str
    raw_variant: bool
    parameters: int
    tensors: dict[str, list[Moved]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    configuration: Sequence[Row] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it, for ``conversion.json``."""
        content = asdict(self)
        return {"format": FORMAT, "from": content.pop("family"), **content}

    def table(self) -> str:
        """All of it, to be printed: each tensor's way, what stayed outside and why, and what to know."""
        parts = []
        for kind, rows in self.tensors.items():
            lines = [(row.source, row.target, "x".join(map(str, row.shape)) or "1", row.sha256[:12]) for row in rows]
            parts.append(f"{kind} weights\n" + columns(("source", "target", "shape", "sha256"), lines))
        if self.left_out:
            out = [(row.source, "x".join(map(str, row.shape)) or "1", row.why) for row in self.left_out]
            parts.append("left out\n" + columns(("source", "shape", "why"), out))
        beside = [row for row in self.configuration if row.fate != "translated"]
        if beside:
            keys = [(row.key, " ".join(str(row.value).split())[:40], row.fate, row.note) for row in beside]
            parts.append("configuration without effect\n" + columns(("key", "value", "fate", "why"), keys))
        if self.facts:
            parts.append("carried beside\n" + columns(("what", "value"), [(k, str(v)) for k, v in self.facts.items()]))
        return "\n\n".join([*parts, self.summary()])

    def summary(self) -> str:
        """A few lines: the network, its weights, and what to know."""
        kinds = {"ema": "the EMA weights", "raw": "the raw weights"}
        beside = ', the raw ones beside them as variant="raw"' if self.raw_variant else ""
        lines = [f"{self.network}, {self.parameters:,} parameters: {kinds[self.default]}{beside}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text in columns.

    Args:
        head: their titles.
        rows: as many entries each.

    Returns:
        One line a row, the last column ragged.
    """
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
