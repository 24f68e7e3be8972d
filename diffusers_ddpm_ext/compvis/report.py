"""Report of a conversion: a record for ``conversion.json``, and a table to print.

conversion.json   {"format": 1, "from", "source", "network", "weights", "ema", "configuration", "tensors", ...}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from diffusers_ddpm_ext.compvis.load_options import WeightSet
from diffusers_ddpm_ext.compvis.schema import ConfigRow, one_line
from diffusers_ddpm_ext.compvis.state_dict import LeftOut
from diffusers_ddpm_ext.compvis.weights import ConvertedTensor

REPORT_FORMAT = 1
Family = Literal["compvis", "openai"]


@dataclass
class Report:
    """What a conversion did. The fields' names are keys of ``conversion.json``.

    Attributes:
        family: origin of the checkpoint: ``compvis`` or ``openai``.
        source: name of the file, without its folder.
        network: class of the Diffusers network.
        default: which weights are the default files: ``ema`` or ``raw``.
        raw_variant: whether the raw weights are saved too, as ``variant="raw"``.
        parameters: number of the network's parameters.
        tensors: by set of weights (``raw``, ``ema``) and stage (``first_stage``, ``text_encoder``, ...), one row per
            target.
        left_out: tensors that are not part of the pipeline.
        configuration: one row per key.
        facts: what is converted in addition to the weights, by name.
        notes: sentences for the user.
    """

    family: Family
    source: str
    network: str
    default: str
    raw_variant: bool
    parameters: int
    tensors: dict[str, list[ConvertedTensor]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    configuration: Sequence[ConfigRow] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_networks(
        cls,
        family: Family,
        source: str,
        networks: Mapping[WeightSet, tuple[nn.Module, list[ConvertedTensor]]],
        stages: Mapping[str, list[ConvertedTensor]] | None = None,
        **more: Any,
    ) -> Report:
        """Report on networks by set of weights, the default one first, and on stages by their component.

        ``more`` are the other fields.
        """
        default = next(iter(networks))
        network = networks[default][0]
        return cls(
            family=family,
            source=source,
            network=type(network).__name__,
            default=default,
            raw_variant=len(networks) > 1,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            tensors={**{which: rows for which, (_, rows) in networks.items()}, **(stages or {})},
            **more,
        )

    def as_json(self) -> dict[str, Any]:
        """The content of ``conversion.json``."""
        content = asdict(self)
        return {"format": REPORT_FORMAT, "from": content.pop("family"), **content}

    def table(self, tensors: bool = True) -> str:
        """The report to print: what was left out and why, what is converted in addition, and notes.

        Args:
            tensors: also list each tensor: its source and target, or why it was left out.
        """
        parts = []
        for which, rows in self.tensors.items() if tensors else ():
            lines = [(row.source, row.target, _shape(row.shape), row.sha256[:12]) for row in rows]
            parts.append(f"{which} weights\n" + format_columns(("source", "target", "shape", "sha256"), lines))
        if self.left_out and not tensors:
            counts = Counter(row.why for row in self.left_out)
            reasons = [(f"{count} tensors", why) for why, count in counts.items()]
            parts.append("left out\n" + format_columns(("what", "why"), reasons))
        if self.left_out and tensors:
            out = [(row.source, _shape(row.shape), row.why) for row in self.left_out]
            parts.append("left out\n" + format_columns(("source", "shape", "why"), out))
        untranslated = [row for row in self.configuration if row.fate != "translated"]
        if untranslated:
            keys = format_columns(("key", "value", "fate", "why"), [row.cells() for row in untranslated])
            parts.append(f"configuration without effect\n{keys}")
        if self.facts:
            facts = [(name, one_line(value, 200)) for name, value in self.facts.items()]
            parts.append("converted in addition\n" + format_columns(("what", "value"), facts))
        return "\n\n".join([*parts, self.summary()])

    def summary(self) -> str:
        """A few lines: the network, its weights, and notes."""
        default = "EMA" if self.default == "ema" else "raw"
        raw = ', the raw ones are saved too, as variant="raw"' if self.raw_variant else ""
        lines = [f"{self.network}, {self.parameters:,} parameters: the {default} weights{raw}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def format_columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table as text in aligned columns, one line per row."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
