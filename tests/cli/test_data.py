"""`ddpm-ext data`: what it says about folders whose content is known."""

from __future__ import annotations

import json
import os
import shlex
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT
from PIL import Image

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.cli.data import inspect, parse_data_args
from diffusers_ddpm_ext.cli.data_table import table
from diffusers_ddpm_ext.training.config import parse_train_args
from diffusers_ddpm_ext.training.data.inspection import duplicates as duplicates_module
from diffusers_ddpm_ext.training.data.inspection import inspect as inspect_module
from diffusers_ddpm_ext.training.data.inspection import suggestions as suggestions_module


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A smooth color picture, (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def write(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (48, 32)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number, size).save(folder / f"{number:03d}.png")
    return folder


def resized_header(png: bytes, side: int) -> bytes:
    """A PNG file whose header promises other sides."""
    header = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def run(*argv: object, status: int = 0) -> dict:
    """Run the command; its JSON."""
    assert cli.main(["data", *map(str, argv), "--json", "result.json"]) == status
    return json.loads(Path("result.json").read_text())


def look(*argv: object) -> tuple[dict, str]:
    """Inspect without a picture, which takes longest; the JSON and the table."""
    inspection = inspect(parse_data_args([*map(str, argv)]))
    return json.loads(json.dumps(inspection.to_dict(), allow_nan=False)), table(inspection)


def test_numbers_are_numpys(tmp_path, capsys):
    folder = write(tmp_path / "photos", 12)
    result = run(folder)
    values = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    (kind,) = result["train"]["kinds"]
    assert (kind["channels"], kind["dtype"], kind["count"]) == (3, "uint8", 12)
    assert (kind["low"], kind["high"]) == (values.min(), values.max())
    np.testing.assert_allclose(kind["mean"], values.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(kind["std"], values.std(axis=(0, 1, 2)), rtol=1e-12)
    counts = [np.bincount(values[..., channel].ravel(), minlength=256) for channel in range(3)]
    np.testing.assert_array_equal(kind["histogram"]["counts"], counts)
    assert (kind["histogram"]["start"], kind["histogram"]["bin_width"]) == (0, 1)
    assert result["train"]["sizes"]["most_frequent"] == [{"height": 32, "width": 48, "count": 12}]
    assert result["train"]["modes"] == {"RGB": 12}
    text = capsys.readouterr().out
    assert "32 x 48 all" in text
    with Image.open("photos-data.png") as image:
        assert min(image.size) > 500


def test_faults_are_listed_and_the_status_is_1(tmp_path, capsys):
    folder = write(tmp_path / "photos", 6)
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").touch()
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:500])
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "\x1b[31m.png").write_text("no image")
    (folder / "bomb.png").write_bytes(resized_header((folder / "000.png").read_bytes(), 13_000))
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").mkdir()
    picture(0).save(folder / ".hidden" / "a.png")
    result = run(folder, status=1)
    assert result["train"]["readable"] == 6
    assert result["train"]["not_read"] == {".txt": 1}
    faults = {fault["name"]: fault["reason"] for fault in result["train"]["unreadable"]["files"]}
    assert set(faults) == {"text.png", "empty.jpg", "cut.png", "pipe.png", "loop.png", "\x1b[31m.png", "bomb.png"}
    assert "named pipe" in faults["pipe.png"]
    assert "676 MB" in faults["bomb.png"]
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert "7 unreadable" in captured.err
    assert "--skip_bad_images" in captured.out


def test_names_that_look_like_formulas_are_drawn(tmp_path, capsys):
    """In folders, classes and pairs; with letters that the font lacks."""
    folder = tmp_path / "a $x^{ b$"
    for number, name in enumerate((r"$\frac$", r"語\$ $")):
        write(folder / name, 3, first=3 * number)
        picture(3 * number).save(folder / name / r"$_$.jpg")
    assert len(run(folder)["duplicates"]["near"]) == 2
    assert Path("a-x-b-data.png").is_file()
    assert "Glyph" not in capsys.readouterr().err


