"""Original configurations: every key is translated, without effect, or refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.conversion_cases import BASE, CASES, FOLDER, content
from PIL import Image

from diffusers_ddpm_ext import DDPMExtScheduler, DDPMObjective
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis.architecture import translate_unet
from diffusers_ddpm_ext.compvis.config.ddpm import read_compvis_config
from diffusers_ddpm_ext.compvis.config.recipe import recipe, write_recipe
from diffusers_ddpm_ext.compvis.config.run_keys import leaves
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_train_args
from diffusers_ddpm_ext.utils.vocabulary import REQUIRED_CONDITIONS
from diffusers_ddpm_ext.utils.yaml_io import load_compvis_yaml

DDPM = "ldm.models.diffusion.ddpm.DDPM"
LATENT = "ldm.models.diffusion.ddpm.LatentDiffusion"
FULL: dict[str, Any] = {
    "model": {
        "base_learning_rate": 1e-6,
        "target": LATENT,
        "params": {
            "linear_start": 0.0015, "linear_end": 0.0195, "num_timesteps_cond": 1, "log_every_t": 200,
            "timesteps": 1000, "loss_type": "l1", "first_stage_key": "image", "cond_stage_key": "class_label",
            "image_size": 64, "channels": 3, "cond_stage_trainable": False, "concat_mode": False,
            "monitor": "val/loss_simple_ema", "original_elbo_weight": 0.001, "v_posterior": 0.2,
            "parameterization": "v", "learn_logvar": True, "logvar_init": 0.5, "scale_factor": 0.18,
            "scheduler_config": {
                "target": "ldm.lr_scheduler.LambdaLinearScheduler",
                "params": {"warm_up_steps": [100], "cycle_lengths": [1000], "f_start": [1e-6], "f_max": [1.0],
                           "f_min": [1.0], "verbosity_interval": 5},
            },
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                            "params": BASE | {"image_size": 64, "use_checkpoint": True}},
            "first_stage_config": {"target": "ldm.models.autoencoder.VQModelInterface", "params": {"embed_dim": 3}},
            "cond_stage_config": "__is_unconditional__",
        },
    },
    "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 48, "num_workers": 5, "wrap": False}},
    "lightning": {"trainer": {"benchmark": True, "accumulate_grad_batches": 2, "max_epochs": 7}},
}  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    """The full configuration with one entry changed."""
    config = copy.deepcopy(FULL)
    place = config
    *steps, last = path.split(".")
    for step in steps:
        place = place[step]
    place[last] = value
    return config


def test_nothing_is_dropped():
    """Each leaf of the file has a row, or stands below one."""
    rows = {row.key for row in read_compvis_config(FULL).rows}
    for key, _ in leaves(FULL, ""):
        key = key.lstrip(".")
        assert any(key == row or key.startswith(f"{row}.") for row in rows), key
    assert all(row.note for row in read_compvis_config(FULL).rows)


def test_words():
    config = read_compvis_config(FULL)
    assert config.schedule == {
        "num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear",
        "v_posterior": 0.2, "prediction_type": "v_prediction", "clip_sample": False,
    }  # fmt: skip
    assert config.objective == {
        "loss_type": "l1", "l_simple_weight": 1.0, "original_elbo_weight": 0.001, "elbo_weights": "compvis",
        "learn_logvar": True, "logvar_init": 0.5,
    }  # fmt: skip
    assert (config.conditioning_key, config.samples.latent, config.samples.scale_factor, config.samples.channels) == (
        None,
        True,
        0.18,
        3,
    )
    assert config.training == {
        "use_ema": True, "learning_rate": 1e-6, "lr_scaling": "linear", "monitor": "val/loss_simple_ema",
        "lr_scheduler": "LambdaLinearScheduler",
        "lr_scheduler_args": {"warm_up_steps": [100], "cycle_lengths": [1000], "f_start": [1e-6], "f_max": [1.0],
                              "f_min": [1.0]},
        "train_batch_size": 48, "dataloader_num_workers": 5, "gradient_accumulation_steps": 2, "num_epochs": 7,
    }  # fmt: skip
    assert DDPMObjective(DDPMExtScheduler(**config.schedule), **config.objective)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("sqrt_linear", "sqrt_linear"), ("sqrt", "sqrt")]
)
def test_schedules_match_register_schedule(ours, theirs):
    """The scheduler's own translation is tested against recorded tables."""
    config = read_compvis_config(changed("model.params.beta_schedule", theirs))
    scheduler, truth = DDPMExtScheduler(**config.schedule), DDPMExtScheduler(v_posterior=0.2)
    truth.register_schedule(beta_schedule=ours, timesteps=1000, linear_start=0.0015, linear_end=0.0195)
    assert np.array_equal(scheduler.schedule.betas, truth.schedule.betas)


