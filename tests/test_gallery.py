"""What `benchmarks/build_gallery.py` rests on: its data, features, stages and commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.tiny import tiny_unet
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(ROOT / "benchmarks"))

import build_gallery
import digits_recipes
from diffusers import DDIMScheduler, UNet2DModel
from gallery import brain, features, page, sheets
from gallery.entries import ENTRIES

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.train_config import parse_train_args
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.utils.random_keys import generator


def nifti(values: np.ndarray, code: int, slope: float) -> bytes:
    """A NIfTI-1 file, by the layout of its standard."""
    header = np.zeros(352, np.uint8)
    header[:4] = np.frombuffer(np.int32(348).tobytes(), np.uint8)
    header[40:56] = np.frombuffer(np.array([3, *values.shape, 1, 1, 1, 1], "<i2").tobytes(), np.uint8)
    header[70:72] = np.frombuffer(np.int16(code).tobytes(), np.uint8)
    header[108:120] = np.frombuffer(np.array([352, slope, 3], "<f4").tobytes(), np.uint8)
    return header.tobytes() + values.tobytes(order="F")


@pytest.mark.parametrize(("code", "dtype"), [(2, "u1"), (4, "<i2"), (16, "<f4"), (64, "<f8")])
def test_volumes_are_read_by_the_header(code, dtype):
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(dtype)
    np.testing.assert_array_equal(brain.read_nifti(nifti(values, code, 2)), values * 2.0 + 3)
    np.testing.assert_array_equal(brain.read_nifti(nifti(values, code, 0)), values + 3.0)  # 0: no slope


def test_other_files_are_no_volumes():
    with pytest.raises(ValueError, match="NIfTI"):
        brain.read_nifti(bytes(400))


def test_slices_keep_their_bands_and_are_on_one_side(tmp_path):
    """Bands of constant levels stay constant inside; no slice is in both parts, and held-out ones come in fours."""
    shape, inside = (96, 96, 96), np.s_[8:88, 8:88, 8:88]
    volumes = {band: np.zeros(shape) for band in brain.BANDS}
    for level, band in enumerate(brain.BANDS):
        volumes[band][inside] = level + 1
    report = brain.write_slices(tmp_path, volumes)
    files = {part: sorted((tmp_path / part).glob("*/*.npy")) for part in ("train", "held_out")}
    assert {part: len(found) for part, found in files.items()} == report["images"]
    places = {part: {path.relative_to(tmp_path / part) for path in found} for part, found in files.items()}
    assert not places["train"] & places["held_out"]
    assert len(places["train"] | places["held_out"]) == 3 * 80
    assert {int(path.stem) % 32 for path in files["held_out"]} == {0, 1, 2, 3}
    image = np.load(files["train"][0])
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint16)
    assert (image == 65535).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_features_are_whitened_and_the_file_computes_them(tmp_path):
    """Over the training images every feature of the traced file has mean 0 and deviation 1."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("held_out", 8)):
        for place, red in (("dark", 60), ("light", 200)):
            folder = tmp_path / part / place
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 50, (64, 64, 3), dtype=np.uint8) + np.array([red, 0, 0], np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    accuracy = features.save_extractor(tmp_path, tmp_path / "features.pt")
    assert accuracy > 0.9
    images, labels, names = features.read_images(tmp_path / "train")
    assert names == ["dark", "light"]
    assert labels.tolist() == [0] * 40 + [1] * 40
    assert float(images.min()) >= -1
    with torch.no_grad():
        values = torch.jit.load(str(tmp_path / "features.pt"))(images)
    torch.testing.assert_close(values.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(0), torch.ones(64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["digits", "d", "my runs/it's", "."])
def test_only_paths_become_the_word_folder(name, tmp_path, monkeypatch):
    """A folder whose name is a word, a letter or a dot: names, numbers and keys stay."""
    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    text = '{"name": "digits", "commands": "0.5 d ./x digits of scikit-learn", "a": "%s", "b": "%s"}'
    filled = text % (folder / "model" / "unet", folder.resolve() / "data")
    shown = build_gallery.without_place(filled, folder)
    first = "FOLDER/model/unet" if name != "." else "model/unet"
    assert shown.replace("FOLDER/x", "./x") == text % (first, "FOLDER/data")
    assert build_gallery.without_place(f"in {folder.resolve()}.", Path(name)) == f"in {folder.resolve()}."
    assert build_gallery.without_place(f"'{folder.resolve()}'", Path(name)) == "'FOLDER'"


def test_paths_with_spaces_and_quotes_are_one_option(tmp_path):
    names = build_gallery.names_in(Path("my runs/it's"))
    words = build_gallery.training_words(ENTRIES["emoji-latents"].training[1], names, tmp_path, 1.0)
    assert words[words.index("--train_data_dir") + 1] == "my runs/it's/data/train"
    assert json.loads(words[words.index("--conditioning_dropout") + 1]) == {"class_labels": 0.1}


def test_a_file_in_the_place_of_the_results_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, str(ROOT / "benchmarks" / "build_gallery.py"), "digits", str(tmp_path / "work")]
    done = subprocess.run([*command, "--results", str(tmp_path / "file")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is a file: name a folder" in done.stderr
    assert not (tmp_path / "work").exists()


def test_labels_have_the_shares_of_the_folder(tmp_path):
    for place, count in (("a", 30), ("b", 10)):
        (tmp_path / place).mkdir()
        for index in range(count):
            (tmp_path / place / str(index)).touch()
    assert build_gallery.labels_like(tmp_path, 8) == ["a"] * 6 + ["b"] * 2


def test_a_stage_is_done_once_and_its_starts_are_counted(tmp_path):
    calls = []

    def fails() -> float:
        calls.append("fails")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_gallery.Stages(tmp_path).run("work", fails)
    for _ in range(2):
        build_gallery.Stages(tmp_path).run("work", lambda: calls.append("done") or 2.5)
    stage = json.loads((tmp_path / "stages.json").read_text())["work"]
    assert calls == ["fails", "done"]
    assert (stage["starts"], stage["value"], stage["is_done"]) == (2, 2.5, True)


def test_times_are_summed_over_starts(tmp_path, monkeypatch):
    """Each look at the clock is 3 seconds of the processor after the one before."""
    clock = iter(range(0, 60, 3))
    monkeypatch.setattr(build_gallery, "cpu_seconds", lambda: float(next(clock)))

    def fails() -> None:
        raise SystemExit("error: ended")

    for _ in range(2):
        with pytest.raises(SystemExit):
            build_gallery.Stages(tmp_path).run("work", fails)
    build_gallery.Stages(tmp_path).run("work", lambda: None)
    assert json.loads((tmp_path / "stages.json").read_text())["work"]["cpu_seconds"] == 9.0


def test_a_signal_is_passed_on_and_waited_for(tmp_path):
    """SIGTERM to the script alone: the program ends as it likes, here after it has written a file."""
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), pathlib.Path('saved').touch(), sys.exit(3)))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(30)\n"
    )
    script = f"from build_gallery import command; import sys; command(sys.executable, '-c', {program!r})()"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert "ended with status 3" in process.communicate(timeout=30)[1]
    assert (tmp_path / "saved").exists()


