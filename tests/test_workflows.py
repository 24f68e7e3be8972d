"""Workflows may only read the repository, and run actions of known commits: a moved tag changes nothing.

One job may do more: the one that publishes on PyPI identifies itself there, and runs none of our code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} +# v\d+\.\d+\.\d+")


def problems(text: str) -> list[str]:
    """What a workflow may do beyond reading, and the actions that it names by something other than a commit."""
    content = yaml.safe_load(text)
    found = [] if content.get("permissions") == {"contents": "read"} else ["permissions of the workflow"]
    found += [
        f"permissions of {name}"
        for name, job in content["jobs"].items()
        if "permissions" in job and not publishes(job)
    ]
    if "pull_request_target" in str(content.get(True)):  # YAML 1.1 reads the key `on` as true
        found.append("pull_request_target")
    uses = re.findall(r"\buses[\"']?\s*:[ \t]*(.*)", text)
    named = [
        step["uses"] for job in content["jobs"].values() for step in [job, *job.get("steps", [])] if "uses" in step
    ]
    assert len(uses) == len(named)
    return found + [use for use in uses if PINNED.fullmatch(use.strip()) is None]


def publishes(job: dict[str, Any]) -> bool:
    """Whether a job has the one permission to identify itself, and only fetches files and publishes them."""
    actions = [step.get("uses", "").partition("@")[0] for step in job["steps"]]
    only_publishes = actions == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]
    return only_publishes and job["permissions"] == {"id-token": "write"} and "environment" in job


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_read_only_and_pin_their_actions(path: Path):
    assert problems(path.read_text()) == []


def test_there_are_workflows():
    assert len(WORKFLOWS) >= 2


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("contents: read", "contents: write", "permissions of the workflow"),
        ("contents: read", "contents: read\n  id-token: write", "permissions of the workflow"),
        ("permissions:\n  contents: read\n", "", "permissions of the workflow"),
        ("    steps:\n", "    permissions: write-all\n    steps:\n", "permissions of slow"),
        ("workflow_dispatch:", "pull_request_target:", "pull_request_target"),
        (r"@[0-9a-f]{40} # v4.*", "@v4", "actions/checkout@v4"),
        (r"@[0-9a-f]{40} # v5.*", "@main", "actions/setup-python@main"),
        (r"@[0-9a-f]{7}(.*# v4)", r"@\1", "actions/checkout@"),
        (r" # v4.*", "", "actions/checkout@"),
        (r"- uses: actions/checkout.*", "- {uses: docker://alpine}", "docker://alpine}"),
    ],
)
def test_a_planted_weakness_is_found(old, new, problem):
    text = (ROOT / ".github" / "workflows" / "slow.yml").read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    assert any(each.startswith(problem) for each in problems(changed))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("id-token: write", "id-token: write\n      contents: write"),
        ("id-token: write", "contents: write"),
        ("      - uses: actions/download", "      - run: make release\n      - uses: actions/download"),
        ("    environment:\n      name: pypi\n      url: .*\n", ""),
        ("pypa/gh-action-pypi-publish@", "else/publish@"),
    ],
)
def test_the_publishing_job_may_do_nothing_else(old, new):
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    assert "permissions of publish" in problems(changed)
