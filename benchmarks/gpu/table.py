"""The table of `gpu.sh` and its JSON, from what the parts wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import device_name

PARTS = ("golden", "resume", "rates", "sampling")


def number(value: float | None, digits: int = 2) -> str:
    """A number of a table; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def rate_rows(rates: dict[str, Any]) -> list[str]:
    """The table of training."""
    rows = [
        "| bfloat16 | | steps/s | images/s | of a matmul | of the published peak | waits/step | steps/s to stock |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|")
    for row in rates["rows"]:
        cells = [row["network"], row["kind"], number(row["steps_per_second"]), number(row["images_per_second"], 0)]
        cells += [number(row["of_matmul"], 3), number(row["of_published"], 3), number(row["waits_per_step"])]
        rows.append(f"| {' | '.join(cells)} | {number(row['ratio_to_stock'])} |")
    if rates["left_out"]:
        rows.append(f"\nnot ready in time and left out: {'; '.join(rates['left_out'])}")
    if rates["stand_in"]:
        rows.append("\ntorchvision is not installed: the reference has a stand-in for its transforms")
    return rows


def sampling_rows(sampling: dict[str, Any]) -> list[str]:
    """The table of sampling, and the checkpoint."""
    rows = ["", "| sampling | | dtype | images/s |", "|---|---|---|---|"]
    for row in sampling["rows"]:
        rows.append(f"| {row['network']} | {row['pipeline']} | {row['dtype']} | {number(row['images_per_second'])} |")
    cost = sampling["checkpoint"]
    rows.append(f"\ncheckpoint: {number(cost['mib'], 0)} MiB in {number(cost['seconds'])} s")
    return rows


def main() -> None:
    """Print the table, write the JSON, and end with status 1 where a part failed."""
    folder = Path(sys.argv[1])
    results = {
        part: json.loads((folder / f"{part}.json").read_text()) if (folder / f"{part}.json").is_file() else None
        for part in PARTS
    }
    device = f"{device_name()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    (folder / "gpu.json").write_text(json.dumps({"device": device} | results, indent=1) + "\n")
    print(f"\ndevice: {device}")
    for part in ("golden", "resume"):
        print(f"{part}: {'not finished' if results[part] is None else json.dumps(results[part])}")
    if results["rates"] is not None:
        print("\n".join(rate_rows(results["rates"])))
    if results["sampling"] is not None:
        print("\n".join(sampling_rows(results["sampling"])))
    failed = [part for part in PARTS if results[part] is None or not results[part]["ok"]]
    if failed:
        sys.exit(f"error: failed or out of time: {', '.join(failed)}; their output is above")


if __name__ == "__main__":
    main()