def test_captions_are_above_their_rows():
    """Pixels below a caption are the row's images; above them it is black on white."""
    black = -torch.ones(2, 3, 8, 8)
    sheet = np.asarray(sheets.calls_sheet([("one", black), ("two", -black)], 2))
    assert sheet.shape == (2 * (16 + sheets.MARGIN), 2 * 16 + 4, 3)
    assert (sheet[sheets.MARGIN : sheets.MARGIN + 16, :16] == 0).all()
    assert (sheet[-16:] == 255).all()
    assert sheet[: sheets.MARGIN].min() < 128


def test_tall_sheets_are_shown_side_by_side():
    """Twelve rows of different gray in three parts; what cannot be cut evenly stays."""
    rows = np.repeat(np.arange(12, dtype=np.uint8) * 20, 5)[:, None, None] * np.ones((1, 7, 3), np.uint8)
    sheet = Image.fromarray(rows)
    wide = np.asarray(sheets.side_by_side(sheet, 3, 0))
    starts = [0, 7 + sheets.MARGIN, 2 * (7 + sheets.MARGIN)]
    assert wide.shape == (20, starts[-1] + 7, 3)
    assert [int(wide[0, start, 0]) for start in starts] == [0, 80, 160]
    assert sheets.side_by_side(sheet, 7, 0) is sheet
    without_last = sheet.crop((0, 0, 7, 58))  # rows of three pixels and two between them
    assert sheets.side_by_side(without_last, 3, 2).size == (starts[-1] + 7, 20)


