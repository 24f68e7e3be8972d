"""Training with every conditioning key: it trains, saves, loads, samples and resumes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.runs import TINY, losses, rows, tiny_run
from PIL import Image
from safetensors.torch import load_file

from diffusers_ddpm_ext import DDPMExtPipeline, UNet2DExtModel
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.compvis import save_compvis
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.class_embedder import load_class_embedder
from diffusers_ddpm_ext.models.conditioning import CONDITIONING_KEYS, REQUIRED_CONDITIONS, Conditions
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig
from diffusers_ddpm_ext.training.data.condition_dropout import make_condition_dropout
from diffusers_ddpm_ext.training.data.dataset import load_data

COLUMNS = {
    "class_labels": ("class_column", "kind"),
    "concat_inputs": ("concat_column", "hint"),
    "encoder_hidden_states": ("context_column", "words"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twenty images, each with a class, a second image (the first in gray) and an embedding."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    lines = []
    for number in range(20):
        pixels = draw.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        name, kind = f"{number:02d}.png", ("cat", "dog", "emu")[number % 3]
        Image.fromarray(pixels).save(folder / name)
        (folder / ".conditions").mkdir(exist_ok=True)
        Image.fromarray(pixels).convert("L").save(folder / ".conditions" / name)
        np.save(folder / ".conditions" / f"{number:02d}.npy", draw.normal(size=(3, 6)).astype(np.float32))
        lines.append([name, kind, f".conditions/{name}", f".conditions/{number:02d}.npy"])
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "kind", "hint", "words"], *lines])
    return folder


def options(key: str, images: Path, **more: Any) -> dict[str, Any]:
    columns = dict(COLUMNS[name] for name in REQUIRED_CONDITIONS[key])
    return {"conditioning_key": key, "train_data_dir": str(images), "norm_num_groups": 4} | columns | more


def train(folder: Path, **overrides: Any) -> Path | None:
    reset_accelerate()
    return trainer.train(tiny_run(folder, **overrides))


@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", CONDITIONING_KEYS)
def test_every_key_trains_saves_loads_and_samples(key, steps, images, tmp_path):
    train(tmp_path, **options(key, images, max_train_steps=steps))
    assert np.isfinite(losses(tmp_path)).all()
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path)
    assert pipeline.config.conditioning_key == key
    pipeline.set_progress_bar_config(disable=True)
    conditions = load_data(tiny_run(tmp_path / "x", **options(key, images)).data, key).train.conditions(range(4))
    drawn = [pipeline(num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(seed),
                      **conditions.as_dict()).images for seed in (0, 0)]  # fmt: skip
    assert drawn[0].shape == (4, 8, 8, 3)
    assert np.array_equal(*drawn)
    wide = "concat_inputs" in REQUIRED_CONDITIONS[key] and "encoder_hidden_states" not in REQUIRED_CONDITIONS[key]
    assert isinstance(pipeline.unet, UNet2DExtModel) == wide
    assert (tmp_path / "samples.png").is_file()


def test_the_digits_need_one_option(tmp_path):
    train(tmp_path, conditioning_key="adm", use_positional_encodings=True)
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path)
    assert pipeline.num_classes == 10
    assert pipeline.unet.config.in_channels == 3
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(class_labels=[1, 2], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


FROZEN = {"learning_rate": 1e-30, "adam_weight_decay": 0.0}
CLASS_TOKENS = {"class_column": "kind", "context_column": None, "conditioning_dropout": {"class_labels": 0.2}}


@pytest.mark.parametrize("key", ["crossattn", "hybrid"])
def test_classes_become_trained_tokens(key, images, tmp_path):
    """A stock network and a table: by class or by the table's row, the same picture; training moved every row."""
    train(tmp_path / "long", **options(key, images, max_train_steps=4) | CLASS_TOKENS)
    train(tmp_path / "short", **options(key, images, max_train_steps=1, **FROZEN) | CLASS_TOKENS)
    pipeline, start = (DDPMExtPipeline.from_pretrained(tmp_path / name) for name in ("long", "short"))
    assert type(pipeline.unet) is UNet2DConditionModel
    assert pipeline.config.null_class_label == 3
    assert pipeline.class_names == {0: "cat", 1: "dog", 2: "emu"}
    assert pipeline.class_embedder.shape == (4, 512)
    assert bool(((pipeline.class_embedder - start.class_embedder).abs().amax(1) > 0).all())
    pipeline.set_progress_bar_config(disable=True)
    concat = {} if key == "crossattn" else {"concat_inputs": torch.zeros(1, 1, 8, 8)}
    drawn = [pipeline(num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0), **condition,
                      **concat).images
             for condition in ({"class_labels": ["emu"]},
                               {"encoder_hidden_states": pipeline.class_embedder[2][None, None]},
                               {"class_labels": [0]})]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_run_with_class_tokens_resumes_to_the_bit_and_starts_another(images, tmp_path):
    run_options = options("crossattn", images, checkpointing_steps=2) | CLASS_TOKENS
    train(tmp_path / "straight", **run_options)
    broken = tmp_path / "broken"
    train(broken, **run_options, resume_from_checkpoint="auto", max_train_minutes=1e-9)
    train(broken, **run_options, resume_from_checkpoint="auto")
    table, again = (load_class_embedder(folder) for folder in (tmp_path / "straight", broken))
    assert torch.equal(table, again)
    train(tmp_path / "next", **run_options | FROZEN, ckpt_path=str(broken))
    assert torch.equal(load_class_embedder(tmp_path / "next"), table)


