"""Training in the latents of a first stage: what the network gets, the scale, the saved pipeline, and resuming."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.runs import losses, rows, tiny_run
from helpers.tiny import tiny_autoencoder
from PIL import Image
from safetensors.torch import load_file

from diffusers_ddpm_ext import DDPMExtPipeline
from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.loop import latents as loop_latents
from diffusers_ddpm_ext.training.loop.batches import open_batches
from diffusers_ddpm_ext.training.loop.setup import build_setup
from diffusers_ddpm_ext.utils import random_keys as keys

KINDS = ("kl", "vq", "tiny", "dc")
EVERY = {"checkpointing_steps": 2, "max_train_steps": 5, "validation_steps": 3, "scale_factor": "data", "seed": 5}


def slow(value: Any) -> Any:
    """A case of the slow tests."""
    return pytest.param(value, marks=pytest.mark.slow)


class Killed(BaseException):
    """Stands for `kill -9`."""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """First stages of gray images that halve both sides, a folder for each kind."""
    folder = tmp_path_factory.mktemp("stages")
    for kind in KINDS:
        tiny_autoencoder(kind, channels=1, latent_channels=2).save_pretrained(folder / kind)
    return folder


def config(folder: Path, stages: Path, kind: str = "kl", **options: Any) -> Any:
    return tiny_run(folder, **{"vae": str(stages / kind)} | options)


def train(folder: Path, stages: Path, kind: str = "kl", **options: Any) -> Path | None:
    reset_accelerate()
    return trainer.train(config(folder, stages, kind, **options))


def setup_of(tmp_path: Path, stages: Path, kind: str = "kl", **options: Any) -> Any:
    setup = build_setup(config(tmp_path, stages, kind, **options))
    loop_latents.settle_scale(setup, None)
    return setup


# ------------------------------------------------------------------ what the network gets


def test_latents_are_scaled_draws_of_the_posterior(stages, tmp_path):
    """Against Diffusers' own autoencoder: (latent / scale - mean) / std is standard normal, new in each step."""
    setup = setup_of(tmp_path, stages, train_batch_size=64, scale_factor=0.5)
    batches = open_batches(setup, 0)
    residuals = []
    for _ in range(8):
        batch = next(batches)
        posterior = tiny_autoencoder("kl", channels=1, latent_channels=2).encode(batch.pixels).latent_dist
        encoded = setup.latents.encode_batch(batch)
        assert torch.equal(encoded.pixels, setup.latents.encode_batch(batch).pixels), "a function of its keys"
        residuals.append((encoded.pixels / 0.5 - posterior.mean) / posterior.std)
    values = torch.stack(residuals).double().numpy()
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 0.05


def test_latent_mode_is_the_mean_of_the_posterior(stages, tmp_path):
    setup = setup_of(tmp_path, stages, latent_mode=True, scale_factor=3)
    batch = next(open_batches(setup, 0))
    mean = tiny_autoencoder("kl", channels=1, latent_channels=2).encode(batch.pixels).latent_dist.mean
    torch.testing.assert_close(setup.latents.encode_batch(batch).pixels, 3 * mean, rtol=1e-5, atol=1e-6)


def test_latents_do_not_depend_on_the_split_of_the_batch(stages, tmp_path):
    whole = setup_of(tmp_path / "a", stages, train_batch_size=8)
    AcceleratorState._reset_state(reset_partial_state=True)
    parts = setup_of(tmp_path / "b", stages, train_batch_size=4, gradient_accumulation_steps=2)
    one = whole.latents.encode_batch(next(open_batches(whole, 3)))
    stream = open_batches(parts, 3)
    two = [parts.latents.encode_batch(next(stream)) for _ in range(2)]
    assert torch.equal(one.pixels, torch.cat([part.pixels for part in two]))


def test_validation_uses_the_same_draw_at_every_call(stages, tmp_path):
    samples = setup_of(tmp_path, stages).validation_samples
    first = samples.samples([3, 1, 3])
    assert torch.equal(first[0], first[2])
    assert torch.equal(samples.samples([1]), first[1:2])
    assert not torch.equal(first[0], first[1])


# ------------------------------------------------------------------ the scale


@pytest.mark.parametrize("kind", KINDS)
def test_data_makes_latents_of_standard_deviation_1(kind, stages, tmp_path):
    setup = setup_of(tmp_path, stages, kind, scale_factor="data")
    latents = setup.samples(setup.data.train).samples(torch.arange(0, 1600, 3))
    assert float(latents.std()) == pytest.approx(1, abs=0.03)
    factor = setup.latents.stage.autoencoder.config.scaling_factor
    assert setup.latents.stage.denormalize(latents).std() == pytest.approx(1 / factor, rel=0.03)


