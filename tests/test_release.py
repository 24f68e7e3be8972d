"""What a release states: one version everywhere, a changelog in order, and a check that finds where it is not so."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT

from diffusers_ddpm_ext import __version__

FILES = ("diffusers_ddpm_ext/_version.py", "CITATION.cff", "CHANGELOG.md", ".ci/check_version")


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files that the check reads, with no change that waits for a release."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(
        re.sub(r"^## Unreleased\n.*?(?=^## )", "## Unreleased\n\n", changelog.read_text(), flags=re.M | re.S)
    )
    return tmp_path


def check_version(clone: Path, *tag: str) -> tuple[int, str]:
    completed = subprocess.run(
        ["bash", ".ci/check_version", *tag], cwd=clone, capture_output=True, text=True, check=False
    )
    return completed.returncode, completed.stdout + completed.stderr


def test_this_version_is_stated_everywhere():
    assert check_version(ROOT) == (0, f"version {__version__}\n")


def test_its_tag_is_accepted(clone):
    assert check_version(clone, f"v{__version__}") == (0, f"version {__version__}\n")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("CITATION.cff", r"^version: .*", "version: 9.9.9", "CITATION.cff does not state version"),
        ("CHANGELOG.md", r"^## [0-9].*", "## 9.9.9", "newest release in CHANGELOG.md is 9.9.9"),
        ("CHANGELOG.md", r"^## [0-9].*", "", "newest release in CHANGELOG.md is missing"),
        ("CHANGELOG.md", r"^## Unreleased\n", "## Unreleased\n\n- a change\n", "1 entries of CHANGELOG.md are under"),
        ("diffusers_ddpm_ext/_version.py", r'= ".*"', '= "9.9.9"', "CITATION.cff does not state version 9.9.9"),
        ("diffusers_ddpm_ext/_version.py", r'= ".*"', "= get()", "states no version"),
    ],
)
def test_a_planted_difference_is_found(clone, name, old, new, message):
    text = (clone / name).read_text()
    changed = re.sub(old, new, text, count=1, flags=re.M)
    assert changed != text
    (clone / name).write_text(changed)
    status, output = check_version(clone, f"v{__version__}")
    assert status == 1
    assert output.startswith("error: ")
    assert message in output


@pytest.mark.parametrize("tag", [__version__, "v9.9.9", f"v{__version__}.post1"])
def test_another_tag_is_refused(clone, tag):
    assert check_version(clone, tag) == (1, f"error: the tag {tag} is not v{__version__}\n")


def test_the_changelog_is_in_order():
    """Unreleased first, then releases from the newest to the oldest, each once."""
    first, *releases = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first == "Unreleased"
    numbers = [tuple(map(int, release.split("."))) for release in releases]
    assert numbers == sorted(set(numbers), reverse=True)


def test_tags_are_published_with_what_make_release_checked():
    """The job that may publish has no other step than to fetch those files and to upload them."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    (line,) = [step["run"] for step in build["steps"] if "run" in step]
    assert line == 'REPO_URL="$GITHUB_SERVER_URL/$GITHUB_REPOSITORY" make release TAG="$GITHUB_REF_NAME"'
    assert publish["needs"] == "build"
    assert publish["environment"]["name"] == "pypi"
    (stored,) = [step["with"] for step in build["steps"] if "upload-artifact" in step.get("uses", "")]
    fetched, published = publish["steps"]
    assert fetched["with"]["name"] == stored["name"]
    assert fetched["with"]["path"] == stored["path"] == "dist/"
    assert "gh-action-pypi-publish" in published["uses"]
    assert "password" not in published.get("with", {})


def test_issue_forms_have_what_github_requires():
    """A name, a description, and fields with labels and names of their own, one of which is required."""
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml"))
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form)
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert all(field["attributes"]["label"] for field in fields)
        assert len({field["id"] for field in fields}) == len(fields)
        assert any(field.get("validations", {}).get("required") for field in fields)


def absolute_links(text: str, folder: Path) -> str:
    """What `.ci/absolute_links` makes of a Markdown file."""
    path = folder / "page.md"
    path.write_text(text)
    subprocess.run([ROOT / ".ci" / "absolute_links", path, "https://host/me/it/", "v1.0.0"], check=True)
    return path.read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](docs/a.md#b)", "[a](https://host/me/it/blob/v1.0.0/docs/a.md#b)"),
        ("![a b](c.svg)", "![a b](https://host/me/it/raw/v1.0.0/c.svg)"),
        ("[![a](b.svg)](c.md)", "[![a](https://host/me/it/raw/v1.0.0/b.svg)](https://host/me/it/blob/v1.0.0/c.md)"),
        ("[`x[0]`](c.md)", "[`x[0]`](https://host/me/it/blob/v1.0.0/c.md)"),
        ("[a](#b) [c](https://d/e) [m](mailto:f)", "[a](#b) [c](https://d/e) [m](mailto:f)"),
        ("`[a](b.md)`\n```\n[a](b.md)\n```\n", "`[a](b.md)`\n```\n[a](b.md)\n```\n"),
    ],
)
def test_links_are_made_absolute(text, expected, tmp_path):
    assert absolute_links(text, tmp_path) == expected
    assert absolute_links(expected, tmp_path) == expected


def test_every_link_of_the_readme_can_be_absolute(tmp_path):
    """Each leads to a file of this repository, pictures to their bytes; nothing else changes."""
    readme = (ROOT / "README.md").read_text()
    text = absolute_links(readme, tmp_path)
    leading = re.findall(r"\]\(https://host/me/it/(blob|raw)/v1.0.0/([^)#]+)", text)
    assert all((ROOT / path).exists() for _, path in leading)
    assert {kind == "raw" for kind, path in leading if path.endswith((".png", ".svg", ".webp"))} == {True}
    assert not re.search(r"\]\((?!https?://|#)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    assert re.sub(r"https://host/me/it/(blob|raw)/v1.0.0/", "", text) == readme