def test_class_tokens_go_to_an_original_checkpoint_and_on(images, tmp_path):
    sizes = {"norm_num_groups": 32, "block_out_channels": (32, 32), "layers_per_block": 1}
    run_options = options("crossattn", images) | CLASS_TOKENS | sizes
    folder = tmp_path / "run"
    train(folder, **run_options)
    save_compvis(folder, tmp_path / "model.ckpt")
    train(tmp_path / "next", **run_options | FROZEN, ckpt_path=str(tmp_path / "model.ckpt"))
    assert torch.equal(load_class_embedder(tmp_path / "next"), load_class_embedder(folder))
    raw = "unet/diffusion_pytorch_model.raw.safetensors"
    ours, theirs = load_file(tmp_path / "next" / raw), load_file(folder / raw)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_digits_become_tokens_with_one_option(tmp_path):
    train(tmp_path, conditioning_key="crossattn", validation_bpd=True, validation_fraction=0.01)
    assert load_class_embedder(tmp_path).shape == (10, 512)
    assert main(["evaluate", str(tmp_path), "--max_images", "2", "--num_timesteps", "2"]) == 0


def test_conditions_are_prepared_like_their_image(images):
    """Cropped, mirrored and shuffled alike: the second image is the first one in gray."""
    data = load_data(
        DataOptions(train_data_dir=str(images), concat_column="hint", class_column="kind", context_column="words",
                    resolution=(8, 8), random_flip=True, validation_fraction=0),
        "hybrid-adm",
    ).train  # fmt: skip
    indices, epochs = list(range(20)), [3] * 20
    levels = data.load_levels(indices, 7, epochs).values.float()
    gray = levels[:, 0] * 0.299 + levels[:, 1] * 0.587 + levels[:, 2] * 0.114
    conditions = data.conditions(indices, 7, epochs)
    second = (conditions.concat_inputs[:, 0] + 1) * 127.5
    assert float((second - gray).abs().max()) < 2.5, "rounding of resized pixels, and nothing else"
    assert conditions.class_labels.tolist() == [number % 3 for number in range(20)]
    assert list(data.columns.class_names) == ["cat", "dog", "emu"]
    assert torch.equal(
        conditions.encoder_hidden_states[5], torch.from_numpy(np.load(images / ".conditions" / "05.npy"))
    )


def test_folders_are_classes(tmp_path):
    for number, kind in enumerate(("b", "a", "a", "b")):
        (tmp_path / kind).mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / kind / f"{number}.png")
    data = load_data(DataOptions(train_data_dir=str(tmp_path), resolution=(8, 8), validation_fraction=0), "adm").train
    levels, labels = data.load_levels(range(4)).values[:, 0, 0, 0], data.conditions(range(4)).class_labels
    label_of_level = {int(level): int(label) for level, label in zip(levels, labels, strict=True)}
    assert label_of_level == {0: 1, 1: 0, 2: 0, 3: 1}


DROPOUT = {"class_labels": 0.5, "concat_inputs": {"p": 0.25, "val": -1}}