def test_the_scale_depends_on_the_images_alone(stages, tmp_path):
    factors = set()
    for number, options in enumerate([{}, {"seed": 4}, {"train_batch_size": 3}, {"random_flip": True}]):
        AcceleratorState._reset_state(reset_partial_state=True)
        setup = setup_of(tmp_path / str(number), stages, scale_by_std=True, **options)
        factors.add(setup.latents.stage.autoencoder.config.scaling_factor)
    assert len(factors) == 1


def test_latent_stats_normalize_each_channel(stages, tmp_path):
    setup = setup_of(tmp_path, stages, latent_stats=True)
    latents = setup.samples(setup.data.train).samples(torch.arange(0, 1600, 3))
    for channel in latents.unbind(1):
        assert float(channel.mean()) == pytest.approx(0, abs=0.03)
        assert float(channel.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("factor", "warns"), [(1.0, False), (0.01, True), (30.0, True)])
def test_latents_far_from_1_are_warned_of(factor, warns, stages, tmp_path, capsys):
    setup_of(tmp_path, stages, scale_factor=factor)
    assert ("standard deviation" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("options", [{"latent_stats": True}, {"scale_factor": "data"}, {}])
def test_latents_that_are_all_alike_have_no_measured_scale(options, tmp_path):
    stage = tiny_autoencoder("tiny", channels=1, latent_channels=2)
    for weight in stage.encoder.parameters():
        torch.nn.init.zeros_(weight)
    stage.save_pretrained(tmp_path / "kl")
    if not options:
        assert setup_of(tmp_path / "run", tmp_path, **options).latents.stage.autoencoder.config.scaling_factor == 1
        return
    with pytest.raises(ConfigError, match="one value in all training images"):
        setup_of(tmp_path / "run", tmp_path, **options)


# ------------------------------------------------------------------ the run and its pipeline


@pytest.fixture(scope="module")
def straight(stages, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(folder, stages, **EVERY)
    return folder


def test_the_pipeline_has_the_scaled_first_stage_and_makes_pictures(straight, stages):
    pipeline = DDPMExtPipeline.from_pretrained(straight)
    state = json.loads((straight / "checkpoint-5" / "state.json").read_text())
    scale = state["progress"]["records"]["latent_scale"]["scaling_factor"]
    assert pipeline.vae.config.scaling_factor == scale != 0.18215
    assert pipeline.unet.config.sample_size == 4
    assert pipeline.unet.config.in_channels == 2
    assert not pipeline.scheduler.config.clip_sample
    images = pipeline(2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    saved = load_file(straight / "vqvae" / "diffusion_pytorch_model.safetensors")
    trained = tiny_autoencoder("kl", channels=1, latent_channels=2).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())


def test_nothing_of_the_first_stage_is_trained_averaged_or_in_checkpoints(straight):
    names = {
        name for file in ("model", "ema") for name in load_file(straight / "checkpoint-5" / f"{file}.safetensors")
    }
    assert not [name for name in names if "encoder." in name or "quant" in name or "decoder." in name]


def test_pictures_have_the_size_of_the_images(straight):
    """A row of `diffusion_row.png` has pictures of 8x8 as `inputs.png` does, not latents of 4x4 in 2 channels."""
    shapes = {}
    for name in ("inputs", "diffusion_row", "denoise_row-5", "samples-5"):
        with Image.open(straight / "samples" / f"{name}.png") as image:
            shapes[name] = (image.mode, image.height)
    assert len({mode for mode, _ in shapes.values()}) == 1
    assert shapes["diffusion_row"][1] >= 4 * 8
    assert shapes["denoise_row-5"][1] >= 4 * 8


@pytest.mark.parametrize("kind", ["vq", slow("tiny"), slow("dc")])
def test_every_first_stage_trains_and_saves(kind, stages, tmp_path):
    train(tmp_path, stages, kind, max_train_steps=2)
    assert np.isfinite(losses(tmp_path)).all()
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path)
    assert pipeline(1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_the_bound_is_named_for_latents(stages, tmp_path, capsys):
    train(tmp_path, stages, max_train_steps=2, validation_bpd=True, validation_bpd_steps=2, scale_factor="data")
    names = {name for row in rows(tmp_path) for name in row}
    assert "val/latent_bpd_ema" in names
    assert not any(name.startswith("val/bpd") for name in names)
    assert "bits per latent dimension" in capsys.readouterr().out


def test_the_plan_states_first_stage_and_latents(stages, tmp_path, capsys):
    train(tmp_path, stages, dry_run=True, latent_stats=True)
    output = capsys.readouterr().out
    assert "AutoencoderKL of" in output
    assert "2 x 4 x 4, 1/2 of the images, sampled, scaling factor 1" in output
    assert not tmp_path.is_dir() or not any(tmp_path.iterdir())


# ------------------------------------------------------------------ resuming


def contents(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("checkpoint-5/*.safetensors"), *folder.glob("unet/*"), *folder.glob("vqvae/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "moment", [slow((trainer, "save_checkpoint", 2)), (trainer, "train_step", 4), slow((trainer, "describe_run", 1))]
)
def test_killed_and_resumed_is_the_same_run_and_measures_once(moment, straight, stages, tmp_path, monkeypatch):
    owner, name, call = moment
    real, calls = getattr(owner, name), []

    def last(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) >= call:
            raise Killed
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, last)
        with pytest.raises(Killed):
            train(tmp_path, stages, **EVERY)
    if any(tmp_path.glob("checkpoint-*")):
        monkeypatch.setattr(loop_latents, "measure_latents", lambda *_: pytest.fail("measured again"))
    train(tmp_path, stages, **EVERY, resume_from_checkpoint="auto")
    assert contents(tmp_path) == contents(straight)


def test_another_first_stage_is_refused_at_resume_and_a_moved_one_is_not(straight, stages, tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(straight, folder)
    shutil.copytree(stages / "kl", moved / "kl")
    AcceleratorState._reset_state(reset_partial_state=True)
    other = tiny_autoencoder("kl", channels=1, latent_channels=2)
    torch.nn.init.normal_(other.encoder.conv_in.weight)
    other.save_pretrained(tmp_path / "other" / "kl")
    with pytest.raises(ConfigError, match=r"--vae is another first stage \(sha256 [0-9a-f]{12}, was [0-9a-f]{12}\)"):
        train(folder, tmp_path / "other", **EVERY, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match=r"--scale_factor is 2\.0 and was data"):
        train(folder, stages, **EVERY | {"scale_factor": 2.0}, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match="--vae is None and was"):
        trainer.train(tiny_run(folder, **EVERY | {"scale_factor": "vae"}, resume_from_checkpoint="latest"))
    shutil.rmtree(folder / "checkpoint-5")
    (folder / "finished.json").unlink()
    train(folder, moved, **EVERY, resume_from_checkpoint="latest")
    assert contents(folder).keys() == contents(straight).keys()
    name = "checkpoint-5/model.safetensors"
    assert contents(folder)[name] == contents(straight)[name]


@pytest.mark.parametrize("scale", [None, {}, {"scaling_factor": -1.0}, {"scaling_factor": "x"}, {"what": 1}])
def test_a_forged_scale_is_refused(scale, straight, stages, tmp_path):
    from helpers.forged_checkpoints import forge_state

    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    for path in folder.glob("checkpoint-*"):
        forge_state(path, lambda state: state["progress"]["records"].update(latent_scale=scale))
    (folder / "finished.json").unlink()
    with pytest.raises(ConfigError, match="--resume_from_checkpoint"):
        train(folder, stages, **EVERY, resume_from_checkpoint="latest")


# ------------------------------------------------------------------ initial weights


def test_a_run_from_a_latent_pipeline_goes_on_with_its_first_stage(straight, tmp_path, capsys):
    trainer.train(tiny_run(tmp_path, max_train_steps=1, ckpt_path=str(straight)))
    own = DDPMExtPipeline.from_pretrained(tmp_path)
    assert own.vae.config.scaling_factor == DDPMExtPipeline.from_pretrained(straight).vae.config.scaling_factor
    assert "was trained on latents" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "options", "warns"),
    [("kl", {"scale_factor": 2.0}, True), ("vq", {}, True), ("kl", {"scale_factor": "data"}, False)],
)
def test_another_first_stage_than_that_of_the_initial_weights(
    kind, options, warns, straight, stages, tmp_path, capsys
):
    """It is obeyed and warned of; the same one, whose scale is measured to the same value, is silent."""
    setup = setup_of(tmp_path, stages, kind, ckpt_path=str(straight), **options)
    assert type(setup.latents.stage.autoencoder) is type(tiny_autoencoder(kind))
    assert ("was trained on latents of another" in capsys.readouterr().err) == warns


# ------------------------------------------------------------------ concatenated pictures and classes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve gray images, each with a class, and with a picture: gray, or in color and with transparency."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    lines = ["file_name,kind,gray,masked,color"]
    (folder / ".more").mkdir()
    for number in range(12):
        pixels = draw.integers(0, 256, (8, 8, 4), dtype=np.uint8)
        Image.fromarray(pixels[..., 0]).save(folder / f"{number}.png")
        names = [f".more/{name}{number}.png" for name in ("gray", "masked", "color")]
        Image.fromarray(pixels[..., 1]).save(folder / names[0])
        Image.fromarray(pixels).save(folder / names[1])
        Image.fromarray(pixels[..., :3]).save(folder / names[2])
        lines.append(",".join([f"{number}.png", "ab"[number % 2], *names]))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def concat_options(pictures: Path, column: str, **more: Any) -> dict[str, Any]:
    data = {"train_data_dir": str(pictures), "channels": None, "concat_column": column, "conditioning_key": "concat"}
    return data | {"validation_fraction": 0.2} | more


def test_concatenated_pictures_go_through_the_first_stage_unscaled(stages, pictures, tmp_path):
    options = concat_options(pictures, "gray", concat_through_vae=True, scale_factor=7)
    setup = setup_of(tmp_path, stages, **options)
    batch = next(open_batches(setup, 0))
    mean = (
        tiny_autoencoder("kl", channels=1, latent_channels=2).encode(batch.conditions.concat_inputs).latent_dist.mean
    )
    encoded = setup.latents.encode_batch(batch).conditions.concat_inputs
    torch.testing.assert_close(encoded, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("column", ["gray", "masked"])
def test_samples_of_concatenated_pictures_are_scaled_and_have_noise_of_their_position(
    column, stages, pictures, tmp_path
):
    """As LatentInpaintDiffusion's: the mask first, and gray where the picture is transparent."""
    stage = tiny_autoencoder("kl", channels=3 if column == "masked" else 1, latent_channels=2)
    stage.save_pretrained(tmp_path / "vae")
    options = concat_options(pictures, column, concat_through_vae="sample", scale_factor=7, vae=str(tmp_path / "vae"))
    setup = setup_of(tmp_path / "run", stages, **options)
    batch = list(itertools.islice(open_batches(setup, 0), 2))[1]
    image, transparent = batch.conditions.concat_inputs, torch.zeros(8, 0, 4, 4)
    if column == "masked":
        image = torch.where(image[:, 3:] < 0, 0.0, image[:, :3])
        transparent = (batch.conditions.concat_inputs[:, 3:, ::2, ::2] < 0).float()
    posterior = stage.encode(image).latent_dist
    noise = [keys.generator("latent/concat", setup.seed, 1, place) for place in batch.positions.tolist()]
    noise = torch.stack([torch.randn(2, 4, 4, generator=generator) for generator in noise])
    expected = torch.cat([transparent, 7 * (posterior.mean + posterior.std * noise)], dim=1)
    encoded = setup.latents.encode_batch(batch).conditions.concat_inputs
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)


def test_other_concatenated_pictures_are_averaged_to_the_size_of_the_latents(stages, pictures, tmp_path):
    setup = setup_of(tmp_path, stages, **concat_options(pictures, "color"))
    batch = next(open_batches(setup, 0))
    encoded = setup.latents.encode_batch(batch).conditions.concat_inputs
    expected = batch.conditions.concat_inputs.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("column", "through", "channels", "saved"),
    [
        ("gray", "mode", 4, "mode"),
        pytest.param("gray", "sample", 4, "sample", marks=pytest.mark.slow),
        pytest.param("gray", None, 3, None, marks=pytest.mark.slow),
        ("color", None, 5, None),
        pytest.param("masked", None, 6, None, marks=pytest.mark.slow),
    ],
)
def test_concatenated_pictures_train_validate_and_are_drawn(
    column, through, channels, saved, stages, pictures, tmp_path, capsys
):
    """And the run's last line is the command that draws, but for the folder of pictures."""
    options = concat_options(pictures, column, concat_through_vae=through, max_train_steps=2, validation_steps=1)
    train(tmp_path, stages, **options, conditioning_dropout={"concat_inputs": 0.5}, preview_guidance_scale=2.0)
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path)
    assert pipeline.unet.config.in_channels == channels
    assert pipeline.config.get("concat_through_vae") == saved
    inputs = torch.zeros(1, channels - 2, 4, 4)
    assert pipeline(num_inference_steps=2, concat_inputs=inputs, output_type="np").images.shape == (1, 8, 8, 1)
    assert (tmp_path / "samples.png").is_file()
    words = capsys.readouterr().out.splitlines()[-1].partition("ddpm-ext ")[2].replace("DIR", str(tmp_path / "in"))
    (tmp_path / "in").mkdir()
    shutil.copy(pictures / ".more" / f"{column}0.png", tmp_path / "in")
    assert main([*shlex.split(words), "--num_inference_steps", "2", "--out", str(tmp_path / "out")]) == 0
    if saved is not None:
        assert main(["evaluate", str(tmp_path), "--num_timesteps", "2", "--max_images", "2", "--device", "cpu"]) == 0


