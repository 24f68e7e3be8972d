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


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 100_000, "levels"),
        ("- " * 100_000 + "1", "levels"),
        ("{a: " * 500 + "1" + "}" * 500, "levels"),
        (
            "a: &a [1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n"
            + "".join(f"c{i}: &{'cdefghij'[i]} [{', '.join(['*' + 'bcdefghi'[i]] * 9)}]\n" for i in range(8)),
            "aliases",
        ),
        ("a: [" + "1, " * 60_000 + "1]", "values"),
        ("a: " + "9" * 4_000, "4,000 characters"),
        ("a: 1" + ":10" * 100_000, "characters"),
        ("a: !!binary aGk=", "tag"),
        ("a: !!set {x}", "tag"),
        ("a: !my 1", "tag"),
        ('a: "\\ud800"', "Unicode"),
        ("? {b: 1}\n: 2", "line 1"),
        ("a: 1\n\ta: 2", "line 2"),
        ("a: *b", "alias"),
        ("a: 1\nb: 2\na: 3", "twice"),
    ],
    ids=range(15),
)
def test_yaml_without_end_or_sense_is_one_sentence(text, fault):
    with pytest.raises(ConfigError, match=fault) as caught:
        load_options(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_aliases_and_asterisks_of_configurations_are_read(tmp_path):
    """What counts is what aliases expand to; asterisks in comments and texts are not aliases."""
    text = "\ufeff# *see *also *the *paper *on *all *these *many *stars\nbase: &b {x: 1}\n"
    text += "".join(f"k{i}: *b\n" for i in range(50)) + "day: 2022-01-01\nglob: '*.png *.jpg'\n"
    (tmp_path / "m.yaml").write_text(text)
    content = load_compvis_yaml(tmp_path / "m.yaml")
    assert content["k49"] == {"x": 1}
    assert content["day"] == "2022-01-01"


def test_many_keys_are_read_in_linear_time():
    """60,000 keys were compared with each other: minutes. Linear: seconds, within any time limit of a test run."""
    assert len(load_options("".join(f"k{i}: 1\n" for i in range(20_000)))) == 20_000
