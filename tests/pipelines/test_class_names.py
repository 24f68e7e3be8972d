"""Names of classes: whole names first, then parts between commas; a wrong name gets the nearest."""

from __future__ import annotations

import pytest

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.pipelines.class_names import label_of_name, read_class_names

FOOD = {0: "Bread", 1: "Dairy product", 7: "Vegetable-Fruit", 8: "03"}


def test_keys_are_numbers_or_their_digits():
    assert read_class_names({"10": "b", "2": "a"}) == {2: "a", 10: "b"}
    assert list(read_class_names({"10": "b", "2": "a"})) == [2, 10]
    assert read_class_names({2: "a"}) == {2: "a"}
    assert read_class_names(None) == {}


@pytest.mark.parametrize(
    "wrong",
    [["a"], "a", 3, {"x": "a"}, {"-1": "a"}, {"01": "a"}, {"1.0": "a"}, {True: "a"}, {"²": "a"}, {"9" * 30: "a"},
     {"0": 3}, {"0": None}, {"0": " "}, {"0": ["a"]}, {0: "a", "0": "b"}],
)  # fmt: skip
def test_anything_else_is_refused(wrong):
    with pytest.raises(ConfigError, match="id2label"):
        read_class_names(wrong)


@pytest.mark.parametrize("number", FOOD)
def test_a_whole_name(number):
    assert label_of_name(FOOD[number], FOOD) == number


def test_a_whole_name_has_priority_over_a_part():
    names = {0: "tench, Tinca tinca", 1: "a, b", 2: "b"}
    assert label_of_name("Tinca tinca", names) == 0
    assert label_of_name("a, b", names) == 1
    assert label_of_name("b", names) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Braed", 'did you mean "Bread"'),
        ("bread", 'did you mean "Bread"'),
        ("dairy", 'did you mean "Dairy product"'),
        ("xyzxyz", 'the classes are "Bread", "Dairy product"'),
        ("\x1b[31mBread", r"\\u001b\[31mBread"),
    ],
)
def test_a_wrong_name_gets_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        label_of_name(name, FOOD)


def test_an_ambiguous_name_needs_a_number():
    with pytest.raises(ConfigError, match="names the classes 0, 1"):
        label_of_name("crane", {0: "crane", 1: "crane"})
    with pytest.raises(ConfigError, match="have no names"):
        label_of_name("crane", {})