def test_sheets_keep_their_colors_unless_they_are_large(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for largest, colors in ((400_000, 1600), (2000, 256)):
        monkeypatch.setattr(sheets, "MAX_BYTES", largest)
        sheets.save_small(Image.fromarray(pixels), tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            shown = np.asarray(sheet.convert("RGB"))
        assert (shown == pixels).all() == (colors == 1600)
        assert len(np.unique(shown.reshape(-1, 3), axis=0)) <= colors


def test_an_animation_has_the_frames_and_holds_the_last(tmp_path):
    frames = [torch.full((2, 3, 8, 8), value) for value in (-1.0, 0.0, 1.5)]
    sheets.save_animation(frames, tmp_path / "strip.webp", 1)
    with Image.open(tmp_path / "strip.webp") as strip:
        assert (strip.n_frames, strip.size) == (3, (2 * 8 + 4, 8))
        first = np.asarray(strip.convert("RGB"))[:, :8]
        strip.seek(2)
        last = np.asarray(strip.convert("RGB"))[:, :8]
        assert strip.info["duration"] == sheets.LAST_FRAME_MS  # known once the frame is decoded
    assert first.max() < 10
    assert last.min() > 245


def test_a_long_animation_shows_its_frames_evenly(tmp_path):
    """Frame i of 101 has brightness i / 100: the 26 shown ones are every fourth."""
    frames = [torch.full((1, 3, 8, 8), index / 50 - 1) for index in range(101)]
    sheets.save_animation(frames, tmp_path / "strip.webp", 1)
    with Image.open(tmp_path / "strip.webp") as strip:
        assert strip.n_frames == 26
        for number in range(26):
            strip.seek(number)
            assert np.asarray(strip.convert("L")).mean() == pytest.approx(number * 4 / 100 * 255, abs=4)


@pytest.mark.parametrize("width", [300, 400, 600])
def test_sheets_stay_narrow_enough_to_read(width, tmp_path):
    """Three parts beside each other up to 1,100 pixels, else two of what may be cut in two, else one."""
    folder = tmp_path / "work"
    for name in build_gallery.SHEETS[:4]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, 6 * 20 - (4 if "copies" in name else 0))).save(folder / name)
    (folder / "denoising.webp").write_bytes(b"frames")
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler()).save_pretrained(folder / "model")
    build_gallery.publish(folder, {"name": "one"}, tmp_path / "results")
    parts = {300: (3, 3), 400: (1, 2), 600: (1, 1)}[width]
    for name, count in zip(("calls.png", "copies.png"), parts, strict=True):
        with Image.open(tmp_path / "results" / name) as sheet:
            assert sheet.width == count * width + (count - 1) * sheets.MARGIN, name


@pytest.mark.parametrize("has_first_stage", [False, True])
def test_what_is_shown_is_copied_without_names_of_folders(has_first_stage, tmp_path):
    """Pictures keep their pixels; tall ones are cut; the folder's name is in no text."""
    folder, place = tmp_path / "work", tmp_path / "results"
    for name in build_gallery.SHEETS:
        if has_first_stage or name != build_gallery.RECONSTRUCTIONS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 60), (200, 10, 0)).save(folder / name)
    (folder / "denoising.webp").write_bytes(b"frames")
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler()).save_pretrained(folder / "model")
    Image.new("RGB", (8, 8)).save(folder / "model" / "samples" / "logvar.png")
    build_gallery.publish(folder, {"name": "one", "command": f"train --out {folder}/model"}, place)
    shown = {Path(name).name for name in build_gallery.SHEETS if has_first_stage or "reconstructions" not in name}
    assert {path.name for path in place.iterdir()} == shown | {"denoising.webp", "results.json", "card.md"}
    card = (place / "card.md").read_text()
    assert "\n# one\n" in card
    assert re.findall(r"\]\((.*png)\)", card) == ["loss.png"]
    assert str(tmp_path) not in card
    with Image.open(place / "samples.png") as sheet:
        assert (np.asarray(sheet.convert("RGB")) == (200, 10, 0)).all()
    with Image.open(place / "calls.png") as sheet:
        assert sheet.size == (3 * 40 + 2 * sheets.MARGIN, 20)
    assert json.loads((place / "results.json").read_text()) == {"name": "one", "command": "train --out FOLDER/model"}


def test_large_animations_are_written_with_less_quality(tmp_path, monkeypatch):
    frames = [torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(3)]
    sizes = []
    for largest in (400_000, 0):
        monkeypatch.setattr(sheets, "MAX_BYTES", largest)
        sheets.save_animation(frames, tmp_path / "strip.webp", 1)
        sizes.append((tmp_path / "strip.webp").stat().st_size)
    assert sizes[1] < sizes[0] / 1.5


