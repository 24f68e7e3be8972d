"""Embeddings of images: what is not a real, finite (tokens, width) array of float32 is refused by row."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.conditions import check_precision
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.embeddings import read_embedding

FINE = np.arange(6, dtype=np.float32).reshape(2, 3)


def contexts(folder, second):
    """The embeddings of two images: the first is right, the second an array, or the content of a file."""
    np.save(folder / "first.npy", FINE)
    name = "second.npy"
    if isinstance(second, bytes):
        (folder / name).write_bytes(second)
    elif isinstance(second, torch.Tensor | dict):
        name = "second.safetensors"
        save_file(second if isinstance(second, dict) else {"x": second}, folder / name)
    elif isinstance(second, np.ndarray):
        np.save(folder / name, second, allow_pickle=True)
    else:
        name = second
    rows = [{"file_name": f"{i}.png", "words": words} for i, words in enumerate(["first.npy", name])]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number in range(2):
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    options = DataOptions(train_data_dir=str(folder), resolution=(8, 8), validation_fraction=0, context_column="words")
    return load_data(options, "crossattn").train.columns


@pytest.mark.parametrize(
    "second",
    [
        FINE.astype(np.float16),
        FINE.astype(np.int64),
        np.asfortranarray(FINE.astype(np.float64)),
        FINE.astype(">f4"),
        torch.from_numpy(FINE).bfloat16(),
        torch.from_numpy(FINE).half(),
        FINE.tolist(),
    ],
)
def test_every_real_type_is_read(second, tmp_path):
    first, other = contexts(tmp_path, second).contexts
    assert np.array_equal(first, FINE)
    assert np.array_equal(other, FINE)
    assert other.dtype == np.float32


nan, inf = float("nan"), float("inf")
WRONG = {
    "NaN": (np.array([[0, nan, 1]] * 2, np.float32), "NaN"),
    "infinity": (np.array([[0, -inf, 1]] * 2, np.float16), "infinite"),
    "float64 beyond float32": (np.array([[0, 1e300, 1]] * 2), "1e\\+300"),
    "just beyond float32": (np.array([[0, -3.5e38, 1]] * 2), "3.5e\\+38"),
    "complex": (FINE.astype(np.complex64), "complex"),
    "dates": (FINE.astype("datetime64[s]"), "datetime64"),
    "objects": (np.array([[{}, 1, 2]] * 2, object), "object"),
    "booleans": (FINE.astype(bool), "bool"),
    "text": (FINE.astype(str), "U"),
    "empty": (np.zeros((0, 3), np.float32), "empty"),
    "no width": (np.zeros((2, 0), np.float32), "empty"),
    "a number": (np.array(3, np.float32), "shape \\(\\)"),
    "three dimensions": (FINE[None], "shape \\(1, 2, 3\\)"),
    "other shape": (FINE.T, "shape \\(3, 2\\)"),
    "one token": (FINE[0], "shape \\(1, 3\\)"),
    "NaN in safetensors": (torch.tensor([[nan] * 3] * 2), "NaN"),
    "complex in safetensors": (torch.zeros(2, 3, dtype=torch.complex64), "complex"),
    "two arrays": ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, "2 arrays"),
    "cut off": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "npy"),
    "a huge promise": (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 99999), }".ljust(117)
        + b"\n",
        "promises",
    ),
    "no file": ("nowhere.npy", "does not exist"),
    "a caption": ("a photo of a cat", "is not a .npy or .safetensors file"),
    "ragged lists": ([[1, 2, 3], [1, 2]], "inhomogeneous"),
    "texts in lists": ([["1", "2", "3"]] * 2, "U1"),
    "booleans in lists": ([[True, False, True]] * 2, "bool"),
    "null": ([[None, 1, 2]] * 2, "object"),
    "an empty list": ([], "empty"),
    "no array": ({}, "0 arrays"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_embedding_is_refused_by_row(name, tmp_path):
    second, message = WRONG[name]
    with pytest.raises(ConfigError, match=rf"--context_column words: 1\.png .*{message}"):
        contexts(tmp_path, second)


@pytest.mark.parametrize("cell", [None, datetime.datetime(2020, 1, 1), b"abc", {1.0}, 1 + 2j, [[10**400]]])
def test_values_of_a_column_that_are_no_numbers(cell):
    with pytest.raises(ConfigError, match="row 3"):
        read_embedding("--context_column x: row 3", cell)


def test_values_that_float16_cannot_hold_need_another_precision(tmp_path):
    columns = contexts(tmp_path, FINE * 20_000)
    for precision in ("no", "bf16"):
        check_precision(columns, precision)
    with pytest.raises(ConfigError, match="100000 exceeds the 65504 of float16"):
        check_precision(columns, "fp16")
