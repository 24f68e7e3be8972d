"""The README: its code runs as printed, its commands and links exist."""

from __future__ import annotations

import re
import tomllib

import pytest
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def block(containing: str) -> str:
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if containing in code]
    return code


def test_training_loop_runs_and_saves_a_loadable_pipeline(tmp_path, monkeypatch):
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


def test_each_install_command_is_one_line_on_the_first_screen():
    commands = re.findall(r"^pip install .*$", README, re.M)
    assert [("accelerate launch training/train.py" in c, "pytest" in c) for c in commands] == [
        (True, False),
        (False, True),
    ]
    first_screen = README.splitlines()[:45]
    assert all(command in first_screen for command in commands)
    for name in re.findall(r"requirements/\S+\.txt", README):
        assert (ROOT / name).is_file()


def test_badges_name_the_floors():
    """Each badge and its text say what the metadata say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {re.match(r"[\w-]+", each)[0]: re.search(r">=([\d.]+)", each)[1] for each in project["dependencies"]}
    expected = {
        "python": f"Python: {project['requires-python'].removeprefix('>=')} or newer",
        "torch": f"PyTorch: {floors['torch']} or newer",
        "diffusers": f"Diffusers: {floors['diffusers']} or newer",
        "license": f"license: {project['license']}",
    }
    badges = {path.stem: path.read_text() for path in (ROOT / "docs/images/badges").iterdir()}
    assert badges.keys() == expected.keys()
    for name, text in expected.items():
        assert f'aria-label="{text}"' in badges[name]
        label, value = text.split(": ")
        assert re.findall(r">([^<]+)</text>", badges[name]) == [label, value]
        assert f"[![{text.replace(':', '')}](docs/images/badges/{name}.svg)]" in README


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "CODE_OF_CONDUCT.md",
        ".github/PULL_REQUEST_TEMPLATE.md",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
    ],
)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