@pytest.mark.parametrize(
    ("target", "key", "mode", "stage", "expected"),
    [
        (DDPM, None, None, None, None),
        (DDPM, "concat", None, None, "concat"),
        (LATENT, None, True, {"target": "torch.nn.Identity"}, "concat"),
        (LATENT, None, False, {"target": "torch.nn.Identity"}, "crossattn"),
        (LATENT, "hybrid", None, {"target": "torch.nn.Identity"}, "hybrid"),
        (LATENT, None, True, "__is_unconditional__", None),
        (LATENT, "crossattn", None, "__is_unconditional__", None),
        (LATENT, None, None, "__is_first_stage__", "concat"),
    ],
)
def test_conditioning_keys_as_the_classes_resolve_them(target, key, mode, stage, expected):
    config = copy.deepcopy(FULL)
    config["model"]["target"] = target
    params = {"conditioning_key": key, "concat_mode": mode, "cond_stage_config": stage}
    config["model"]["params"] = {k: v for k, v in config["model"]["params"].items() if k not in params}
    config["model"]["params"] |= {name: value for name, value in params.items() if value is not None}
    assert read_compvis_config(config).conditioning_key == expected


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.target", "ldm.models.autoencoder.AutoencoderKL", "autoencoder"),
        ("model.target", "os.system", "not a known class"),
        ("model.target", "ldm.DDMP", "did you mean DDPM"),
        ("model.params.unet_config.target", "ldm.UNetModelDualcondV2", "structure encoder"),
        ("model.params.unet_config.target", "os.system", "UNetModel"),
        ("model.params.loss_type", "l3", "loss_type"),
        ("model.params.beta_schedule", "exp", "beta_schedule"),
        ("model.params.parameterization", "mu", "parameterization"),
        ("model.params.conditioning_key", "all", "conditioning_key"),
        ("model.params.time_steps", 5, "time_steps"),
        ("model.params.p2_gamma", 0.5, "p2_gamma"),
        ("model.params.monitor", "val/rec_loss", "monitor"),
        ("model.params.scheduler_config", {"target": "os.system"}, "scheduler_config"),
        ("model.params.unet_config.params.num_head", 5, "num_head"),
        ("model.extra", 1, "model.extra"),
        ("model.params.image_size", "${data.size}", "refers to another key"),
        ("more", 1, "more"),
        ("model.params", [1], "model.params"),
    ],
)
def test_unsupported_keys_are_refused_by_name(path, value, message):
    with pytest.raises(ValueError, match=message):
        read_compvis_config(changed(path, value))


