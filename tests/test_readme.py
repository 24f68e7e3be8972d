"""The README's own words: its code runs as printed, its commands and links are real."""

from __future__ import annotations

import re

import pytest
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def block(containing: str) -> str:
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if containing in code]
    return found


def test_your_own_loop_runs_and_leaves_a_loadable_pipeline(tmp_path, monkeypatch):
    from diffusers_ddpm_ext import DDPMExtPipeline

    monkeypatch.chdir(tmp_path)
    code = block("LitEMA")
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    pipe = DDPMExtPipeline.from_pretrained("my-model")
    assert pipe.scheduler.config.v_posterior == 0.4
    raw, saved = dict(names["unet"].named_parameters()), dict(pipe.unet.named_parameters())
    assert all((saved[name] - names["ema"].shadow[name]).abs().max() < 1e-6 for name in raw)
    assert any((saved[name] - raw[name]).abs().max() > 0 for name in raw)


def test_commands_stand_on_one_line_each():
    commands = re.findall(r"^pip install .*$", README, re.M)
    assert [("accelerate launch training/train.py" in c, "pytest" in c) for c in commands] == [
        (True, False),
        (False, True),
    ]
    first_screen = README.splitlines()[:30]
    assert all(command in first_screen for command in commands)
    for name in re.findall(r"requirements/\S+\.txt", README):
        assert (ROOT / name).is_file()


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
    ],
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_the_map_names_every_room():
    for path in (ROOT / "diffusers_ddpm_ext").glob("*.py"):
        if not path.name.startswith("_"):
            assert re.search(rf"^ +{path.name} ", README, re.M), f"{path.name} is missing in the README's map"
