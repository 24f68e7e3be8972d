"""The two readers of one strict YAML loader: option files and CompVis configurations."""

from __future__ import annotations

import pytest

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils.yaml_io import dump_options, load_compvis_yaml, load_options


def test_only_compvis_files_read_a_bare_exponent_as_a_number(tmp_path):
    """An option file keeps 1e-4 as text, which the option's own type then reads."""
    (tmp_path / "m.yaml").write_text("a: 1e-4\nb: 1.0e-4\n")
    assert load_compvis_yaml(tmp_path / "m.yaml") == {"a": 1e-4, "b": 1e-4}
    assert load_options("a: 1e-4\nb: 1.0e-4\n") == {"a": "1e-4", "b": 1e-4}


def test_only_compvis_files_repeat_the_merge_key(tmp_path):
    text = "a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n"
    (tmp_path / "m.yaml").write_text(text)
    assert load_compvis_yaml(tmp_path / "m.yaml")["c"] == {"x": 1, "y": 2}
    with pytest.raises(ConfigError, match="<< is given twice"):
        load_options(text)


def test_dumped_options_read_back_equal():
    options = {"loop": {"seed": 1, "names": ["a", "ü", "1e-4"]}, "rate": 1e-4, "flag": True, "none": None}
    assert load_options(dump_options(options)) == options
    assert "names: [a, ü, 1e-4]" in dump_options(options)