def test_refused_keys_may_be_left_out():
    config = read_compvis_config(changed("model.params.p2_gamma", 0.5), strict=False)
    assert [row.key for row in config.rows if row.fate == "refused"] == ["model.params.p2_gamma"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {target: a\n", "YAML"),
        ("- 1\n", "no configuration"),
        ("a: 1\na: 2\n", "twice"),
        ("a: !!python/object/apply:os.system ['true']\n", "YAML"),
        (
            "a: &a [1, 2]\n"
            + "".join(f"b{i}: &b{i} [*{'ab'[i > 0]}{i - 1 if i else ''}, 3, *a]\n" for i in range(9))
            + "".join(f"c{i}: &c{i} [" + f"*{'c' if i else 'b8'}{i - 1 if i else ''}, " * 9 + "]\n" for i in range(9)),
            "aliases",
        ),
        ("\x00\x01", "YAML|text"),
    ],
)
def test_files_that_are_not_configurations(text, message, tmp_path):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_compvis_yaml(tmp_path / "m.yaml")
    assert "\n" not in str(error.value)


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "m.yaml").write_text("a: 1e-4\nb: 4.5e-06\nc: 5\nd: 1.E-3\n")
    assert load_compvis_yaml(tmp_path / "m.yaml") == {"a": 1e-4, "b": 4.5e-06, "c": 5, "d": 1e-3}


@pytest.mark.parametrize("case", sorted(CASES))
def test_recorded_configurations(case):
    config = read_compvis_config(FOLDER / f"{case}.yaml")
    assert config.unet_params == content(case)["model"]["params"]["unet_config"]["params"]
    assert config.conditioning_key == CASES[case]["conditioning_key"]


def columns(model: dict[str, Any]) -> dict[str, str]:
    """Names of the columns that a run with these options of the network needs."""
    options = {"concat_inputs": "concat_column", "encoder_hidden_states": "context_column"}
    needed = REQUIRED_CONDITIONS[model.get("conditioning_key")]
    return {option: "x" for condition, option in options.items() if condition in needed}


@pytest.mark.parametrize("case", [FULL, *(FOLDER / f"{case}.yaml" for case in ("ema", "concat", "hybrid"))])
def test_recipes_are_options_of_our_trainer(case, tmp_path, capsys, monkeypatch):
    """The written file is parsed, with every value at its option."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "model.yaml"
    source.write_text(yaml.safe_dump(case) if isinstance(case, dict) else case.read_text())
    assert main(["convert-config", str(source), "--out", "run.yaml"]) == 0
    output = capsys.readouterr().out
    config = read_compvis_config(source)
    assert all(row.key in output for row in config.rows)
    images = tmp_path / "images"
    images.mkdir()
    (images / "metadata.csv").write_text("file_name\n")
    written = yaml.safe_load(Path("run.yaml").read_text())
    if config.samples.latent:
        with pytest.raises(ValueError, match="_latents"):
            parse_train_args(["--config", "run.yaml", "--train_data_dir", str(images)])
        assert written["model"]["model_config"].pop("_latents") is True
        Path("run.yaml").write_text(yaml.safe_dump(written))
    named = [part for name, value in columns(written["model"]).items() for part in (f"--{name}", value)]
    line = ["--config", "run.yaml", "--train_data_dir", str(images), *named]
    ours = parse_train_args(line)
    assert ours.schedule.prediction_type == config.schedule["prediction_type"]
    assert ours.schedule.beta_end == config.schedule["beta_end"]
    assert ours.objective.elbo_weights == "compvis"
    assert ours.optim.adam_beta1 == 0.9
    assert ours.optim.adam_weight_decay == 0.01
    assert ours.model.conditioning_key == config.conditioning_key
    network = translate_unet(config.unet_params, conditioning_key=config.conditioning_key)
    assert ours.model.model_config == {"_class_name": network.class_name} | network.config
    assert main(["convert-config", str(source), "--out", "run.yaml"]) == 2, "not overwritten without --overwrite"
    assert "--overwrite" in capsys.readouterr().err


def test_a_run_without_ema_monitors_a_metric_that_it_logs():
    config = changed("model.params.use_ema", False)
    assert recipe(read_compvis_config(config))["monitoring"]["monitor"] == "val/loss_simple"


MORE = {
    "use_ema": True, "clip_denoised": True, "beta_schedule": "linear", "l_simple_weight": 1.0, "cosine_s": 0.008,
    "given_betas": None, "conditioning_key": "crossattn", "ucg_training": {"class_label": {"p": 0.1, "val": 3}},
    "ckpt_path": "model.ckpt", "ignore_keys": [], "load_only_unet": False, "make_it_fit": False, "reset_ema": False,
    "reset_num_ema_updates": False, "use_positional_encodings": False, "force_null_conditioning": False,
}  # fmt: skip
ODD = (None, True, "x", "5", 5.5, -1, 0, [], [1], ["a"], {}, {"a": 1}, float("nan"), float("inf"), {1: 2})


def full_of_keys() -> dict[str, Any]:
    config = copy.deepcopy(FULL)
    config["model"]["params"] |= copy.deepcopy(MORE)
    config["model"]["scale_lr"] = True
    config["lightning"] |= {
        "modelcheckpoint": {"params": {"every_n_train_steps": 5, "save_top_k": 3}},
        "callbacks": {"image_logger": {"params": {"batch_frequency": 5, "max_images": 4}}},
    }
    config["lightning"]["trainer"] |= {"max_steps": 100, "gradient_clip_val": 1.0, "precision": 16}
    return config


def test_any_value_of_any_key_is_translated_or_refused_in_one_line(tmp_path, monkeypatch):
    """A ValueError of one line, or options that our trainer accepts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.ckpt").touch()
    places = [key.lstrip(".").split(".") for key, _ in leaves(full_of_keys(), "")]
    places += [["model", "params"], ["model", "params", "unet_config"], ["data"], ["lightning", "trainer"]]
    accepted, refused = 0, []
    for *steps, last in places:
        for odd in ODD:
            config = full_of_keys()
            place = config
            for step in steps:
                place = place[step]
            place[last] = odd
            try:
                options = recipe(read_compvis_config(config))
            except ValueError as error:
                refused.append((last, odd, str(error)))
            else:
                options["model"]["model_config"].pop("_latents", None)
                TrainConfig.from_flat({**options, "data": options.get("data", {}) | columns(options["model"])})
                accepted += 1
    assert not [case for case in refused if "\n" in case[2]]
    assert not [case for case in refused if case[0] not in case[2] and case[0] not in ("params", "unet_config")]
    assert 200 < accepted < 0.7 * len(places) * len(ODD)


