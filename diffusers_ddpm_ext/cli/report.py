"""`ddpm-ext report`: a self-contained HTML page about a run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_ddpm_ext.cli.arguments import LOCAL_FOLDER_HELP, check_output_path, check_pipeline_folder
from diffusers_ddpm_ext.cli.extras import TRAIN_MODULES, require_modules
from diffusers_ddpm_ext.cli.parser import parse_options
from diffusers_ddpm_ext.errors import as_run_error, warn
from diffusers_ddpm_ext.utils.files import METRICS, write_atomically
from diffusers_ddpm_ext.utils.option import option, positional

REPORT_EXAMPLES = """examples:
  ddpm-ext report runs/digits                      runs/digits/report.html
  ddpm-ext report runs/digits --out digits.html

Bits per dimension are included after `ddpm-ext evaluate`, fitted variances after `ddpm-ext fit-variance`."""


@dataclass(frozen=True)
class ReportOptions:
    """Write a self-contained page about a run, finished or not, with everything in one file.

    It has curves, samples during training, schedule, variances, bits per dimension, every option and the environment.
    All images are embedded; nothing is loaded from anywhere.
    """

    folder: Path = positional("FOLDER", LOCAL_FOLDER_HELP)
    out: Path | None = option(None, "The page.", metavar="FILE", unset="FOLDER/report.html")

    @property
    def output_file(self) -> Path:
        """The page: ``--out``, or its default."""
        return self.folder / "report.html" if self.out is None else self.out


def report_command(argv: Sequence[str]) -> str:
    """Parse the command line and run the command; arguments and errors are those of the two functions below."""
    options = parse_report_args(argv)
    require_modules(TRAIN_MODULES)
    return report(options)


def parse_report_args(argv: Sequence[str]) -> ReportOptions:
    """The options of a command line, checked; errors are those of `parse_options`."""
    options = parse_options(ReportOptions, argv, "report", REPORT_EXAMPLES)
    if not (options.folder / METRICS).is_file():
        check_pipeline_folder(str(options.folder))
    check_output_path("--out", options.output_file, "file")
    return options


def report(options: ReportOptions) -> str:
    """Write the page; RunError if it cannot be written. What is left out of it is a warning, and on the page."""
    from diffusers_ddpm_ext.cli.report_page import ReportPage

    out = options.output_file
    with tempfile.TemporaryDirectory() as temporary, as_run_error(out):
        page = ReportPage(options.folder, Path(temporary))
        write_atomically(out, lambda file: file.writelines(part.encode() for part in page.parts()))
    for problem in page.facts.problems:
        warn(f"left out of the report: {problem}")
    return f"{out}: open it in a browser"
