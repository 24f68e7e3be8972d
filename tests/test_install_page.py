"""The page on installation: commands name what exists, and its facts are those of the package's metadata."""

from __future__ import annotations

import re
import tomllib

import pytest
from helpers.paths import ROOT
from packaging.requirements import Requirement

PAGE = (ROOT / "docs/install.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
COMMANDS = [
    line.strip()
    for text in re.findall(r"^```\n(.*?)^```$|(`[^`\n]+`)", PAGE, re.M | re.S)
    for line in "".join(text).strip("`").splitlines()
]


def test_commands_name_existing_extras_and_files():
    installs = [command for command in COMMANDS if re.match(r"!?pip install ", command)]
    assert len(installs) >= 8
    named = {extra for command in installs for extra in re.findall(r"\[([\w,-]+)\]", command)}
    assert named
    for extra in {extra for names in named for extra in names.split(",")}:
        assert extra in EXTRAS, extra
    for package in re.findall(r"(diffusers[\w-]*)\[", " ".join(installs)):
        assert package == PROJECT["name"]
    for name in re.findall(r"requirements/\S+\.txt", PAGE):
        assert (ROOT / name).is_file(), name


def test_every_extra_and_every_requirements_file_is_described():
    rows = "\n".join(re.findall(r"^\| .*\|$", PAGE, re.M))
    for extra in EXTRAS:
        assert f"`{extra}`" in rows, extra
    for path in (ROOT / "requirements").glob("*.txt"):
        assert f"| `requirements/{path.name}` |" in rows, path.name


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_lower_limits_are_those_of_the_package_and_nothing_has_an_upper_one(requirement):
    """An upper limit or a pin would let pip replace an installed torch."""
    name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
    label = {"numpy": "NumPy"}.get(name, name)
    assert re.search(rf"\b{label} from {re.escape(version)}(?![\d.]*\d)", " ".join(PAGE.split())), requirement


def test_extras_have_lower_limits_only():
    for requirements in EXTRAS.values():
        for requirement in requirements:
            assert re.fullmatch(r"[\w-]+(\[[\w,-]+\])?(>=[\w.]+)?", requirement), requirement


def test_make_targets_and_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", PAGE):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_no_machine_is_claimed_without_a_measurement():
    """macOS and Windows cannot be run here; their sections say so."""
    for title in ("macOS", "Windows"):
        section = re.search(rf"^## {title}\n(.*?)(?=^## )", PAGE, re.M | re.S)[1]
        assert "Not measured" in section, title


@pytest.mark.parametrize(
    ("installed", "stays"),
    [("2.10.0", True), ("2.10.0+cu128", True), ("2.14.1+rocm7.0", True), ("3.0", True), ("2.9.1", False),
     ("2.10.0a0+nv25.11", False)],
)  # fmt: skip
def test_which_installed_torch_stays(installed, stays):
    """As pip decides: a local build of a release satisfies the limit, a pre-release of it does not."""
    (requirement,) = [Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch>")]
    assert requirement.specifier.contains(installed, prereleases=True) is stays
