"""Names and values of the rows of a table are those of lists of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.class_labels import Column, read_class_labels
from diffusers_ddpm_ext.training.data.row_names import ChosenNames, RowNames, RowValues, distinct_values


def test_names_are_a_sequence():
    names = RowNames(12)
    expected = [f"row {number}" for number in range(12)]
    assert list(names) == expected
    assert (names[-1], names[3:5], "row 11" in names, "row 12" in names) == ("row 11", expected[3:5], True, False)
    with pytest.raises(IndexError):
        names[12]
    chosen = ChosenNames(names, np.array([1, 4, 11]))
    assert list(chosen) == ["row 1", "row 4", "row 11"]
    assert chosen[-1] == "row 11"


@pytest.mark.parametrize("rows", [None, [0, 3, 4, 8]])
def test_labels_of_codes_are_those_of_the_values(rows):
    values = ["b", "a", "b", "c", "a", "a", "b", "d", "c"]
    coded = RowValues(["b", "a", "c", "d"], np.array([0, 1, 0, 2, 1, 1, 0, 3, 2], np.int32))
    names = RowNames(len(values)) if rows is None else ChosenNames(RowNames(len(values)), rows)
    listed = dict(zip(RowNames(len(values)), values, strict=True))
    assert dict(coded) == listed
    one, other = (read_class_labels("--class_column x", Column(cells), names) for cells in (coded, listed))
    assert torch.equal(one.labels, other.labels)
    assert one.names == other.names
    for got, expected in zip(distinct_values(coded, names), distinct_values(listed, names), strict=True):
        assert list(got) == list(expected)


def test_values_that_are_equal_but_different():
    """Python calls 1, 1.0 and True equal: only the first one is a class."""
    names = ["a", "b", "c"]
    for wrong in (1.5, True):
        with pytest.raises(ConfigError, match="c has the label"):
            read_class_labels("x", Column(dict(zip(names, [1, 1, wrong], strict=True))), names)


def test_the_first_image_with_a_wrong_value_is_named():
    values = {f"row {number}": value for number, value in enumerate(["a", "b", "", "a", ""])}
    with pytest.raises(ConfigError, match="row 2 has no class"):
        read_class_labels("x", Column(values), list(values))


def test_a_column_of_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    from diffusers_ddpm_ext.training.data.sources import DatasetSource

    values = ["x", "y", None, "x"]
    table = datasets.concatenate_datasets(
        [datasets.Dataset.from_dict({"image": [b""] * 2, "kind": part}) for part in (values[:2], ["z", "x"])]
    )
    source = DatasetSource("--dataset_name d", table, "image", RowNames(4), table)
    assert dict(source.read_labels("kind").values) == {"row 0": "x", "row 1": "y", "row 2": "z", "row 3": "x"}
    reordered = table.select([3, 1])
    source = DatasetSource("--dataset_name d", reordered, "image", RowNames(2), reordered)
    assert dict(source.read_labels("kind").values) == {"row 0": "x", "row 1": "y"}
    holes = datasets.Dataset.from_dict({"image": [b""] * 4, "kind": values})
    source = DatasetSource("--dataset_name d", holes, "image", RowNames(4), holes)
    with pytest.raises(ConfigError, match="row 2 has no class: its value is empty"):
        read_class_labels("x", source.read_labels("kind"), source.names)