@pytest.mark.parametrize("key", ["evil\nmax_train_steps: 1", "evil\x85seed: 1", "evil\x00\x1b[31m"])
def test_no_key_or_value_of_a_comment_becomes_an_option(key, tmp_path):
    """Comments stay comments, and the file can be read again."""
    config = copy.deepcopy(FULL)
    config["data"]["params"] |= {key: 1, "other": key}
    write_recipe(read_compvis_config(config), tmp_path / "run.yaml", "a\nseed: 2\n")
    write_recipe(read_compvis_config(FULL), tmp_path / "plain.yaml", "a")
    assert load_compvis_yaml(tmp_path / "run.yaml") == load_compvis_yaml(tmp_path / "plain.yaml")


def test_a_configuration_that_contains_itself(tmp_path):
    (tmp_path / "m.yaml").write_text("model: &a {target: ldm.DDPM, params: {x: *a}}\n")
    with pytest.raises(ValueError, match="contains itself"):
        read_compvis_config(tmp_path / "m.yaml")


def test_exponents_that_plain_yaml_reads_as_text():
    config = changed("model.params.linear_start", "15e-4")
    config["model"]["base_learning_rate"] = "1e-6"
    read = read_compvis_config(config)
    assert (read.schedule["beta_start"], read.training["learning_rate"]) == (0.0015, 1e-6)


def test_our_default_learning_rate_is_not_per_image():
    config = copy.deepcopy(FULL)
    del config["model"]["base_learning_rate"]
    assert recipe(read_compvis_config(config))["optim"]["lr_scaling"] == "none"
    assert "learning_rate" not in recipe(read_compvis_config(config))["optim"]


