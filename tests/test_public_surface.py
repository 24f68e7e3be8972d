"""The names that users import, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from helpers.paths import ROOT

import diffusers_ddpm_ext

PUBLIC = {
    "DDPMExtPipeline",
    "DDPMExtPipelineOutput",
    "DDPMExtScheduler",
    "DDPMObjective",
    "LambdaLinearScheduler",
    "LambdaWarmUpCosineScheduler",
    "LambdaWarmUpCosineScheduler2",
    "LitEMA",
    "NoiseSchedule",
    "ObjectiveOutput",
    "SpatialRescaler",
    "UNet2DExtModel",
    "__version__",
}

FROZEN_PATHS = {
    "gaussian": "Gaussian at_step q_sample q_mean_variance posterior velocity x0_from_v eps_from_v x0_from_eps"
    " eps_from_x0 v_from_x0 v_from_eps predict_x0 predict_eps training_target",
    "likelihood": "BitsPerDim BoundTerms bits_per_dim bound_terms prior_bits normal_kl"
    " discretized_gaussian_log_likelihood",
    "timesteps": "TimestepSampler LossSecondMomentSampler",
    "compvis": "load_compvis save_compvis",
    "compvis.weights": "convert_unet export_unet",
    "cli": "main",
    "training.data": "ImageData ImageSet load_data",
    "training.config": "TrainConfig parse_train_args",
    "training.checkpoints": "Checkpoint DamagedCheckpoint list_checkpoints newest verify",
    "training.trainer": "train",
}


def imported_by_hand() -> dict[str, str]:
    """Name -> room of the imports that a type checker sees."""
    tree = ast.parse((ROOT / "diffusers_ddpm_ext" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {name.name: str(node.module).removeprefix("diffusers_ddpm_ext.") for node in imports for name in node.names}


def test_public_names_are_frozen():
    assert set(diffusers_ddpm_ext.__all__) == PUBLIC
    assert len(diffusers_ddpm_ext.__all__) == len(PUBLIC)
    assert set(dir(diffusers_ddpm_ext)) >= PUBLIC


def test_type_checker_and_program_see_the_same_names():
    assert imported_by_hand() == diffusers_ddpm_ext._MODULES


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_name_is_the_one_of_its_room(name):
    room = importlib.import_module(f"diffusers_ddpm_ext.{imported_by_hand()[name]}")
    assert getattr(diffusers_ddpm_ext, name) is getattr(room, name)


def test_star_import_gives_the_public_names():
    names: dict[str, object] = {}
    exec("from diffusers_ddpm_ext import *", names)
    assert set(names) >= PUBLIC


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="DDPMTypo"):
        _ = diffusers_ddpm_ext.DDPMTypo


def test_diffusers_finds_our_classes_by_name():
    """A folder that names DDPMExtPipeline is looked up in the namespace of diffusers."""
    import diffusers

    assert diffusers.DDPMExtPipeline is diffusers_ddpm_ext.DDPMExtPipeline
    assert diffusers.DDPMExtScheduler is diffusers_ddpm_ext.DDPMExtScheduler


def test_import_loads_nothing_heavy():
    code = (
        "import sys, diffusers_ddpm_ext as p; dir(p); p.__version__; p.NoiseSchedule; p.LambdaLinearScheduler;"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'huggingface_hub', 'datasets'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_version_is_stated_once():
    assert diffusers_ddpm_ext.__version__.count(".") == 2
    try:
        assert version("diffusers-ddpm-ext") == diffusers_ddpm_ext.__version__
    except PackageNotFoundError:
        pytest.skip("the distribution is not installed")


def test_package_is_typed():
    assert (ROOT / "diffusers_ddpm_ext" / "py.typed").is_file()


@pytest.mark.parametrize("path", FROZEN_PATHS)
def test_documented_import_paths_are_frozen(path):
    """Each as a user writes it, and the name is that of the module that defines it."""
    for name in FROZEN_PATHS[path].split():
        names: dict = {}
        exec(f"from diffusers_ddpm_ext.{path} import {name}", names)
        value = names[name]
        assert getattr(importlib.import_module(value.__module__), name) is value


@pytest.mark.parametrize(("cls", "base"), [("DDPMExtScheduler", "SchedulerMixin"), ("UNet2DExtModel", "ModelMixin")])
def test_diffusers_finds_the_base_class_in_the_defining_module(cls, base):
    """Diffusers looks for these names in the module of a class before it loads one from a folder."""
    import diffusers

    module = importlib.import_module(getattr(diffusers_ddpm_ext, cls).__module__)
    assert getattr(module, base) is getattr(diffusers, base)


def test_console_script_is_frozen():
    assert 'ddpm-ext = "diffusers_ddpm_ext.cli:main"' in (ROOT / "pyproject.toml").read_text()
