"""Recipe under file under command line; written down and read back; the folder of a run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_train_args

DIGITS = yaml.safe_load((ROOT / "diffusers_ddpm_ext" / "training" / "recipes" / "digits.yaml").read_text())


@pytest.fixture(autouse=True)
def _photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "unet.json").touch()


def written(text: str, *flags: str) -> TrainConfig:
    Path("run.yaml").write_text(text)
    return parse_train_args([*(["--config", "run.yaml"] if text else []), *flags])


def refusal(text: str, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        written(text, *flags)
    return str(caught.value)


def test_digits_recipe_holds_only_without_data():
    digits = parse_train_args([]).to_flat_dict()
    for name, value in DIGITS.items():
        assert digits[name] == ([value, value] if name == "resolution" else value)
    photos = parse_train_args(["--train_data_dir", "photos"]).to_flat_dict()
    assert photos["prediction_type"] == "epsilon"
    assert photos["num_epochs"] == 100
    assert not photos["learn_logvar"]
    assert photos["use_ema"]
    named = parse_train_args(["--dataset_name", "someone/photos"])
    assert named.optim.learning_rate == 1e-4


def test_command_line_over_file_over_recipe():
    text = "learning_rate: 0.5\nprediction_type: sample\n"
    config = written(text, "--learning_rate", "0.25")
    assert config.optim.learning_rate == 0.25
    assert config.schedule.prediction_type == "sample"
    assert config.loop.train_batch_size == DIGITS["train_batch_size"]


def test_data_named_in_a_file_is_a_data_option():
    assert written("train_data_dir: photos\n").optim.learning_rate == 1e-4


def test_sections_and_flat_keys():
    config = written("optim:\n  learning_rate: 0.5\nddpm_num_steps: 10\n")
    assert config.optim.learning_rate == 0.5
    assert config.schedule.num_train_timesteps == 10


def test_yaml_numbers_that_yaml_reads_as_text():
    """YAML 1.1 takes 1e-4 for a string, and a bare `no` for false."""
    config = written("learning_rate: 1e-4\nmixed_precision: no\nuse_ema: off\n")
    assert config.optim.learning_rate == 1e-4
    assert config.loop.mixed_precision == "no"
    assert not config.ema.use_ema


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("learnin_rate: 1\n", "did you mean learning_rate?"),
        ("parameterization: eps\n", "--prediction_type"),
        ("ckpt_config: model.yaml\n", "does not exist"),
        ("seed: 1\nseed: 2\n", "seed is given twice"),
        ("loop: {seed: 1}\nseed: 2\n", "set twice"),
        ("ddpm_num_steps: 5\nnum_train_timesteps: 5\n", "set twice"),
        ("optim: {seed: 1}\n", "belongs to section loop"),
        ("optim: 5\n", "is a section"),
        ("seed: null\n", "got nothing"),
        ("seed: 1.5\n", "a whole number"),
        ("seed: true\n", "a whole number"),
        ("learning_rate: [1]\n", "takes a number"),
        ("learning_rate: .nan\n", "takes a number"),
        ("use_ema: 3\n", "true or false"),
        ("output_dir: 5\n", "takes text"),
        ("block_out_channels: {a: 1}\n", "whole numbers"),
        ("block_out_channels: [1.5]\n", "whole numbers"),
        ("lr_scheduler_args: [1]\n", "a JSON object"),
        ("- seed\n", "name: value"),
        ("seed: [1\n", "not YAML: line"),
        ("a: &x [*x]\n", "it contains itself"),
        ("5: 5\n", "not the name of an option"),
        ("!!python/object/apply:os.system ['touch pwned']\n", "is not allowed"),
    ],
)
def test_a_wrong_file_is_named(text, told):
    message = refusal(text)
    assert told in message
    assert "run.yaml" in message or message.startswith("--")
    assert not Path("pwned").exists()


def test_alternatives_replace_what_lies_below():
    assert written("num_epochs: 3\n").loop == written("", "--num_epochs", "3").loop
    loop = written("num_epochs: 3\n", "--max_train_steps", "7").loop
    assert (loop.num_epochs, loop.max_train_steps) == (None, 7)
    loop = written("", "--num_epochs", "3").loop
    assert (loop.num_epochs, loop.max_train_steps) == (3, None), "the recipe's step limit is set aside"
    data = written("dataset_name: a/b\nimage_column: img\n", "--train_data_dir", "photos").data
    assert (data.dataset_name, data.image_column, data.train_data_dir) == (None, None, "photos")
    data = written("", "--train_data_dir", "photos", "--validation_data_dir", "photos").data
    assert data.validation_fraction is None
    model = written("", "--model_config_name_or_path", "unet.json").model
    assert model.block_out_channels is None
    assert "contradict" in refusal("num_epochs: 3\nmax_train_steps: 7\n")
    assert "no end" in refusal("num_epochs: null\nmax_train_steps: null\n")


def test_arguments_of_a_schedule_belong_to_the_layer_that_chooses_it():
    """Another schedule on the command line is not given those of the recipe's or file's."""
    compvis = ["--config", "compvis", "--train_data_dir", "."]
    assert parse_train_args(compvis).optim.lr_scheduler_args["f_min"] == [1.0]
    assert parse_train_args([*compvis, "--lr_scheduler", "cosine"]).optim.lr_scheduler_args is None
    Path("run.yaml").write_text("lr_scheduler: polynomial\nlr_scheduler_args: {power: 2}\n")
    from_file = ["--config", "run.yaml"]
    assert parse_train_args(from_file).optim.lr_scheduler_args == {"power": 2}
    assert parse_train_args([*from_file, "--lr_scheduler", "linear"]).optim.lr_scheduler_args is None
    chosen = parse_train_args([*from_file, "--lr_scheduler_args", '{"power": 3}']).optim
    assert (chosen.lr_scheduler, chosen.lr_scheduler_args) == ("polynomial", {"power": 3})


def test_defaults_follow_what_they_depend_on():
    config = written("", "--ddpm_num_steps", "50", "--lr_scheduler", "constant", "--block_out_channels", "8", "8", "8")
    assert config.output.ddpm_num_inference_steps == 50
    assert config.optim.lr_warmup_steps == 0
    assert config.model.attention_levels == ()  # the recipe's: only the middle block
    folder = ["--train_data_dir", ".", "--norm_num_groups", "8"]
    assert parse_train_args([*folder, "--block_out_channels", "8", "8", "8"]).model.attention_levels == (1,)
    assert parse_train_args([*folder, "--block_out_channels", "8"]).model.attention_levels == (0,)
    with pytest.raises(ConfigError, match="attention_levels 2 does not exist"):
        written("attention_levels: [2]", "--block_out_channels", "8")


CHOICES = {
    "data": [{}, {"train_data_dir": "photos"}, {"dataset_name": "a/b", "validation_split": "test"}],
    "model": [
        {},
        {"block_out_channels": [32, 64], "norm_num_groups": 16},
        {"model_config_name_or_path": "unet.json"},
        {"block_out_channels": [8, 16], "norm_num_groups": 8, "attention_levels": []},
    ],
    "schedule": [
        {},
        {"trained_betas": [0.1, 0.2, 0.30000000000000004]},
        {"beta_schedule": "squaredcos_cap_v2", "cosine_s": 1e-3, "v_posterior": 0.4, "prediction_type": "sample"},
        {"num_train_timesteps": 1},
    ],
    "loop": [{}, {"num_epochs": 3}, {"max_train_steps": 4, "mixed_precision": "no"}, {"seed": 2**40}],
    "optim": [
        {},
        {"lr_scheduler": "polynomial", "lr_scheduler_args": {"power": 2.5}, "learning_rate": 1e-7},
        {"lr_scheduler": "constant"},
    ],
    "other": [{}, {"use_ema": False, "snr_gamma": 5}, {"learn_logvar": False, "save_images_epochs": 2}],
    "output": [{}, {"output_dir": "D"}],
}


@pytest.mark.parametrize("draw", range(40))
def test_resolved_file_reads_back_to_the_same_run(draw):
    """All options, floats to the last bit; the folder apart, so that repeating a run does not write over it."""
    rng = random.Random(draw)
    chosen = {k: v for options in CHOICES.values() for k, v in rng.choice(options).items()}
    config = TrainConfig.from_flat(chosen)
    config.write_resolved("config.yaml")
    again = parse_train_args(["--config", "config.yaml"])
    ours, theirs = config.to_flat_dict(), again.to_flat_dict()
    assert ours.pop("output_dir") == chosen.get("output_dir")
    assert theirs.pop("output_dir") is None
    assert ours == theirs
    assert {"output_dir", "overwrite_output_dir", "dry_run"}.isdisjoint(
        yaml.safe_load(Path("config.yaml").read_text())["output"]
    )


def test_to_flat_dict_is_plain():
    yaml.safe_dump(TrainConfig.from_flat({"trained_betas": [0.1, 0.2]}).to_flat_dict())


def test_parsing_writes_nothing():
    before = sorted(Path().rglob("*"))
    parse_train_args(["--output_dir", "a/b/c"])
    parse_train_args([])
    assert sorted(Path().rglob("*")) == before


def test_other_processes_do_not_judge_the_folder(monkeypatch):
    """The first process may have taken it before they look."""
    Path("D").mkdir()
    Path("D/x").touch()
    monkeypatch.setenv("RANK", "1")
    assert parse_train_args(["--output_dir", "D"]).output.output_dir == "D"