def test_dropped_pictures_are_zeros_for_the_network(stages, pictures, tmp_path):
    """What guidance takes as no picture; a gray picture through the first stage would be something else."""
    options = concat_options(pictures, "gray", concat_through_vae=True, conditioning_dropout={"concat_inputs": 1.0})
    setup = setup_of(tmp_path, stages, **options)
    assert not setup.latents.encode_batch(next(open_batches(setup, 0))).conditions.concat_inputs.any()


def test_pictures_that_the_first_stage_does_not_take_are_refused(stages, pictures, tmp_path):
    with pytest.raises(ConfigError, match="--concat_column: concatenated pictures have 3 channels"):
        train(tmp_path, stages, **concat_options(pictures, "color", concat_through_vae=True))


@pytest.mark.parametrize("key", [slow("adm"), "crossattn"])
def test_classes_condition_latents(key, stages, pictures, tmp_path):
    data = {"train_data_dir": str(pictures), "class_column": "kind", "conditioning_key": key}
    train(tmp_path, stages, **data, conditioning_dropout={"class_labels": 0.5}, max_train_steps=2)
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path)
    images = pipeline(class_labels=["a", "b"], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 8, 8, 1)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 9}, "--resolution: The size is 9x9"),
        ({"channels": 3}, "--channels 3: the first stage encodes 1"),
        ({"decoder": "exact"}, "--decoder exact is the probability of a pixel's level"),
        ({"bin_width": 0.1, "validation_bpd": True}, "--bin_width 0.1 has no effect with --vae"),
        ({"loss_type": "perceptual", "perceptual_model": "x"}, "--loss_type perceptual compares images"),
        ({"concat_through_vae": True}, "--concat_through_vae encodes concatenated pictures"),
        ({"concat_through_vae": "samples"}, "one of mode, sample: did you mean sample"),
        ({"latent_stats": True, "scale_factor": "data"}, "--scale_factor data has no effect with --latent_stats"),
        ({"scale_by_std": True, "scale_factor": 2.0}, "--scale_by_std contradicts --scale_factor 2.0"),
        ({"scale_factor": "datum"}, "a number, or data or vae"),
        ({"scale_factor": 0}, "must be above 0"),
        ({"vae": "no/repository"}, "--vae: no/repository is not a folder on this machine"),
        ({"vae_subfolder": "nowhere"}, "--vae_subfolder nowhere does not exist"),
        ({"block_out_channels": [8, 8, 8, 8]}, "halve its latents, of 4x4,"),
    ],
)
def test_wrong_options_are_refused(options, message, stages, tmp_path):
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "run", stages, **options)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_mode_without_a_posterior_is_refused(stages, tmp_path):
    with pytest.raises(ConfigError, match="--latent_mode has no effect: VQModel has no posterior"):
        train(tmp_path, stages, "vq", latent_mode=True)


@pytest.mark.parametrize("vae", ["./nowhere", "/no/such/folder", "model.ckpt", "a/b/c"])
def test_a_first_stage_that_is_not_there_is_refused(vae, tmp_path):
    with pytest.raises(ConfigError, match="--vae"):
        tiny_run(tmp_path, vae=vae)


def test_clipping_is_off_unless_it_is_requested(stages, tmp_path):
    assert not config(tmp_path, stages).schedule.clip_sample
    assert config(tmp_path, stages, clip_sample=True, clip_sample_range=4.0).schedule.clip_sample
    assert tiny_run(tmp_path).schedule.clip_sample


@pytest.mark.parametrize("options", [{"clip_sample": True}, {"thresholding": True}])
def test_clipping_latents_is_warned_of(options, stages, tmp_path, capsys):
    build_setup(config(tmp_path, stages, **options))
    assert "cuts off latents while sampling" in capsys.readouterr().err