def test_every_key_of_an_unknown_learning_rate_schedule_is_refused():
    schedule = {"target": "torch.Mystery", "params": {"a": 1}, "interval": "epoch"}
    config = read_compvis_config(changed("model.params.scheduler_config", schedule), strict=False)
    refused = [row.key for row in config.rows if row.fate == "refused"]
    assert {key.rpartition(".")[2] for key in refused} == {"target", "params", "interval"}


@pytest.mark.parametrize(
    ("target", "key", "stage", "entry", "expected"),
    [
        (DDPM, "adm", None, {"label": {"p": 0.2, "val": 4}}, {"class_labels": {"p": 0.2, "val": 4}}),
        (DDPM, "concat", None, {"mask": {"p": 0.2}}, {"concat_inputs": {"p": 0.2}}),
        (DDPM, None, None, {"mask": {"p": 0.2}}, None),
        (DDPM, "hybrid", None, {"mask": {"p": 0.2}}, None),
        (LATENT, "adm", "torch.nn.Identity", {"class_label": {"p": 0.2, "val": 4}},
         {"class_labels": {"p": 0.2, "val": 4}}),
        (LATENT, "adm", "torch.nn.Identity", {"image": {"p": 0.2, "val": 4}}, None),
        (LATENT, "crossattn", "ldm.FrozenCLIPEmbedder", {"class_label": {"p": 0.2, "val": ""}},
         {"captions": {"p": 0.2}}),
        (LATENT, "crossattn", "ldm.FrozenCLIPEmbedder", {"image": {"p": 0.2, "val": ""}}, None),
        (LATENT, "crossattn", "ldm.ClassEmbedder", {"class_label": {"p": 0.2, "val": 4}}, None),
        (LATENT, "crossattn", "ldm.ClassEmbedder", {"class": {"p": 0.2, "val": 4}},
         {"class_labels": {"p": 0.2, "val": 4}}),
        (LATENT, "hybrid", "ldm.BERTEmbedder", {"class_label": {"p": 0.2}}, {"captions": {"p": 0.2}}),
        (LATENT, "concat", "ldm.SpatialRescaler", {"class_label": {"p": 0.2, "val": 0}}, None),
    ],
)  # fmt: skip
def test_condition_dropout_is_translated_or_reported(target, key, stage, entry, expected):
    """It is translated only if the original drops an input of the network itself."""
    config = changed("model.params.ucg_training", entry)
    config["model"]["target"] = target
    config["model"]["params"] |= {"conditioning_key": key}
    config["model"]["params"]["cond_stage_config"] = {"target": stage} if stage else "__is_unconditional__"
    read = read_compvis_config(config)
    assert read.ucg == entry
    assert read.training.get("conditioning_dropout") == expected
    (row,) = [row for row in read.rows if row.key.startswith("model.params.ucg_training")]
    assert row.fate == ("translated" if expected else "without effect")
    assert recipe(read).get("data", {}).get("conditioning_dropout") == expected


def class_embedder(ucg: dict[str, Any] | None, **params: Any) -> dict[str, Any]:
    config = changed("model.params.ucg_training", ucg or {})
    config["model"]["target"] = LATENT
    stage = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 8, "n_classes": 5} | params,
    }
    config["model"]["params"] |= {"conditioning_key": "crossattn", "cond_stage_config": stage}
    return config


@pytest.mark.parametrize(
    ("ucg", "rate", "expected"),
    [
        (None, 0.1, {"p": 0.1, "val": 4}),
        (None, 0, None),
        ({"class": {"p": 0.5, "val": 4}}, 0.1, {"p": 0.55, "val": 4}),
        ({"class": {"p": 0.5, "val": 3}}, 0.0, {"p": 0.5, "val": 3}),
    ],
)
def test_the_dropout_of_classes_themselves(ucg, rate, expected):
    """Stable Diffusion 2's ClassEmbedder replaces classes by the last one, of what ucg_training left."""
    read = read_compvis_config(class_embedder(ucg, ucg_rate=rate))
    dropout = read.training.get("conditioning_dropout", {})
    assert dropout.get("class_labels") == (None if expected is None else pytest.approx(expected))
    assert any(row.key.endswith("params.ucg_rate") and row.fate == "translated" for row in read.rows)


