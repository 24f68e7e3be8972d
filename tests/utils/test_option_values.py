"""Values of options from the command line and from YAML: paths, numbers, JSON, and files with lists."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffusers_ddpm_ext.cli
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.options import OPTIONS
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_train_args
from diffusers_ddpm_ext.utils.network_budget import check_network_config
from diffusers_ddpm_ext.utils.option import Option, option, options_of
from diffusers_ddpm_ext.utils.option_values import convert_value


def every_option() -> list[Option]:
    """The options of every command, training included."""
    options = list(OPTIONS.values())
    for module in pkgutil.iter_modules(diffusers_ddpm_ext.cli.__path__):
        loaded = importlib.import_module(f"diffusers_ddpm_ext.cli.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and value.__module__ == loaded.__name__ and value.__name__.endswith("Options"):
                options += options_of(value).values()
    return options


PATH_OPTIONS = sorted({option.name for option in every_option() if option.is_path})


def test_every_option_that_names_a_file_or_folder_is_a_path():
    """Texts without ``path=True`` are listed here, so that a new option cannot be forgotten."""
    texts = {option.name for option in every_option() if option.hint is str and not option.is_path}
    assert texts <= {
        "array_key", "background", "caption_column", "class_column", "commit_message", "concat_column",
        "context_column", "dataset_config_name",
        "device", "hub_model_id", "hub_token", "image_column", "license", "monitor", "report_to", "resume_from_hub",
        "revision", "scheduler", "text_encoder_subfolder", "vae_subfolder", "validation_split", "variant",
    }  # fmt: skip


@pytest.mark.parametrize("name", PATH_OPTIONS)
def test_the_home_folder_is_expanded_in_every_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for each in every_option():
        if each.name == name and each.is_path:
            for text in ("~/x", "~", "~/a b/~c", "a/~/x"):
                expected = text.replace("~", "/home/me", 1) if text[0] == "~" else text
                if each.hint == tuple[str, ...]:
                    assert convert_value(each, [text], "--x") == (expected,)
                else:
                    assert str(convert_value(each, text, "--x")) == expected


def test_the_home_folder_is_expanded_in_files_and_python(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "betas.npy", np.linspace(0.1, 0.9, 5))
    (tmp_path / "run.yaml").write_text(
        "output_dir: ~/out\ntrained_betas: ~/betas.npy\nprediction_type: v_prediction\n"
    )
    config = parse_train_args(["--config=~/run.yaml"])
    assert config.output.output_dir == str(tmp_path / "out")
    assert len(config.schedule.trained_betas) == 5
    assert TrainConfig.from_flat({"output_dir": "~/out"}).output.output_dir == str(tmp_path / "out")
    assert OPTIONS["class_column"].is_path is False
    assert convert_value(OPTIONS["class_column"], "~", "x") == "~", "the name of a column"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("~nobody-of-that-name/x", "no such user"),
        ("a" * 256, "256 bytes"),
        ("x/" + "\u00e9" * 128 + "/y", "256 bytes"),
        ("a\0b", "NUL"),
        ("/".join(["a"] * 2100), "no file can have"),
        ("  ", "takes"),
    ],
)
def test_names_that_no_file_can_have(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        convert_value(OPTIONS["output_dir"], text, "--output_dir")
    assert len(str(caught.value)) < 400


DEEP = "[" * 10_000 + "]" * 10_000
WRONG: dict[str, tuple[str, Any]] = {
    "an integer of 4,000 digits": ("seed", "9" * 4000),
    "an integer of 5,000 digits": ("seed", "9" * 5000),
    "an integer of 65 bits in YAML": ("seed", 2**64),
    "an integer beyond float64": ("learning_rate", 10**400),
    "a float for a count": ("seed", 1.0),
    "infinity": ("learning_rate", float("inf")),
    "a text of infinity": ("learning_rate", "1e999"),
    "a boolean for a number": ("learning_rate", True),
    "deep JSON": ("model_config", DEEP),
    "NaN in JSON": ("model_config", '{"dropout": NaN}'),
    "infinity in YAML": ("lr_scheduler_args", {"power": [{"x": float("inf")}]}),
    "a huge integer in YAML": ("lr_scheduler_args", {"power": 10**30}),
    "a key twice": ("lr_scheduler_args", '{"power": 1, "power": 2}'),
    "a list for an object": ("lr_scheduler_args", "[1]"),
    "a lone surrogate": ("class_column", "\udcff"),
    "a lone surrogate in JSON": ("model_config", '{"a": "\\ud800"}'),
    "a deep list": ("trained_betas", DEEP),
    "NaN in a list": ("trained_betas", "[0.1, NaN]"),
    "a missing list": ("trained_betas", "nowhere.npy"),
    "a long choice": ("beta_schedule", "x" * 100_000),
    "many timesteps": ("num_train_timesteps", 10**9),
    "many layers": ("layers_per_block", 10**6),
    "a number for a path": ("output_dir", 5),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_one_short_sentence(name):
    option, value = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        convert_value(OPTIONS[option], value, f"--{option}")
    assert f"--{option}" in str(caught.value)
    assert len(str(caught.value)) < 500


@dataclass(frozen=True)
class Prompts:
    """An option of prompts, and one of names."""

    prompts: tuple[str, ...] | None = option(None, "Prompts.", phrases=True)
    names: tuple[str, ...] | None = option(None, "Names.")


def test_prompts_keep_their_spaces_and_may_be_empty():
    prompts, names = options_of(Prompts).values()
    assert convert_value(prompts, "a cat", "--prompts") == ("a cat",)
    assert convert_value(prompts, ["a cat", "", " "], "--prompts") == ("a cat", "", " ")
    assert convert_value(names, "a cat", "--names") == ("a", "cat")
    for texts, value in ((names, [""]), (prompts, []), (prompts, [3]), (prompts, ["\udcff"])):
        with pytest.raises(ConfigError):
            convert_value(texts, value, "--texts")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2",
        b'{"a": 1}',
        b"[NaN]",
        b"\xff\xfe[",
        DEEP.encode(),
        b"[" + b"9" * 4000 + b"]",
        b'["1", "2"]',
        b"7",
    ],
)
def test_files_with_lists_are_read_with_bounds(content, tmp_path):
    (tmp_path / "betas.json").write_bytes(content)
    if content == b'["1", "2"]':  # texts of numbers are numbers, as in YAML
        return
    with pytest.raises(ConfigError, match="--trained_betas"):
        convert_value(OPTIONS["trained_betas"], str(tmp_path / "betas.json"), "--trained_betas")


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2)), np.array(["a"]), np.array([1 + 1j]), np.array([{}], object), np.array([np.nan])]
)
def test_arrays_that_are_no_lists_of_numbers(array, tmp_path):
    np.save(tmp_path / "betas.npy", array, allow_pickle=True)
    with pytest.raises(ConfigError, match="--trained_betas"):
        convert_value(OPTIONS["trained_betas"], str(tmp_path / "betas.npy"), "--trained_betas")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_per_block": 10**6}, "layers_per_block is 1,000,000"),
        ({"block_out_channels": [8] * 2000}, "2,000 levels"),
        ({"block_out_channels": [60_000] * 6}, "GB"),
        ({"down_block_types": ["DownBlock2D"] * 100}, "100 levels"),
        ({"layers_per_block": [2, 10**9]}, "1,000,000,000"),
        ({"num_class_embeds": 10**10}, "10,000,000,000"),
        ({"in_channels": 0}, "in_channels is 0"),
    ],
)
def test_networks_that_no_machine_builds_are_refused(config, message, tmp_path):
    check_network_config({"block_out_channels": [128, 256, 512], "layers_per_block": 2, "sample_size": None}, "x")
    with pytest.raises(ConfigError, match=f"--model_config.*{message}"):
        check_network_config(config, "--model_config")
    with pytest.raises(ConfigError, match="--model_config"):
        TrainConfig.from_flat({"model_config": config, "output_dir": str(Path(tmp_path, "run"))})