def test_held_out_digits_are_those_of_scikit_learn_that_no_run_trains_on(tmp_path):
    build_gallery.save_held_out_digits(tmp_path / "held_out.npz")
    held_out = np.load(tmp_path / "held_out.npz")["arr_0"]
    data = load_data(DataOptions(resolution=(8, 8)))
    assert len(held_out) + len(data.train) == 1797
    real = {image.astype(np.float32).tobytes() for image in load_digits().images}
    assert all((image * 16).tobytes() in real for image in held_out)


def test_fewer_samples_keep_the_shares_of_classes(tmp_path):
    """Of six samples of one class and three of another, every third; no more than there are."""
    np.savez(tmp_path / "all.npz", np.repeat([1, 2], [6, 3]))
    for count, expected in ((3, [1, 1, 2]), (20, [1] * 6 + [2] * 3)):
        build_gallery.save_evenly(tmp_path / "all.npz", tmp_path / "fewer.npz", count)
        assert np.load(tmp_path / "fewer.npz")["arr_0"].tolist() == expected


def results_of(folder: Path, **changes: object) -> dict[str, Any]:
    """Results of an entry, as `build_gallery.py` writes them."""
    metric = {"value": 12.3456, "low": 10.0, "high": 1234.5}
    metrics = {"num_samples": 1000, "num_reference": 383, "metrics": dict.fromkeys(page.METRICS, metric)}
    rate = {"value": 0.0125, "low": 0.0, "high": 0.03}
    found = {
        "title": "One",
        "metrics": metrics,
        "metrics-fewer": metrics | {"num_samples": 54},
        "metrics-real": metrics | {"num_samples": 55},
        "copies": {"memorization": {"rate": rate, "chance": rate}},
        "bound": {"bits_per_dim": 1.25, "low": 1.2, "high": 1.3, "num_images": 55},
        "stages": {
            "model": {"starts": 2, "cpu_seconds": 6001.0},
            "samples": {"starts": 1, "cpu_seconds": 30.0},
            "metrics": {"starts": 2, "cpu_seconds": 61.2},
        },
        "commands": {"model": "ddpm-ext train --one 1 --two '" + "2" * 90 + "'"},
        "model": {"threads": 1, "parameters": 4_300_000},
        "machine": {"name": "a processor", "cores": 2, "python": "3.11.7"},
        "versions": {"torch": "2.13.0"},
        "sha256": {"model/unet/weights": "aa"},
    } | changes
    (folder / "one").mkdir(parents=True)
    (folder / "one" / "results.json").write_text(json.dumps(found))
    return found


def test_the_page_gets_the_numbers_of_its_entries(tmp_path):
    """Text outside the marks stays; numbers are those of the file, and a second filling changes nothing."""
    results_of(tmp_path)
    text = "# Gallery\n<!-- numbers: one -->\nold\n<!-- end -->\nprose\n"
    filled = page.fill(text, tmp_path)
    assert filled.startswith("# Gallery\n<!-- numbers: one -->\n|")
    assert filled.endswith("<!-- end -->\nprose\n")
    assert "old" not in filled
    for expected in (
        "12.3 (10 to 1234)",
        "1,000 samples | 54 samples | 55 held-out images",
        "383 training images",
        "1.2 % (0.0 to 3.0)",
        "1.250 (1.200 to 1.300), 55 images",
        "| model | 1 h 40 min in 2 starts |",
        "| metrics | 61 s in 2 starts |",
        "```\nddpm-ext train --one 1 \\\n  --two '" + "2" * 90 + "'\n```",
        "4.30 million parameters; one thread of a processor",
    ):
        assert expected in filled
    assert page.fill(filled, tmp_path) == filled


def test_two_entries_are_compared(tmp_path):
    """Training is the sum over the commands alone; each column is of its own entry."""
    found = results_of(tmp_path)
    slow = found | {"title": "Two", "stages": found["stages"] | {"model": {"starts": 1, "cpu_seconds": 240.0}}}
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "results.json").write_text(json.dumps(slow))
    filled = page.fill("<!-- compared: one two -->\n<!-- end -->\n", tmp_path)
    assert "| | One | Two |" in filled
    assert "| time of the processor, training | 1 h 40 min | 4 min |" in filled
    assert "| the same, 1,000 samples | 30 s | 30 s |" in filled
    assert filled.count("| 12.3 (10 to 1234) | 12.3 (10 to 1234) |") == len(page.METRICS)
    assert page.fill(filled, tmp_path) == filled


def test_a_model_of_latents_has_no_bound(tmp_path):
    found = results_of(tmp_path)
    del found["bound"]
    found["first stage"] = {"val/psnr_ema": 28.04}
    lines = "\n".join(page.numbers(found))
    assert "bits per dimension" not in lines
    assert "| first stage: PSNR of reconstructions | | | 28.0 dB |" in lines