@pytest.mark.parametrize(
    ("ucg", "params", "message"),
    [
        ({"class": {"p": 0.5}}, {}, "from 0 to 4"),
        ({"class": {"p": 0.5, "val": 5}}, {}, "from 0 to 4"),
        ({"class": {"p": 0.5, "val": 1.5}}, {}, "from 0 to 4"),
        ({"class": {"p": 0.5, "val": "none"}}, {}, "replaces no number"),
        ({"class": {"p": 0.5, "val": 3}}, {"ucg_rate": 0.1}, "keep one"),
        (None, {"ucg_rate": 2}, "ucg_rate takes a number from 0 to 1"),
    ],
)
def test_dropout_that_no_run_can_do_is_refused_for_a_run_alone(ucg, params, message):
    config = class_embedder(ucg, **params)
    with pytest.raises(ValueError, match=message):
        read_compvis_config(config)
    assert read_compvis_config(config, for_training=False).conditioning_key == "crossattn"


def test_the_dropout_of_an_images_embedding():
    config = changed("model.params.embedding_dropout", 0.25)
    config["model"]["target"] = LATENT.replace("LatentDiffusion", "ImageEmbeddingConditionedLatentDiffusion")
    stage = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"}
    config["model"]["params"] |= {"conditioning_key": "crossattn-adm", "cond_stage_config": stage}
    assert read_compvis_config(config).training["conditioning_dropout"] == {"class_labels": {"p": 0.25}}


def test_options_of_ckpt_path_have_no_effect_without_it():
    config = copy.deepcopy(FULL)
    config["model"]["params"] |= {"ignore_keys": ["loss."], "load_only_unet": True}
    assert {row.key: row.fate for row in read_compvis_config(config).rows}[
        "model.params.ignore_keys"
    ] == "without effect"
    config["model"]["params"] |= {"ckpt_path": "a.ckpt", "ignore_keys": []}
    assert recipe(read_compvis_config(config))["start"] == {"ckpt_path": "a.ckpt", "load_only_unet": True}


def test_a_recipe_runs(tmp_path, monkeypatch):
    """Two steps of a translated configuration on a folder of images, at the rate that the original computes."""
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), 30 * i, np.uint8)).save(images / f"{i}.png")
    config = load_compvis_yaml(FOLDER / "ema.yaml")
    config |= {"data": {"params": {"batch_size": 2}}, "lightning": {"trainer": {"max_steps": 2}}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    assert main(["convert-config", "model.yaml", "--out", "run.yaml"]) == 0
    flags = ["--output_dir", "run", "--report_to", "none", "--ddpm_num_inference_steps", "2"]
    assert main(["train", "--config", "run.yaml", "--train_data_dir", str(images), *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [value for row in rows for name, value in row.items() if name in ("lr", "lr_abs", "learning_rate")]
    assert rates
    assert rates == pytest.approx([config["model"]["base_learning_rate"] * 2] * len(rates))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"timesteps": 10**15}, "num_train_timesteps"),
        ({"linear_end": 7.5}, "linear_end"),
        ({"v_posterior": -1.0}, "v_posterior"),
        ({"image_size": 10**7}, "image_size"),
    ],
)
def test_what_train_would_refuse_is_not_translated(changes, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = load_compvis_yaml(FOLDER / "ema.yaml")
    config["model"]["params"] |= changes
    Path("model.yaml").write_text(yaml.safe_dump(config))
    assert main(["convert-config", "model.yaml", "--out", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.yaml: ")
    assert option in error
    assert not Path("run.yaml").exists()
