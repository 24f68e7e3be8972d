"""`ddpm-ext report`: a self-contained HTML page about a run, or one that compares several."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.cli.arguments import LOCAL_FOLDER_HELP, check_output_file, check_pipeline_folder
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import ConfigError, as_run_error, printable, warn
from diffusers_ddpm_ext.utils.files import METRICS, write_atomically
from diffusers_ddpm_ext.utils.option import option, positional

MAX_RUNS = 8  # that one page compares
REPORT_EXAMPLES = """examples:
  ddpm-ext report runs/digits                      runs/digits/report.html
  ddpm-ext report runs/digits --out digits.html
  ddpm-ext report runs/a runs/b runs/c             comparison.html: curves, differing options, samples

Bits per dimension are included after `ddpm-ext evaluate`, fitted variances after `ddpm-ext fit-variance`."""


@dataclass(frozen=True)
class ReportOptions:
    """Write a self-contained page about a run, finished or not, with everything in one file; or compare several runs.

    It has curves, samples during training, schedule, variances, bits per dimension, every option and the environment.
    All images are embedded; nothing is loaded from anywhere.
    """

    folder: Path = positional("FOLDER", LOCAL_FOLDER_HELP)
    others: tuple[str, ...] = positional("FOLDER", "Other runs, to compare with the first.", default=(), path=True)
    out: Path | None = option(
        None, "The page.", metavar="FILE.html", unset="FOLDER/report.html, or comparison.html of several"
    )

    @property
    def folders(self) -> list[Path]:
        """All runs."""
        return [self.folder, *map(Path, self.others)]

    @property
    def output_file(self) -> Path:
        """The page: ``--out``, or its default."""
        if self.out is not None:
            return self.out
        return Path("comparison.html") if self.others else self.folder / "report.html"


def report_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_report_args(argv)
    require_modules(TRAIN_MODULES)
    return report(options)


def parse_report_args(argv: Sequence[str]) -> ReportOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(ReportOptions, argv, "report", REPORT_EXAMPLES)
    for folder in options.folders:
        if not (folder / METRICS).is_file():
            check_pipeline_folder(str(folder))
    if len(options.folders) > MAX_RUNS:
        raise ConfigError(f"{len(options.folders)} folders are given: compare {MAX_RUNS} at most")
    resolved = [folder.resolve() for folder in options.folders]
    twice = next((folder for folder in options.folders if resolved.count(folder.resolve()) > 1), None)
    if twice is not None:
        raise ConfigError(f"{printable(str(twice), 300)} is given twice: name each folder once")
    check_output_file("--out", options.output_file, (".html", ".htm"))
    return options


def report(options: ReportOptions) -> str:
    """Write the page; RunError if it cannot be written. What is left out of it is a warning, and on the page."""
    from diffusers_ddpm_ext.cli.report_comparison import ComparisonPage
    from diffusers_ddpm_ext.cli.report_page import ReportPage

    out = options.output_file
    with tempfile.TemporaryDirectory() as temporary, as_run_error(out):
        page: ReportPage | ComparisonPage
        if options.others:
            page = ComparisonPage(options.folders, Path(temporary))
        else:
            page = ReportPage(options.folder, Path(temporary))
        write_atomically(out, lambda file: file.writelines(part.encode() for part in page.parts()))
    for problem in page.problems:
        warn(f"left out of the report: {problem}")
    return f"{out}: open it in a browser"
