"""What the files of a run's folder are called; JSON among them, read while the run may be writing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
EVALUATION = "evaluation/evaluation.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; nothing where there is no such file, or none that is whole."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl`` file, none where there is no such file; one that is being written is left out."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break
    return rows
