"""Every recipe is a complete run that parses; one copy of each exists."""

from __future__ import annotations

import pytest
from helpers.paths import ROOT

from diffusers_ddpm_ext.training.config.layers import recipes
from diffusers_ddpm_ext.training.config.train_config import parse_train_args

FOLDER = ROOT / "training" / "recipes"


def test_one_source():
    """The clone's folder is the package's: a wheel and a clone cannot differ."""
    assert FOLDER.resolve() == (ROOT / "diffusers_ddpm_ext" / "training" / "recipes").resolve()
    assert recipes() == sorted(path.stem for path in FOLDER.iterdir())
    known = "digits digits_eps digits_x0 digits_hybrid digits_classes cifar10 cifar10_iddpm folder64 compvis"
    assert set(known.split()) <= set(recipes())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_parses(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    by_path = parse_train_args(["--config", str(path)])
    assert by_path == parse_train_args(["--config", path.stem])
    assert by_path.loop.max_train_steps is not None
    assert path.read_text().startswith("# ")
    assert by_path.checkpoint.checkpoints_total_limit is not None, "a recipe must not fill the disk"


def test_compvis_words_are_translated():
    """CompVis' `linear` is a line in the square root of beta."""
    text = (FOLDER / "compvis.yaml").read_text()
    assert "beta_schedule: scaled_linear" in text
