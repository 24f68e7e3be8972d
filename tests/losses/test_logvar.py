"""The log-variance table: creation, file format, and errors of damaged files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.losses.logvar import ContinuousLogvar, load_continuous, load_logvar, make_logvar, save_logvar
from diffusers_ddpm_ext.models.class_embedder import load_class_embedder, save_class_embedder
from diffusers_ddpm_ext.models.ema_metadata import load_ema_metadata

WEIGHTS = "logvar/diffusion_pytorch_model.safetensors"


def test_new_tables():
    torch.testing.assert_close(make_logvar(4, 0.25), torch.full((4,), 0.25), rtol=0, atol=0)
    init = torch.arange(3, dtype=torch.float64)
    table = make_logvar(3, init)
    assert table.dtype == torch.float32
    init[0] = 7
    assert table[0] == 0
    table[1] = 5  # its own memory, not an expanded view
    one = make_logvar(3)
    one[0] = 1
    assert one.tolist() == [1, 0, 0]


@pytest.mark.parametrize("init", [float("nan"), float("inf"), torch.zeros(3), torch.zeros(4, 1)])
def test_bad_start_values(init):
    with pytest.raises(ValueError, match="logvar_init"):
        make_logvar(4, init)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    table = torch.linspace(-5, 3, 100, dtype=dtype).requires_grad_()
    place = save_logvar(tmp_path, table, source="test")
    assert place == tmp_path / "logvar"
    loaded = load_logvar(tmp_path)
    assert loaded.dtype == torch.float32
    assert not loaded.requires_grad
    torch.testing.assert_close(loaded, table.detach().float(), rtol=0, atol=0)
    assert load_logvar(tmp_path, 100) is not None


def test_file_format(tmp_path):
    save_logvar(tmp_path, torch.arange(6.0))
    assert sorted(p.name for p in (tmp_path / "logvar").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((tmp_path / "logvar/config.json").read_text()) == {"format": 1, "num_train_timesteps": 6}
    tensors = load_file(tmp_path / WEIGHTS)
    assert list(tensors) == ["logvar"]
    np.testing.assert_array_equal(tensors["logvar"].numpy(), np.arange(6, dtype=np.float32))


def test_a_folder_without_one_gives_none(tmp_path):
    assert load_logvar(tmp_path) is None


def damage(folder, what):
    weights, config = folder / WEIGHTS, folder / "logvar/config.json"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif what == "garbage":
        weights.write_bytes(b"not a safetensors file")
    elif what == "missing":
        weights.unlink()
    elif what == "length":
        save_file({"logvar": torch.zeros(5)}, weights)
    elif what == "key":
        save_file({"other": torch.zeros(6)}, weights)
    elif what == "shape":
        save_file({"logvar": torch.zeros(6, 1)}, weights)
    elif what == "integers":
        save_file({"logvar": torch.zeros(6, dtype=torch.int64)}, weights)
    elif what == "nan":
        save_file({"logvar": torch.full((6,), float("nan"))}, weights)
    else:
        {"no config": config.unlink, "torn config": lambda: config.write_text('{"format": 1,')}.get(
            what, lambda: config.write_text(what)
        )()


@pytest.mark.parametrize("what", ["truncated", "garbage", "missing", "length", "key", "shape", "integers", "nan"])
def test_damaged_weights_name_the_file(tmp_path, what):
    save_logvar(tmp_path, torch.zeros(6))
    damage(tmp_path, what)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        load_logvar(tmp_path)


@pytest.mark.parametrize(
    "what", ["no config", "torn config", "[]", '{"format": 2, "num_train_timesteps": 6}', '{"format": 1}']
)
def test_damaged_config_names_the_file(tmp_path, what):
    save_logvar(tmp_path, torch.zeros(6))
    damage(tmp_path, what)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_logvar(tmp_path)


def test_wrong_length_for_the_scheduler(tmp_path):
    save_logvar(tmp_path, torch.zeros(6))
    with pytest.raises(ValueError, match=r"6 steps.*scheduler says 1000"):
        load_logvar(tmp_path, 1000)


def test_only_a_table_is_written(tmp_path):
    for table in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="logvar must be a floating tensor"):
            save_logvar(tmp_path, table)
    assert not list(tmp_path.iterdir())


def test_a_continuous_logvar_is_saved_with_its_table(tmp_path):
    levels = torch.linspace(9, -10, 50, dtype=torch.float64)
    network = ContinuousLogvar(levels, init=0.25)
    assert network.table().tolist() == [0.25] * 50
    with torch.no_grad():
        network.weights.normal_(generator=torch.Generator().manual_seed(0))
    save_logvar(tmp_path, network.table(), network)
    torch.testing.assert_close(load_logvar(tmp_path, 50), network.table().detach(), rtol=0, atol=0)
    again = load_continuous(tmp_path, levels)
    torch.testing.assert_close(again.table(), network.table(), rtol=0, atol=0)
    finer = load_continuous(tmp_path, torch.linspace(9, -10, 99, dtype=torch.float64))
    torch.testing.assert_close(finer.table()[::2], network.table(), rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(network(torch.tensor([-float("inf"), 500.0]))).all())


def test_a_table_has_no_continuous_logvar(tmp_path):
    assert load_continuous(tmp_path, torch.zeros(3)) is None
    save_logvar(tmp_path, torch.zeros(3))
    assert load_continuous(tmp_path, torch.zeros(3)) is None


def test_a_damaged_continuous_logvar_is_named(tmp_path):
    levels = torch.linspace(1, -1, 5)
    network = ContinuousLogvar(levels)
    place = save_logvar(tmp_path, network.table(), network)
    save_file({"logvar": torch.zeros(5)}, place / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="does not hold a continuous log-variance"):
        load_continuous(tmp_path, levels)


LOADERS = {
    "logvar": load_logvar,
    "continuous": lambda folder: load_continuous(folder, torch.zeros(3)),
    "ema.json": load_ema_metadata,
    "class_embedder": load_class_embedder,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_folder_that_does_not_exist_is_refused(load, tmp_path):
    (tmp_path / "ddpm-cats").mkdir()
    (tmp_path / "a file").touch()
    assert load(tmp_path / "ddpm-cats") is None
    for name, message in (
        ("ddpm-cat", "ddpm-cat does not exist; in .* there is ddpm-cats"),
        ("nowhere/at/all", "does not exist"),
        ("n" * 300, "does not exist"),
        ("a file", "a file is a file: give a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)


def test_the_inner_folder_is_not_the_pipelines(tmp_path):
    place = save_logvar(tmp_path, torch.zeros(6))
    with pytest.raises(ValueError, match="give the pipeline's, its parent"):
        load_logvar(place)


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "true", "3", "[]", "\ufeff", "{}", '{"format": true}', '{"format": "1"}', '{"format": 1}',
        '{"format": 1, "num_train_timesteps": true}', '{"format": 1, "num_train_timesteps": 6.0}',
        '{"format": 1, "num_train_timesteps": -6}', '{"format": 1, "num_train_timesteps": 1e9}',
        '{"format": 1, "num_train_timesteps": 1' + "0" * 4000 + "}", '{"format": 1, "num_train_timesteps": NaN}',
        "[" * 10_000, b"\xff\xfe", '{"format": 1, "num_train_timesteps": 6, "num_train_timesteps": 7}',
    ],
)  # fmt: skip
def test_any_other_config_is_one_sentence(tmp_path, text):
    place = save_logvar(tmp_path, torch.zeros(6))
    (place / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_logvar(tmp_path)


@pytest.mark.parametrize("kind", ["spline", 3, None, []])
def test_an_unknown_kind_is_not_taken_for_a_table(tmp_path, kind):
    save_logvar(tmp_path, torch.zeros(6), kind=kind)
    with pytest.raises(ConfigError, match="kind"):
        load_continuous(tmp_path, torch.zeros(6))


@pytest.mark.parametrize(
    ("name", "value"), [("weights", "nan"), ("frequencies", "inf"), ("spread", 0), ("spread", -1)]
)
def test_a_continuous_logvar_of_wrong_values_is_refused(tmp_path, name, value):
    levels = torch.linspace(1, -1, 5)
    network = ContinuousLogvar(levels)
    with torch.no_grad():
        network.state_dict()[name].fill_(float(value))
    save_logvar(tmp_path, torch.zeros(5), network)
    with pytest.raises(ConfigError, match=f"continuous.{name}"):
        load_continuous(tmp_path, levels)


@pytest.mark.parametrize(
    "text",
    [
        "null", '{"format": 1}', '{"format": 1, "decay": NaN, "num_updates": 3}', '{"format": 9}',
        '{"format": 1, "decay": 2, "num_updates": 3}', '{"format": 1, "decay": 0.9, "num_updates": -2}',
        '{"format": 1, "decay": 0.9, "num_updates": 3.5}', '{"format": 1, "decay": "0.9", "num_updates": 3}',
        '{"format": 1, "decay": true, "num_updates": 3}', '{"format": 1, "decay": 0.9, "num_updates": 1e400}',
        '{"format": 1, "decay": 0.9, "num_updates": 99999999999999999999}',
    ],
)  # fmt: skip
def test_ema_metadata_of_wrong_values_is_refused(tmp_path, text):
    (tmp_path / "ema.json").write_text(text)
    with pytest.raises(ConfigError, match=r"ema\.json"):
        load_ema_metadata(tmp_path)


@pytest.mark.parametrize(
    ("table", "config", "message"),
    [
        (torch.full((2, 3), float("nan")), None, "not finite"),
        (torch.zeros(2, 4), None, "has shape"),
        (torch.zeros(2, 3, dtype=torch.int64), None, "no floating tensor"),
        (torch.zeros(2, 3), "[]", "not an object"),
        (torch.zeros(2, 3), '{"format": 1, "num_classes": "2", "dim": 3}', "num_classes"),
        (torch.zeros(2, 3), '{"format": 1, "num_classes": -2, "dim": 3}', "num_classes"),
        (torch.zeros(2, 3), '{"format": 7, "num_classes": 2, "dim": 3}', "format"),
    ],
)
def test_a_damaged_class_embedder_is_refused(tmp_path, table, config, message):
    save_class_embedder(tmp_path, torch.zeros(2, 3))
    place = tmp_path / "class_embedder"
    save_file({"class_embedder": table}, place / "diffusion_pytorch_model.safetensors")
    if config is not None:
        (place / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        load_class_embedder(tmp_path)