def test_dropout_is_a_function_of_seed_step_and_position():
    dropout, null = make_condition_dropout(DROPOUT, REQUIRED_CONDITIONS["hybrid-adm"], 3)
    assert null == 3
    labels, inputs = torch.zeros(4000, dtype=torch.long), torch.zeros(4000, 1, 1, 1)
    conditions = Conditions(labels, inputs, torch.ones(4000, 1, 1))
    first = dropout.apply(conditions, 1, 5, torch.arange(4000))
    again = dropout.apply(conditions, 1, 5, torch.arange(4000))
    assert torch.equal(first.class_labels, again.class_labels)
    assert abs(float((first.class_labels == 3).float().mean()) - 0.5) < 0.03
    assert abs(float((first.concat_inputs == -1).float().mean()) - 0.25) < 0.03
    assert torch.equal(first.encoder_hidden_states, conditions.encoder_hidden_states)
    assert int(labels.sum()) == 0, "the argument is not changed"
    split = dropout.apply(conditions[2000:], 1, 5, torch.arange(2000, 4000))
    assert torch.equal(split.class_labels, first.class_labels[2000:]), "however the batch is split"
    other = dropout.apply(conditions, 1, 6, torch.arange(4000))
    assert not torch.equal(other.class_labels, first.class_labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_to_the_bit(workers, images, tmp_path):
    run_options = options("hybrid-adm", images, conditioning_dropout=DROPOUT, random_flip=True, checkpointing_steps=2,
                    dataloader_num_workers=workers, gradient_accumulation_steps=2, train_batch_size=4)  # fmt: skip
    train(tmp_path / "straight", **run_options)
    broken = tmp_path / "broken"
    train(broken, **run_options, resume_from_checkpoint="auto", max_train_minutes=1e-9)
    assert len(rows(broken)) < len(rows(tmp_path / "straight"))
    train(broken, **run_options, resume_from_checkpoint="auto")
    for name in ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.raw.safetensors"):
        ours, theirs = (load_file(folder / name) for folder in (broken, tmp_path / "straight"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert losses(broken) == losses(tmp_path / "straight")
    with pytest.raises(ConfigError, match="conditioning_dropout"):
        train(broken, **run_options | {"conditioning_dropout": {"class_labels": 0.1}, "max_train_steps": 9,
                                 "lr_scheduler": "cosine"}, resume_from_checkpoint="latest")  # fmt: skip


def test_accumulated_batches_are_the_batch(images, tmp_path):
    """One batch of eight, or two of four: the same losses up to rounding."""
    for name, batch, accumulation in (("one", 8, 1), ("two", 4, 2)):
        train(tmp_path / name, **options("hybrid-adm", images, conditioning_dropout=DROPOUT, train_batch_size=batch,
                                         gradient_accumulation_steps=accumulation, max_train_steps=3))  # fmt: skip
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"conditioning_key": "adm", "class_column": "size"}, "size"),
        ({"conditioning_key": "concat"}, "--concat_column"),
        ({"conditioning_key": "crossattn", "context_column": "kind"}, "--context_column"),
        ({"conditioning_key": "crossattn"}, "--class_column: a token"),
        ({"conditioning_key": "crossattn", "class_column": "kind", "context_column": "words"}, "no effect"),
        ({"conditioning_key": "crossattn", "class_column": "kind", "num_class_embeds": 2}, "--num_class_embeds 2"),
        ({"conditioning_key": "crossattn", "class_column": "kind",
          "model_config": {"_class_name": "UNet2DConditionModel", "num_class_embeds": 3}}, "--conditioning_key adm"),
        ({"conditioning_key": "crossattn", "class_column": "kind", "conditioning_dropout": {"concat_inputs": 0.1}},
         "the conditions of this run are class_labels"),
        ({"class_column": "kind"}, "no effect"),
        ({"conditioning_key": "adm", "conditioning_dropout": {"concat_inputs": 0.1}}, "concat_inputs"),
        ({"conditioning_key": "adm", "conditioning_dropout": {"class_labels": 2}}, "probability"),
        ({"conditioning_key": "adm", "class_column": "kind", "num_class_embeds": 2}, "--num_class_embeds 2"),
        ({"conditioning_key": "concat", "concat_column": "kind"}, "--concat_column"),
        ({"conditioning_key": "adm", "class_column": "kind", "model_config": {"_class_name": "UNet2DConditionModel"}},
         "needs a UNet2DModel"),
        ({"model_config": {"num_class_embeds": 3}}, "--conditioning_key adm"),
        ({"model_config": {"_class_name": "VAE"}}, "VAE"),
    ],
)  # fmt: skip
def test_invalid_conditioning_is_refused_before_anything_is_written(overrides, message, images, tmp_path):
    sizes = ("block_out_channels", "layers_per_block", "attention_levels", "attention_head_dim", "norm_num_groups")
    flat = TINY | {"train_data_dir": str(images), "output_dir": str(tmp_path / "run")} | overrides
    if "model_config" in overrides:
        flat = {name: value for name, value in flat.items() if name not in sizes}
    with pytest.raises(ConfigError, match=message):
        trainer.train(TrainConfig.from_flat(flat))
    assert not (tmp_path / "run").exists()


def test_sampling_from_the_command_line(tmp_path, capsys):
    """Classes in turn, a class for all, and what the model does not take."""
    train(tmp_path / "run", conditioning_key="adm", conditioning_dropout={"class_labels": 0.1}, max_train_steps=2)

    def sample(out: str, *more: str) -> int:
        place = ["--out", str(tmp_path / f"{out}.npy"), "--num_images", "12", "--num_inference_steps", "2"]
        return main(["sample", str(tmp_path / "run"), *place, *more])

    assert sample("turn") == 0
    assert sample("explicit", "--class_labels", *map(str, range(10))) == 0
    assert sample("three", "--class_labels", "3") == 0
    assert sample("guided", "--guidance_scale", "3") == 0
    turn, explicit, three, guided = (
        np.load(tmp_path / f"{out}.npy") for out in ("turn", "explicit", "three", "guided")
    )
    assert np.array_equal(turn, explicit), "all classes but the null one, in turn"
    assert np.array_equal(turn[3], three[3])
    assert not np.array_equal(turn[4], three[4])
    assert not np.array_equal(guided, turn)
    capsys.readouterr()
    assert sample("x", "--class_labels", "11") == 2
    assert "0 to 10" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "model_index.json").read_text())["null_class_label"] == 10
