"""The house: imports go strictly down, and rooms of one floor do not know each other."""

from __future__ import annotations

import ast

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "diffusers_ddpm_ext"
FLOORS: list[set[str]] = [
    {"_version", "shards", "quiet", "run_files"},
    {"schedule", "distance", "logvar", "ema", "lr_lambdas", "unet", "class_embedder", "perceptual"},
    {"conditioning"},
    {"guidance"},
    {"gaussian", "weighting", "plots", "respacing", "stock_config", "variance", "timesteps", "estimate"},
    {"reverse", "bound_plots"},
    {"likelihood", "objective_checks"},
    {"fitting"},
    {"compvis_names"},
    {"fitted_config"},
    {"scheduler", "objective"},
    {"layout", "samplers"},
    {"pipeline_files"},
    {"pipeline"},
    {"compvis.kinds"},
    {"compvis.machine", "compvis.yaml_file", "compvis.rows", "compvis.targets", "compvis.architecture"},
    {"compvis.run_keys"},
    {"compvis.opcodes", "compvis.backwards", "compvis.names", "compvis.config", "compvis.openai"},
    {"compvis.unpickle", "compvis.weights"},
    {"compvis.storages", "compvis.zips"},
    {"compvis.archive"},
    {"compvis.contents", "compvis.recipes"},
    {"compvis.report"},
    {"compvis.checkpoint", "compvis.export"},
    {"compvis.converted"},
    {
        "training.depth",
        "training.showing",
        "training.errors",
        "training.lock",
        "training.manifest",
        "training.keys",
        "training.signals",
    },
    {"training.options", "training.words", "training.checkpoints"},
    {"training.flags", "training.folder", "training.yaml_text", "opening", "hub"},
    {"proof"},
    {"card"},
    {"push_command"},
    {"training.checks"},
    {"training.config"},
    {"training.pictures", "training.sources"},
    {"training.columns", "training.condition_dropout"},
    {
        "training.data",
        "training.task",
        "training.optim",
        "training.records",
        "training.monitor",
        "training.processes",
        "training.export",
        "training.snapshot",
    },
    {
        "training.state",
        "training.denoisers",
        "training.preview",
        "training.evaluate",
        "training.report",
        "training.stream",
        "training.warm_start",
    },
    {"training.build", "training.bound", "training.pages", "training.publish", "training.curves"},
    {"training.run"},
    {"training.clock", "training.resume", "training.step", "training.validation"},
    {"training.keeping", "training.nonfinite"},
    {"training.gallery"},
    {"training.trainer"},
    {"subject", "sample_files", "sample_options"},
    {"fit_command"},
    {
        "sample_command",
        "convert_command",
        "convert_config_command",
        "evaluate_command",
        "plot_command",
        "verify_command",
    },
    {"report_command", "doctor_command"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"", "training", "compvis"}  # __init__ files: names handed out lazily, imported by nobody inside


def rooms() -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(name)
    return found


def imported(room: str) -> set[str]:
    """Rooms of this package that a module imports anywhere, inside functions too."""
    base = PACKAGE.joinpath(*room.split("."))
    tree = ast.parse(base.with_suffix(".py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    inside = {name.removeprefix("diffusers_ddpm_ext").lstrip(".") for name in names if name.startswith(PACKAGE.name)}
    return {name for name in inside if name in set(rooms()) - DOORS}


def test_every_room_has_a_floor():
    assert set(rooms()) - DOORS == set(FLOOR_OF), "a module was added or removed: say on which floor it stands"


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_imports_go_down(room):
    for other in imported(room):
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} imports {other}, which does not stand below it"


def test_training_folder_shadows_nothing():
    """`accelerate launch training/train.py` puts that folder first on sys.path."""
    assert {path.name for path in (PACKAGE.parent / "training").glob("*.py")} == {"train.py"}


def test_the_check_sees_imports():
    assert "schedule" in imported("gaussian")