def test_the_gallery_page_has_the_numbers_of_its_results():
    text = (ROOT / "docs" / "gallery.md").read_text("utf-8")
    assert page.fill(text, ROOT / "docs" / "gallery") == text
    shown = {match["entries"] for match in page.BLOCK.finditer(text) if match["kind"] == "numbers"}
    assert shown == {path.parent.name for path in (ROOT / "docs" / "gallery").glob("*/results.json")}
    assert shown <= ENTRIES.keys()
    assert all(f"](gallery/{name}/card.md)" in text for name in shown)
    files = [path for path in (ROOT / "docs" / "gallery").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6


@pytest.mark.parametrize("name", ENTRIES)
def test_the_options_of_every_entry_exist(name, tmp_path):
    """Training commands are parsed as they will be run."""
    names = build_gallery.names_in(tmp_path)
    for part in ("train", "held_out"):
        place = Path(names["data"]) / part / "one"
        place.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(place / "0.png")
    for training in ENTRIES[name].training:
        build_gallery.place_of(training, tmp_path).mkdir()
    if "{vae}" in ENTRIES[name].training[-1].options:
        (Path(names["vae"]) / "config.json").write_text("{}")
    for training in ENTRIES[name].training:
        words = build_gallery.training_words(training, names, tmp_path / "run", 1.0)
        assert words[3] == training.command
        if training.command == "train":
            assert parse_train_args(words[4:]).loop.max_train_steps == training.steps


def test_the_former_recipe_of_the_digits_is_complete():
    """What the default has changed since, and the former recipe's values."""
    config = parse_train_args(digits_recipes.FORMER.split())
    former = {"attention_levels": (1,), "max_train_steps": 4000, "learning_rate": 2e-3, "lr_scheduler": "cosine",
              "beta_schedule": "linear", "ema_decay": 0.999, "eval_batch_size": 16, "train_batch_size": 64,
              "lr_warmup_steps": 100, "block_out_channels": (32, 64), "adam_beta2": 0.999}  # fmt: skip
    flat = config.to_flat_dict()
    assert {name: tuple(flat[name]) if isinstance(flat[name], list) else flat[name] for name in former} == former


def test_samples_are_of_one_class_after_the_other():
    """A model with the classes 0 and 2, and a null class between them.

    It predicts v: a predicted epsilon is divided by sqrt(alphas_cumprod), 0.006 at the first of two steps, and so is
    the rounding, which differs between batches of one and of four.
    """
    torch.manual_seed(0)
    unet = UNet2DModel(**tiny_unet(1).config | {"num_class_embeds": 3})
    scheduler = DDPMExtScheduler(prediction_type="v_prediction")
    pipeline = DDPMExtPipeline(unet, scheduler, "adm", null_class_label=1)
    pipeline.set_progress_bar_config(disable=True)
    images = sheets.draw(pipeline, "DDIMScheduler", 2, 4, 1.0)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    for row, label in enumerate((0, 2, 0, 2)):
        noise = [generator("sample", 0, row)]
        one = pipeline(1, noise, num_inference_steps=2, output_type="pt", class_labels=[label]).images
        torch.testing.assert_close(images[row], one[0] * 2 - 1, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["digits", "digits-classes"])
def test_an_entry_is_built_and_resumed(entry, tmp_path):
    """One command, at a hundredth of the steps; the second start finds everything done."""
    command = [sys.executable, str(ROOT / "benchmarks" / "build_gallery.py"), entry, str(tmp_path / "work")]
    command += ["--scale", "0.01", "--results", str(tmp_path / "results")]
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True)
        found = json.loads((tmp_path / "results" / "results.json").read_text())
    refused = subprocess.run([*command, "--scale", "0.02"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "name another folder" in refused.stderr
    assert {stage["starts"] for stage in found["stages"].values()} == {1}
    assert {"fd", "kid"} <= found["metrics"]["metrics"].keys()
    assert found["bound"]
    assert str(tmp_path) not in json.dumps(found)
    assert found["metrics-fewer"]["num_samples"] == 60 < found["metrics-real"]["num_samples"]
    assert found["metrics-real"]["num_samples"] == len(np.load(tmp_path / "work" / "held_out.npz")["arr_0"])
    assert list(page.numbers(found))
    with Image.open(tmp_path / "results" / "denoising.webp") as strip:
        assert strip.n_frames == ENTRIES["digits"].calls + 1
    with Image.open(tmp_path / "results" / "samples.png") as sheet:
        assert sheet.size == (16 * 48 + 15 * 4, 4 * 48 + 3 * 4)