def test_a_folder_without_a_readable_image_is_status_2(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("no image")
    assert cli.main(["data", str(tmp_path / "photos"), "--json", "result.json"]) == 2
    captured = capsys.readouterr()
    assert "a.png" in captured.err
    assert "cannot be read  1 image" in captured.out
    assert not list(Path().iterdir())


def test_traits_of_files(tmp_path):
    folder = write(tmp_path / "photos", 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(2).save(folder / "turned.jpg", exif=exif)
    picture(3).save(folder / "moves.gif", save_all=True, append_images=[picture(4)])
    hole = np.array(picture(5).convert("RGBA"))
    hole[0, 0, 3] = 254
    Image.fromarray(hole).save(folder / "hole.png")
    picture(6).convert("L").convert("RGB").save(folder / "colorless.png")
    traits = look(folder)[0]["train"]["traits"]
    names = {trait: [file["name"] for file in found["files"]] for trait, found in traits.items()}
    assert names == {
        "turned by EXIF": ["turned.jpg"],
        "animated": ["moves.gif"],
        "alpha channel": ["hole.png"],
        "transparent pixels": ["hole.png"],
        "color that is gray": ["colorless.png"],
    }


def test_duplicates_and_overlap(tmp_path):
    """The same pixels in another format, other files of the same picture, and a leak into the validation set."""
    train, held_out = write(tmp_path / "train", 20), write(tmp_path / "held_out", 5, first=100)
    picture(0).save(train / "copy.bmp")
    picture(1).save(train / "compressed.jpg", quality=70)
    picture(2).save(held_out / "leak.webp", lossless=True)
    picture(3, (24, 16)).save(held_out / "smaller.png")
    picture(4).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(held_out / "mirrored.jpg")
    result, text = look(train, "--validation_data_dir", held_out)
    found = result["duplicates"]
    assert found["copies"] == {"train": 1, "validation": 0}
    assert [{"train/000.png", "train/copy.bmp"}, {"train/002.png", "validation/leak.webp"}] == sorted(
        ({f"{place['set']}/{place['name']}" for place in group} for group in found["groups"]), key=min
    )
    assert found["overlap_pairs"] == [{"validation": "leak.webp", "train": "002.png"}]
    near = {(pair["first"]["name"], pair["second"]["name"], pair["mirrored"]) for pair in found["near"]}
    assert near == {
        ("001.png", "compressed.jpg", False),
        ("003.png", "smaller.png", False),
        ("004.png", "mirrored.jpg", True),
    }
    assert found["near_complete"]
    assert "1 of 8 images to validate on are training images" in text


def test_simple_shapes_are_no_near_duplicates(tmp_path):
    """Their hashes may agree, which the comparison of pictures corrects."""
    for number in range(30):
        shape = np.full((16, 16), 255 - number, dtype=np.uint8)
        shape[number % 16, number // 16 : 8] = 0
        (tmp_path / "shapes").mkdir(exist_ok=True)
        Image.fromarray(shape).save(tmp_path / "shapes" / f"{number}.png")
    assert look(tmp_path / "shapes")[0]["duplicates"]["copies"]["train"] == 0
    flat = tmp_path / "flat"
    flat.mkdir()
    for level in range(0, 250, 25):
        Image.new("L", (16, 16), level).save(flat / f"{level}.png")
    assert look(flat)[0]["duplicates"]["near"] == []


def test_more_candidates_than_are_compared_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates_module, "MAX_COMPARED", 2)
    folder = tmp_path / "photos"
    folder.mkdir()
    for quality in (60, 70, 80, 90):
        picture(0).save(folder / f"{quality}.jpg", quality=quality)
    result, text = look(folder)
    assert not result["duplicates"]["near_complete"]
    assert "at least 2 pairs" in text


def test_classes_by_folder_and_by_column(tmp_path):
    folder = tmp_path / "animals"
    write(folder / "cat", 6)
    write(folder / "dog", 3, first=6)
    lines = [f"{name}/{number:03d}.png,{number % 3},picture {number}" for name, low, high in
             (("cat", 0, 6), ("dog", 6, 9)) for number in range(low, high)]  # fmt: skip
    (folder / "metadata.csv").write_text("\n".join(["file_name,kind,text", *lines, ""]))
    result, text = look(folder)
    classes = {each["column"]: each for each in result["classes"]}
    assert set(classes) == {"folder", "kind"}
    assert (classes["folder"]["names"], classes["folder"]["train"]) == (["cat", "dog"], [6, 3])
    assert (classes["kind"]["names"], classes["kind"]["train"]) == (["0", "1", "2"], [3, 3, 3])
    assert "--class_column folder" in text
    assert "--class_column kind" in look(folder, "--class_column", "kind")[1]


def test_classes_that_the_validation_images_lack_are_not_suggested(tmp_path):
    write(tmp_path / "train" / "a", 4)
    write(tmp_path / "train" / "b", 4, first=4)
    held_out = write(tmp_path / "held_out", 3, first=8)
    _, text = look(tmp_path / "train", "--validation_data_dir", held_out)
    assert "in no subfolder" in text
    assert "--class_column" not in text.partition("suggested command")[2]


def gray(folder: Path, count: int, **options) -> None:
    for number in range(count):
        picture(number, **options).convert("L").save(folder / f"gray{number}.png")


def arrays(folder: Path, values: np.ndarray) -> None:
    for number in range(3):
        np.save(folder / f"{number}.npy", np.roll(values, number, axis=1))


KINDS = {
    "small": lambda folder: write(folder, 4, size=(28, 28)),
    "odd": lambda folder: write(folder, 4, size=(27, 27)),
    "tiny": lambda folder: write(folder, 4, size=(5, 3)),
    "one pixel": lambda folder: write(folder, 2, size=(1, 1)),
    "wide": lambda folder: write(folder, 4, size=(640, 360)),
    "high": lambda folder: write(folder, 4, size=(100, 200)),
    "large": lambda folder: write(folder, 2, size=(700, 600)),
    "of all sizes": lambda folder: [write(folder, 1, first=n, size=(40 + 9 * n, 90 - 5 * n)) for n in range(9)],
    "a strip": lambda folder: write(folder, 2, size=(900, 10)),
    "a strip among others": lambda folder: (write(folder, 5), write(folder, 1, first=5, size=(40_000, 10))),
    "color and gray": lambda folder: (write(folder, 3), gray(folder, 2)),
    "with faults": lambda folder: (write(folder, 3), (folder / "bad.png").write_text("no image")),
    "arrays": lambda folder: arrays(folder, np.linspace(-3.7, 5.1, 480, dtype=np.float32).reshape(12, 8, 5)),
    "arrays with channels first": lambda folder: arrays(folder, np.linspace(0, 1, 480).reshape(5, 12, 8)),
    "integers without a range": lambda folder: arrays(folder, np.arange(64, dtype=np.int64).reshape(8, 8)),
    "integers below zero": lambda folder: arrays(folder, np.arange(-800, 800, 25, dtype=np.int16).reshape(8, 8)),
    "booleans": lambda folder: arrays(folder, np.eye(8, dtype=bool)),
    "12 bits in 16": lambda folder: arrays(folder, np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)),
    "huge floats": lambda folder: arrays(folder, np.linspace(-1e30, 3e30, 64).reshape(8, 8)),
    "half floats": lambda folder: arrays(folder, np.linspace(-1, 1, 64, dtype=np.float16).reshape(8, 8)),
    "constant": lambda folder: arrays(folder, np.full((8, 8), -2.5)),
    "npz with a label": lambda folder: [
        np.savez(folder / f"{n}.npz", pixels=np.full((8, 8, 3), n / 4), label=np.array(n)) for n in range(3)
    ],
    "named 'a b' $x": lambda folder: write(folder, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_suggested_command_is_accepted_and_reads_the_images(kind, tmp_path):
    from diffusers_ddpm_ext.training.data.dataset import load_data

    folder = tmp_path / kind
    folder.mkdir()
    KINDS[kind](folder)
    words = shlex.split(look(folder)[0]["command"])
    assert words[:2] == ["ddpm-ext", "train"]
    config = parse_train_args(words[2:])
    data = load_data(config.data, config.model.conditioning_key)
    factor = 2 ** (len(config.model.block_out_channels or ()) - 1)
    assert all(side % factor == 0 for side in data.size)


def test_large_sets_are_streamed_and_slow_ones_cached(tmp_path, monkeypatch):
    """Classes are not balanced in a stream, which does not know their numbers."""
    folder = tmp_path / "animals"
    write(folder / "cat", 40)
    write(folder / "dog", 2, first=40)
    words = shlex.split(look(folder)[0]["command"])
    assert "--class_balance" in words
    assert not {"--streaming", "--cache_images"} & {*words}
    monkeypatch.setattr(suggestions_module, "SLOW_START", 1e-4)
    assert "--cache_images always" in look(folder)[0]["command"]
    monkeypatch.setattr(suggestions_module, "STREAMED", 42)
    words = shlex.split(look(folder)[0]["command"])
    assert "--class_balance" not in words
    config = parse_train_args(words[2:])
    assert (config.data.streaming, config.data.validation_examples) == (True, 1000)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing/folder/below"], "does not exist"),
        (["file.png"], "is a file"),
        (["empty"], "has no image"),
        (["photos", "--validation_data_dir", "missing"], "does not exist"),
        (["photos", "--image_column", "image"], "--image_column is for datasets"),
        (["photos", "--validation_split", "test"], "--validation_split is for datasets"),
        (["photos", "--out", "photos/sheet.png"], "is in the folder of images"),
        (["photos", "--json", "photos/a.json"], "is in the folder of images"),
        (["photos", "--out", "sheet.txt"], "must end in .png"),
        (["photos", "--out", "nowhere/sheet.png"], "does not exist"),
        (["photos", "--class_column", "kind"], "metadata"),
        (["photos", "--max_images", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(argv, words, tmp_path, capsys):
    write(Path("photos"), 2)
    Path("empty").mkdir()
    picture(0).save("file.png")
    before = sorted(Path().rglob("*"))
    assert cli.main(["data", *argv]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not captured.out
    assert sorted(Path().rglob("*")) == before


def test_values_outside_of_a_range_are_faults(tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "inside.npy", np.linspace(-1, 1, 64).reshape(8, 8))
    np.save(folder / "outside.npy", np.linspace(-1, 1.001, 64).reshape(8, 8))
    result, text = look(folder, "--data_range", "-1", "1")
    (fault,) = result["train"]["unreadable"]["files"]
    assert fault["name"] == "outside.npy"
    assert "1.001" in fault["reason"]
    assert "--data_range -1 1" in text
    assert look(folder)[0]["train"]["unreadable"]["count"] == 0


def test_nan_and_infinity_are_listed_by_name(tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    values = np.zeros((3, 8, 8), dtype=np.float32)
    values[1, 2, 3], values[2, 4, 5] = np.nan, -np.inf
    for number, image in enumerate(values):
        np.save(folder / f"{number}.npy", image)
    found = look(folder)[0]["train"]["not_finite"]
    assert [file["name"] for file in found["files"]] == ["1.npy", "2.npy"]
    assert "row 2, column 3" in found["files"][0]["reason"]
    assert "row 4, column 5" in found["files"][1]["reason"]


@pytest.mark.parametrize("values", [[-1.7e308, 1.7e308], [1.7e308] * 2, [5e-324] * 2, [1e9, 1e9 + 1e-6], [0, 1e200]])
def test_extreme_floats_have_a_range_and_a_picture(values, tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "a.npy", np.tile(values, (8, 4)))
    result = run(folder) if values == [1.7e308] * 2 else look(folder)[0]
    assert (result["train"]["kinds"][0]["low"], result["train"]["kinds"][0]["high"]) == (min(values), max(values))
    low, high = parse_train_args(shlex.split(result["command"])[2:]).data.data_range or (0, 1)
    assert low <= min(values) <= max(values) <= high


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "photos", 5)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_module, "image_facts", interrupt)
    assert cli.main(["data", str(folder), "--json", "result.json"]) == 130
    assert not list(Path().iterdir())
    assert capsys.readouterr().out == ""


def test_every_key_of_the_json_is_documented(tmp_path):
    page = (ROOT / "docs" / "file-formats.md").read_text()
    section = page.partition("## What `ddpm-ext data --json FILE` writes")[2].partition("\n## ")[0]
    folder = write(tmp_path / "photos", 3)
    picture(0).save(folder / "copy.bmp")
    picture(1).save(folder / "near.jpg")
    (folder / "bad.png").touch()
    result, _ = look(folder, "--validation_data_dir", folder)

    def keys(value):
        if isinstance(value, dict):
            yield from value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from keys(item)

    names = {key for key in keys(result) if not key.startswith(".") and key not in result["train"]["modes"]}
    assert {name for name in names if name not in section} == set()
    assert len(names) > 50


@pytest.mark.slow
def test_ten_thousand_small_images_take_well_under_a_minute_of_one_core(tmp_path):
    write(tmp_path / "photos", 10_000, size=(64, 64))
    start = time.process_time()
    assert look(tmp_path / "photos")[0]["train"]["readable"] == 10_000
    assert time.process_time() - start < 40


def test_a_part_of_the_images_is_said(tmp_path):
    result, text = look(write(tmp_path / "photos", 20), "--max_images", 5)
    assert (result["train"]["images"], result["train"]["read"]) == (20, 5)
    assert "5 of them" in text


def test_a_dataset_on_this_machine(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [picture(number) for number in range(8)]
    labels = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"picture": datasets.Image(), "kind": labels, "number": datasets.Value("int64")})
    rows = {"picture": images, "kind": [0, 1] * 4, "number": list(range(8))}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split, "test": split.select([0, 1])}).save_to_disk(tmp_path / "saved")
    result, _ = look(tmp_path / "saved", "--validation_split", "test")
    assert [(each["column"], each["train"]) for each in result["classes"]] == [("kind", [4, 4])]
    assert result["duplicates"]["overlap"] == 2
    config = parse_train_args(shlex.split(result["command"])[2:])
    assert config.data.dataset_name == str(tmp_path / "saved")
    assert config.data.class_column == "kind"
