"""safetensors files without torch: the same tensors as torch reads, and the same faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.utils import tensor_files
from diffusers_ddpm_ext.utils.tensor_files import FLOATS, first_not_finite, read_floats, read_tensor_headers

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(3, 5, generator=generator).to(dtype) for name, dtype in DTYPES.items()}
    others = {
        "counts": torch.arange(7),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor(True),
        "scalar": torch.ones(()),
    }
    save_file(tensors | others, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors"


def test_the_same_tensors_as_torch_reads(file):
    expected, headers = load_file(file), read_tensor_headers(file)
    assert headers.keys() == expected.keys()
    for name, header in headers.items():
        assert header.shape == tuple(expected[name].shape)
        assert header.count == expected[name].numel()
        assert header.is_floating == expected[name].is_floating_point()
        if header.dtype in FLOATS:
            np.testing.assert_array_equal(read_floats(file, header), expected[name].double().numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_not_finite(tmp_path, dtype, value, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK", 4)
    largest = torch.full((11,), torch.finfo(DTYPES[dtype]).max, dtype=DTYPES[dtype])
    tensors = {"a": largest, "b": -largest, "c": torch.zeros(3, dtype=torch.int64)}
    save_file(tensors, tmp_path / "fine.safetensors")
    assert first_not_finite(tmp_path / "fine.safetensors", read_tensor_headers(tmp_path / "fine.safetensors")) is None
    tensors["b"][9] = value
    save_file(tensors, tmp_path / "not.safetensors")
    assert first_not_finite(tmp_path / "not.safetensors", read_tensor_headers(tmp_path / "not.safetensors")) == "b"


def test_damage_is_refused_as_torch_refuses_it(file, tmp_path):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    damaged = {
        "cut": content[:-1],
        "longer": content + b"\0",
        "head": content[: 8 + length // 2],
        "length": (2**40).to_bytes(8, "little") + content[8:],
        "names": content[:8] + content[8:].replace(b"data_offsets", b"data_offsetz", 1),
        "empty": b"",
    }
    for name, wrong in damaged.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(wrong)
        with pytest.raises(Exception):  # noqa: B017, PT011 - the class differs between versions of safetensors
            load_file(path)
        with pytest.raises(ConfigError, match="not a complete safetensors file"):
            read_tensor_headers(path)
    with pytest.raises(ConfigError, match="missing"):
        read_tensor_headers(tmp_path / "missing.safetensors")
