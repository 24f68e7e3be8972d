"""Does any input file of at most 1 MiB end within 20 s and 1 GiB, with its result or one `error:` line?

    python benchmarks/torture/hostile_inputs.py [--place TEXT ...] [--only TEXT] [--all] [--sample N]

Hostile files of every kind (`hostile_files.py`) are put where the commands and readers find them (`hostile_cases.py`),
each in a fresh copy of intact folders (`subjects.py`), and each case runs in a process of its own (`forked.py`).
A case fails on a traceback, an error without its line, a crash, a hang, too much memory, control characters on the
terminal, or if a refused input left something behind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import subjects
from forked import Outcome, findings, run_forked

MAY_APPEAR = ("aside-checkpoint-", ".run.lock")
"""What a refused resume may leave: a damaged checkpoint under its other name, the lock file."""


@dataclass(frozen=True)
class Result:
    """A case's name, kind, outcome and what was wrong with it."""

    name: str
    kind: str
    outcome: Outcome
    wrong: list[str]


def listing(work: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    found = {}
    for path, _, names in os.walk(work):
        for name in names:
            status = os.lstat(os.path.join(path, name))
            found[os.path.relpath(os.path.join(path, name), work)] = (status.st_size, status.st_mtime_ns)
    return found


def run_case(case: object, source: Path, scratch: Path) -> Result:
    """Run one case in a fresh copy of its subjects.

    Args:
        case: a `hostile_cases.Case`.
        source: the intact subjects.
        scratch: a folder that is emptied.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    work = scratch / "work"
    work.mkdir(parents=True)
    for name in case.slot.subjects:  # type: ignore[attr-defined]
        shutil.copytree(source / name, work / name)
    case.write(work / case.slot.path)  # type: ignore[attr-defined]
    case.slot.prepare(work)  # type: ignore[attr-defined]
    before = listing(work)
    outcome = run_forked(case.work(), work, scratch)  # type: ignore[attr-defined]
    wrong = findings(outcome)
    if isinstance(case.reader, str):  # type: ignore[attr-defined]
        wrong = [each for each in wrong if not each.startswith(("control character", "an error line"))]  # no terminal
    if outcome.status == 2:
        after = listing(work)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if any("aside-checkpoint-" in name for name in after):
            changed = [name for name in changed if "/checkpoint-" not in name]
        changed = [name for name in changed if not any(part in name for part in MAY_APPEAR)]
        if changed:
            wrong.append(f"refused, and left or changed {', '.join(changed[:5])}")
    return Result(case.name, case.slot.kind, outcome, wrong)  # type: ignore[attr-defined]


def summary(results: list[Result]) -> str:
    """A table: per kind the number of cases, results, refusals, failures, worst time and memory."""
    kinds: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        kinds[result.kind].append(result)
    lines = ["| kind | cases | results | refused | wrong | worst s | worst MiB |", "|---|---|---|---|---|---|---|"]
    for kind, rows in [*sorted(kinds.items()), ("all", results)]:
        statuses = [row.outcome.status for row in rows]
        lines.append(
            f"| {kind} | {len(rows)} | {statuses.count(0)} | {sum(status in (1, 2) for status in statuses)}"
            f" | {sum(bool(row.wrong) for row in rows)} | {max(row.outcome.seconds for row in rows):.1f}"
            f" | {max(row.outcome.peak_bytes for row in rows) / 2**20:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the cases and print the table; status 1 if any failed."""
    parser = argparse.ArgumentParser(description="Hostile input files, one process each.")
    parser.add_argument("--only", default="", help="cases whose name or kind has this text")
    parser.add_argument("--place", nargs="*", default=[], help="places whose kind or path has this text")
    parser.add_argument("--all", action="store_true", help="every file with every reader of its place")
    parser.add_argument("--intact", action="store_true", help="no hostile files: does every reader succeed then?")
    parser.add_argument("--sample", type=int, default=0, help="that many cases, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="keeps the intact folders here between runs")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        subjects.environment(place / "home")
        subjects.import_everything()
        source = (arguments.folder or place).resolve() / "subjects"
        subjects.build(source)
        from hostile_cases import cases

        chosen = [
            c
            for c in cases(source, arguments.all, arguments.place, arguments.intact)
            if arguments.only in f"{c.slot.kind}: {c.name}"
        ]
        if arguments.sample:
            chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
        results = []
        for case in chosen:
            result = run_case(case, source, place / "case")
            if arguments.intact and result.outcome.status:
                result.wrong.append(f"status {result.outcome.status}")
            results.append(result)
            if result.wrong or arguments.verbose:
                said = result.outcome.stderr.strip().splitlines()
                print(f"{'WRONG' if result.wrong else 'ok':5} {result.name}: {'; '.join(result.wrong)}", flush=True)
                if arguments.verbose:
                    print(
                        f"      {result.outcome.status} {result.outcome.seconds:.1f} s", said[-1][:300] if said else ""
                    )
    print(summary(results))
    print(f"seconds  {time.perf_counter() - start:.0f}")
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
