"""Is each of 500 bad inputs of image data refused by one `error:` line with status 2, and is nothing left behind?

    python benchmarks/torture/hostile_data.py [--only TEXT] [--sample N] [--verbose]

The cases (`data_cases.py`) are generated: files that are no image at every place where one can stand, values of
options that mean nothing, and options that contradict each other. All run in one process, each in a folder of its own.
A case fails if it is accepted, on a traceback or a second line, if the line does not name what is wrong, or if it
changed or left a file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import subjects
from data_cases import BadInput, all_cases, build_inputs
from forked import CONTROL
from hostile_inputs import listing

MAX_LINE = 1000


def run_here(argv: list[str]) -> tuple[int, str, str]:
    """Run a command in this process: its status, what it printed and its error output."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from diffusers_ddpm_ext.cli import main

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as request:
            status = request.code if isinstance(request.code, int) else 1
        except BaseException:
            traceback.print_exc(file=err)
            status = 1
    return status, out.getvalue(), err.getvalue()


def what_is_wrong(case: BadInput, status: int, out: str, err: str, left: list[str]) -> list[str]:
    """The faults of an outcome, a few words each; none if the input was refused as it should be."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and not _is_notice(line)]
    errors = [line for line in lines if line.startswith("error:")]
    wrong = []
    if status != 2:
        wrong.append(f"status {status}")
    if "Traceback" in out + err:
        wrong.append(f"traceback: {lines[-1][:200]}")
    elif len(errors) != 1 or len(lines) != 1:
        wrong.append(f"{len(errors)} error lines of {len(lines)}: {lines[:3]}")
    elif not all(text in errors[0] for text in case.says):
        wrong.append(f"does not say {' and '.join(case.says)}: {errors[0][:300]}")
    elif len(errors[0]) > MAX_LINE:
        wrong.append(f"a line of {len(errors[0])} characters")
    if found := CONTROL.search(out + err.replace("\r", "")):
        wrong.append(f"control character {found[0]!r}")
    if left:
        wrong.append(f"left or changed {', '.join(left[:5])}")
    return wrong


def _is_notice(line: str) -> bool:
    """Whether a line is a warning, or a bar of progress."""
    return line.startswith("warning:") or "it/s]" in line or "%|" in line or "/s]" in line or "examples/s" in line


def check(case: BadInput, inputs: Path, scratch: Path) -> list[str]:
    """Run a case in a fresh folder; what is wrong with its outcome.

    Args:
        case: the bad input.
        inputs: folder of `build_inputs`.
        scratch: a folder that is emptied.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    work, before = scratch / "work", os.getcwd()
    work.mkdir(parents=True)
    for name in case.needs:
        shutil.copytree(inputs / name, work / name)
    case.write(work)
    files = listing(work)
    os.chdir(work)
    try:
        status, out, err = run_here(list(case.argv))
    finally:
        os.chdir(before)
    after = listing(work)
    left = sorted(name for name in files.keys() | after.keys() if files.get(name) != after.get(name))
    left += [path.name for path in work.iterdir() if path.is_dir() and path.name in ("new", "out")]
    return what_is_wrong(case, status, out, err, left)


def main() -> int:
    """Run the cases and print a table by kind; status 1 if any failed."""
    parser = argparse.ArgumentParser(description="Bad inputs of image data, all in one process.")
    parser.add_argument("--only", default="", help="cases whose kind or name has this text")
    parser.add_argument("--sample", type=int, default=0, help="that many cases, drawn at random")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        subjects.environment(place / "home")
        inputs = build_inputs(place / "inputs")
        chosen = [case for case in all_cases() if arguments.only in f"{case.kind}: {case.name}"]
        if arguments.sample:
            chosen = random.Random(0).sample(chosen, min(arguments.sample, len(chosen)))
        counts, failed = Counter(case.kind for case in chosen), Counter()
        for case in chosen:
            wrong = check(case, inputs, place / "case")
            failed[case.kind] += bool(wrong)
            if wrong or arguments.verbose:
                print(f"{'WRONG' if wrong else 'ok':5} {case.kind}: {case.name}: {'; '.join(wrong)}", flush=True)
    print("| kind | cases | wrong |\n|---|---|---|")
    for kind, count in [*sorted(counts.items()), ("all", len(chosen))]:
        print(f"| {kind} | {count} | {sum(failed.values()) if kind == 'all' else failed[kind]} |")
    print(f"seconds  {time.perf_counter() - start:.0f}")
    return 1 if sum(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
