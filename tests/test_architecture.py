"""Folders import only folders of a lower floor; folders on one floor do not know each other."""

from __future__ import annotations

import ast
from pathlib import Path

import diffusers.pipelines
import pytest
from helpers.paths import ROOT

NAME = "diffusers_ddpm_ext"
FLOORS = {  # of the package, of training/ and of compvis/: the lowest first
    "": "errors _version | utils | diffusion | models losses schedulers plotting metrics gaussian likelihood timesteps"
    " | pipelines | compvis hub | training | cli | __main__",
    "training": "signals | threads | distributed | config | data checkpoints | factory | evaluation tracking | loop"
    " | trainer",
    "compvis": "reader schema load_options wrapper_names | architecture | key_map unet_params config | weights"
    " | first_stage conditioner | state_dict"
    " | report export_conditioners compare load_notes load_conditioners | export_stages checkpoint | save | load"
    " | convert convert_first_stage",
}
LIGHT = ("training/config", "cli/dispatch.py", "training/checkpoints/__init__.py")  # imported before torch


def imported(path: Path) -> set[str]:
    """Full names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(package: Path) -> list[str]:
    """Every import that does not lead to a lower floor, and every module without a floor."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).with_suffix("").parts
        for inside, floors in FLOORS.items():
            own, prefix = module[1:] if inside else module, f"{NAME}.{inside}.".replace("..", ".")
            if (inside and module[0] != inside) or own[0] == "__init__":
                continue
            floor_of = {name: number for number, names in enumerate(floors.split("|")) for name in names.split()}
            if own[0] not in floor_of:
                problems.append(f"{'/'.join(module)} has no floor")
            for name in imported(path):
                other = name.removeprefix(prefix).split(".")[0]
                if not name.startswith(prefix) or other == own[0] or other not in floor_of:
                    continue
                if floor_of[other] >= floor_of.get(own[0], 0):
                    problems.append(f"{'/'.join(module)} imports {name}")
    folders = {path.parent.name for path in package.rglob("__init__.py")} - {NAME}
    problems += [f"a folder is called {name}" for name in folders & set(dir(diffusers.pipelines))]
    light = [path for name in LIGHT for path in [package / name, *(package / name).rglob("*.py")] if path.is_file()]
    problems += [
        f"{path.name} imports torch" for path in light if any(n.split(".")[0] == "torch" for n in imported(path))
    ]
    return problems


def test_imports_lead_to_lower_floors():
    assert violations(ROOT / NAME) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("diffusion/planted.py", "from diffusers_ddpm_ext.models import ema", "imports diffusers_ddpm_ext.models.ema"),
        (
            "models/planted.py",
            "def f():\n    import diffusers_ddpm_ext.losses.logvar",
            "imports diffusers_ddpm_ext.losses",
        ),
        ("training/data/planted.py", "from diffusers_ddpm_ext.training.loop import run", "imports"),
        ("compvis/schema.py", "from diffusers_ddpm_ext.compvis.load import x", "imports"),
        ("training/config/planted.py", "def f():\n    from torch import nn", "planted.py imports torch"),
        ("ddpm/__init__.py", "", "a folder is called ddpm"),
        ("elsewhere.py", "", "has no floor"),
    ],
)
def test_a_planted_violation_is_reported(file, line, message, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"{line}\n")
    assert any(message in each for each in violations(tmp_path)), violations(tmp_path)


def test_the_training_folder_at_the_top_hides_no_module():
    """`accelerate launch training/train.py` puts that folder first on sys.path."""
    assert {path.name for path in (ROOT / "training").glob("*.py")} == {"train.py"}
