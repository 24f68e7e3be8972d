"""Image cache: it holds what decoding gives, whatever happens to its files and to the processes that build it."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.accelerate_state import fresh_accelerate, reset_accelerate  # noqa: F401
from helpers.runs import losses, tiny_run
from PIL import Image
from safetensors.torch import load_file

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data import image_cache, image_scan
from diffusers_ddpm_ext.training.data.batches import batch_stream
from diffusers_ddpm_ext.training.data.cached_images import CachedImages
from diffusers_ddpm_ext.training.data.dataset import load_data
from diffusers_ddpm_ext.training.data.image_records import ImageWriter

COUNT = 12
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_photos(folder: Path, count: int = COUNT, mode: str = "RGB", size: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw = np.random.default_rng(number)
        bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
        pixels = draw.integers(0, 256, (size + number % 3, size + 6, *bands), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def options(tmp_path):
    return DataOptions(
        train_data_dir=str(save_photos(tmp_path / "photos")), resolution=(8, 8), random_flip=True,
        cache_images="always", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


@pytest.fixture
def decoded(monkeypatch):
    """Names of the images that are decoded."""
    names = []
    original = image_scan.decode_image

    def counting(payload, preprocessing):
        names.append(payload.name if isinstance(payload, Path) else "bytes")
        return original(payload, preprocessing)

    monkeypatch.setattr(image_scan, "decode_image", counting)
    return names


def plain(options):
    return load_data(replace(options, cache_images="never"))


def only_cache(options) -> Path:
    (folder,) = Path(options.cache_dir, "ddpm_ext_images").iterdir()
    return folder


def assert_same(one, other, workers=0):
    """The same images in the same batches, for two epochs, to the bit."""
    assert one.fingerprint == other.fingerprint
    assert one.train.images.pixel_format == other.train.images.pixel_format
    first, second = batch_stream(one.train, 3, 5), batch_stream(other.train, 3, 5, num_workers=workers)
    for _ in range(2 * len(one.train) // 5 + 1):
        a, b = next(first), next(second)
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.indices, b.indices)
    if one.validation is not None:
        held_out = range(len(one.validation))
        assert torch.equal(one.validation.pixels(held_out), other.validation.pixels(held_out))
        assert [one.validation.name(i) for i in held_out] == [other.validation.name(i) for i in held_out]


# ------------------------------------------------------------------ the same pixels


@pytest.mark.parametrize("change", [
    {}, {"center_crop": True}, {"resize": "stretch", "channels": 1}, {"random_crop": "before"},
    {"resize": "pad", "vertical_flip": True, "rotate90": True},
], ids=str)  # fmt: skip
def test_cached_images_are_the_decoded_ones(options, change, decoded):
    options = replace(options, **change)
    reference = plain(options)
    for expected in (COUNT, 0):  # the first start decodes, the second does not
        decoded.clear()
        data = load_data(options)
        assert len(decoded) == expected
        assert isinstance(data.train.images, CachedImages)
        assert str(only_cache(options)) in data.description
        assert_same(reference, data)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "float16", "float64"])
def test_arrays_keep_their_dtype_range_and_channels(options, dtype, tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    for number in range(5):
        draw = np.random.default_rng(number)
        values = draw.random((9 + number % 2, 8, 5)) * (1 if dtype.startswith("f") else 100)
        np.save(folder / f"{number}.npy", values.astype(dtype))
    options = replace(options, train_data_dir=str(folder), validation_fraction=0)
    reference = plain(options)
    assert_same(reference, load_data(options))
    assert_same(reference, load_data(options))


def test_workers_read_the_same_files(options):
    assert_same(plain(options), load_data(options), workers=2)
    again = pickle.loads(pickle.dumps(load_data(options).train.images))  # as a worker that is not forked gets it
    assert torch.equal(again.image(4), load_data(options).train.images.image(4))
    assert len(pickle.dumps(again)) < 5000, "the file is not copied into the pickle"


def test_unreadable_images_are_known_without_decoding(options, decoded):
    (Path(options.train_data_dir) / "05.png").write_bytes(b"no image")
    bad = replace(options, skip_bad_images=True)
    reference = plain(bad)
    for _ in range(2):
        data = load_data(bad)
        assert_same(reference, data)
        assert "1 unreadable one left out" in data.description
    decoded.clear()
    with pytest.raises(ConfigError, match=r"1 of 12 images cannot be read: '05.png' \(not an image"):
        load_data(options)
    assert decoded == []


def test_a_dataset_is_read_once(options, tmp_path, decoded):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    files = sorted(Path(options.train_data_dir).iterdir())
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": list(range(len(files)))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    options = replace(options, train_data_dir=None, dataset_name=str(tmp_path / "set"))
    reference = plain(options)
    for expected in (COUNT, 0):
        decoded.clear()
        assert_same(reference, load_data(options))
        assert len(decoded) == expected
    rows["image"][0] = rows["image"][1]
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    decoded.clear()
    assert_same(plain(options), load_data(options))
    assert len(decoded) == 2 * COUNT, "another file is another cache"


def test_a_dataset_of_paths_follows_its_files(options, tmp_path, decoded):
    """The table does not change when a file does that it only names."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    files = sorted(Path(options.train_data_dir).iterdir())
    datasets.Dataset.from_dict({"image": [str(file) for file in files]}).to_parquet(tmp_path / "set" / "train.parquet")
    options = replace(options, train_data_dir=None, dataset_name=str(tmp_path / "set"), image_column="image")
    load_data(options)
    decoded.clear()
    load_data(options)
    assert decoded == []
    shutil.copy(files[1], files[0])
    assert_same(plain(options), load_data(options))


# ------------------------------------------------------------------ what is another cache


@pytest.mark.parametrize("change", ["content", "same size and time", "added", "removed", "renamed"])
def test_changed_files_are_read_again(options, change):
    load_data(options)
    first = Path(options.train_data_dir) / "00.png"
    status = first.stat()
    if change == "content":
        shutil.copy(first.with_name("03.png"), first)
    elif change == "same size and time":
        pixels = np.asarray(Image.open(first))
        first = first.rename(first.with_suffix(".bmp"))
        Image.fromarray(pixels).save(first)
        load_data(options)
        status = first.stat()
        Image.fromarray(255 - pixels).save(first)
        os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert first.stat().st_size == status.st_size
    elif change == "added":
        shutil.copy(first, first.with_name("zz.png"))
    elif change == "removed":
        first.unlink()
    else:
        first.rename(first.with_name("zz.png"))
    assert_same(plain(options), load_data(options))


def test_every_option_of_the_pixels_has_its_own_cache(options):
    changes = [{}, {"resolution": (8, 9)}, {"center_crop": True}, {"channels": 1}, {"resize": "pad"},
               {"resize_filter": "lanczos"}, {"random_crop": "before"}]  # fmt: skip
    for change in changes:
        load_data(replace(options, **change))
    assert len([f for f in Path(options.cache_dir, "ddpm_ext_images").iterdir() if f.is_dir()]) == len(changes)
    for change in ({"random_flip": False}, {"vertical_flip": True}, {"validation_fraction": 0.5}):
        load_data(replace(options, **change))  # made of the same pixels
    assert len([f for f in Path(options.cache_dir, "ddpm_ext_images").iterdir() if f.is_dir()]) == len(changes)


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["index.bin", "pixels.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["empty", "longer", "missing", "garbage"])
def test_a_damaged_cache_is_built_again(options, name, damage, capsys):
    reference = plain(options)
    load_data(options)
    path = only_cache(options) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        half = len(content) // 2
        path.write_bytes({"empty": b"", "longer": content + b"x"}.get(damage, os.urandom(half)))
    assert_same(reference, load_data(options))
    is_said = "is damaged: it is built again" in capsys.readouterr().err
    assert is_said == ((name, damage) != ("manifest.json", "missing"))
    load_data(options)
    assert "damaged" not in capsys.readouterr().err


def test_a_damaged_image_is_decoded_again(options, capsys):
    """One flipped bit, which no size shows: the run goes on with the right pixels, the next one has a new cache."""
    reference = plain(options)
    load_data(options)
    path = only_cache(options) / "pixels.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for size in ({}, {"center_crop": True}):
        one = replace(options, **size)
        load_data(one)
        path.write_bytes(content) if not size else None
        assert_same(plain(one), load_data(one))
    assert capsys.readouterr().err.count("damaged images are decoded again") == 1
    assert_same(reference, load_data(options))
    assert bytes(content) != path.read_bytes()


def test_a_damaged_image_of_a_stack_is_decoded_again(options, capsys):
    options = replace(options, center_crop=True)
    reference = plain(options)
    load_data(options)
    path = only_cache(options) / "pixels.bin"
    content = bytearray(path.read_bytes())
    content[500] ^= 255
    path.write_bytes(content)
    assert_same(reference, load_data(options))
    assert capsys.readouterr().err.count("is damaged: damaged images are decoded again") == 1


def test_what_is_damaged_and_gone_is_named(options):
    data = load_data(replace(options, validation_fraction=0))
    path = only_cache(options) / "pixels.bin"
    path.write_bytes(bytes(path.stat().st_size))
    data = load_data(replace(options, validation_fraction=0))
    shutil.rmtree(options.train_data_dir)
    with pytest.raises(RunError, match=r"'\d\d.png' of --train_data_dir .* became unreadable"):
        list(zip(range(3), batch_stream(data.train, 0, 5), strict=False))


# ------------------------------------------------------------------ folders that cannot be written


def test_a_folder_that_cannot_be_written(options, tmp_path, capsys, monkeypatch):
    """always is an error that names the way out, auto a run without a cache, which says so."""
    (tmp_path / "file").touch()
    options = replace(options, cache_dir=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"--cache_images always: .*file.* cannot be used: Not a directory; name"):
        load_data(options)
    monkeypatch.setattr(image_cache, "MANY_IMAGES", 1)
    data = load_data(replace(options, cache_images="auto"))
    assert "warning: --cache_images auto: " in capsys.readouterr().err
    assert_same(plain(options), data)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk(options, monkeypatch, capsys, when):
    if when == "before":
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        reason = "the images take about .* bytes, and 100 are free"
    else:
        append = ImageWriter.append

        def fill(self, *arguments):
            if self.rows == 7:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(self, *arguments)

        monkeypatch.setattr(ImageWriter, "append", fill)
        reason = "No space left on device"
    with pytest.raises(ConfigError, match=f"cannot be used: {reason}; name another folder by --cache_dir"):
        load_data(options)
    monkeypatch.setattr(image_cache, "MANY_IMAGES", 1)
    data = load_data(replace(options, cache_images="auto"))
    assert "No space left" in capsys.readouterr().err or when == "before"
    assert list(only_cache(options).iterdir()) == [], "auto leaves nothing on a full disk"
    assert_same(plain(options), data)


def test_a_complete_cache_needs_no_permission_to_write(options, decoded):
    load_data(options)
    decoded.clear()
    before = {path: path.stat().st_mtime_ns for path in Path(options.cache_dir).rglob("*")}
    load_data(options)
    assert decoded == []
    assert before == {path: path.stat().st_mtime_ns for path in Path(options.cache_dir).rglob("*")}


# ------------------------------------------------------------------ auto


def test_auto_caches_what_takes_long(options, monkeypatch):
    auto = replace(options, cache_images="auto")
    assert not isinstance(load_data(auto).train.images, CachedImages)
    assert not Path(options.cache_dir).exists()
    assert isinstance(load_data(auto, memory_limit=COUNT * 64 - 1).train.images, CachedImages)
    shutil.rmtree(options.cache_dir)
    monkeypatch.setattr(image_cache, "MANY_BYTES", 1000)
    assert isinstance(load_data(auto).train.images, CachedImages)
    monkeypatch.setattr(image_cache, "MANY_BYTES", 2**28)
    assert isinstance(load_data(auto).train.images, CachedImages), "one that is there is used"


def test_auto_caches_images_that_turn_out_to_be_larger_than_the_first(options, tmp_path):
    folder = tmp_path / "strips"
    save_photos(folder, 4)
    for number in range(4):
        Image.new("RGB", (80, 8), (number, 9, 9)).save(folder / f"strip {number}.png")
    auto = replace(options, cache_images="auto", train_data_dir=str(folder))
    data = load_data(auto, memory_limit=8 * 8 * 12 * 3)
    assert isinstance(data.train.images, CachedImages)
    assert_same(plain(auto), data)


def test_values_that_need_an_option_leave_no_cache(options, tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "0.npy", np.full((8, 8, 1), 7.5, np.float32))
    np.save(folder / "1.npy", np.zeros((8, 8, 1), np.float32))
    wrong = replace(options, train_data_dir=str(folder))
    with pytest.raises(ConfigError, match="--data_range"):
        load_data(wrong)
    assert list(only_cache(options).iterdir()) == []


def test_remote_files_are_not_cached(options, tmp_path):
    datasets = pytest.importorskip("datasets")
    fsspec = pytest.importorskip("fsspec")
    datasets.disable_progress_bars()
    content = io.BytesIO()
    Image.new("L", (8, 8), 7).save(content, "PNG")
    with fsspec.open("memory://cached.png", "wb") as file:
        file.write(content.getvalue())
    datasets.Dataset.from_dict({"image": ["memory://cached.png"] * 3}).to_parquet(tmp_path / "set" / "train.parquet")
    options = replace(options, train_data_dir=None, dataset_name=str(tmp_path / "set"), image_column="image")
    with pytest.raises(ConfigError, match=r"memory://cached.png is in another file system, where changes cannot be"):
        load_data(options)
    assert len(load_data(replace(options, cache_images="auto")).train) == 2


# ------------------------------------------------------------------ several processes, killed processes

BUILD = """
import os, signal, sys, time
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data import image_scan, image_records
from diffusers_ddpm_ext.training.data.dataset import load_data
folder, cache, die_at, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
image_scan.IMAGES_PER_BLOCK = 1
count, original, append = 0, image_scan.decode_image, image_records.ImageWriter.append
def decode(*arguments):
    global count
    count += 1
    time.sleep(seconds)
    return original(*arguments)
def writing(self, *arguments):
    append(self, *arguments)
    if self.rows == die_at:
        self._files["pixels.bin"].flush()
        os.kill(os.getpid(), signal.SIGKILL)
image_scan.decode_image, image_records.ImageWriter.append = decode, writing
options = DataOptions(train_data_dir=folder, resolution=(8, 8), cache_images="always", cache_dir=cache)
data = load_data(options, progress=True)
print(count, data.fingerprint)
"""


def start_build(options, die_at: int = 0, seconds: float = 0.0) -> subprocess.Popen:
    arguments = [options.train_data_dir, options.cache_dir, str(die_at), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_an_interrupted_build_continues_where_it_ended(options, monkeypatch, decoded):
    class Killed(BaseException):
        pass

    append = ImageWriter.append

    def stop(self, *arguments):
        append(self, *arguments)
        if self.rows == 7:
            raise Killed

    (Path(options.train_data_dir) / "02.png").write_bytes(b"no image")
    options = replace(options, skip_bad_images=True)
    with monkeypatch.context() as context:
        context.setattr(ImageWriter, "append", stop)
        with pytest.raises(Killed):
            load_data(options)
    parts = [only_cache(options) / name for name in ("index.bin.part", "pixels.bin.part")]
    with parts[1].open("ab") as file:
        file.write(b"half an image")
    decoded.clear()
    data = load_data(options)
    assert sorted(decoded) == [f"{number:02}.png" for number in range(7, COUNT)]
    assert_same(plain(options), data)
    assert not any(part.exists() for part in parts)


@pytest.mark.slow
def test_killed_builds(options):
    """Killed after 3, and 8 images: the third process decodes only the last ones."""
    for die_at in (3, 8):
        process = start_build(options, die_at)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    output, _ = start_build(options).communicate()
    count, fingerprint = output.split()
    assert int(count) == COUNT - 8
    assert fingerprint == plain(options).fingerprint


@pytest.mark.slow
def test_builds_killed_at_any_time(options):
    for attempt in range(12):
        process = start_build(options, seconds=0.05)
        time.sleep(2.5 + 0.15 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    data = load_data(options)
    assert_same(plain(options), data)
    assert sorted(path.name for path in only_cache(options).iterdir()) == ["index.bin", "manifest.json", "pixels.bin"]


@pytest.mark.slow
def test_two_processes_build_one_cache(options):
    """One decodes all images, the other waits, says so, and decodes none."""
    processes = [start_build(options, seconds=0.3) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    counts = sorted(int(out.split()[0]) for out, _ in outputs)
    assert counts == [0, COUNT]
    assert {out.split()[1] for out, _ in outputs} == {plain(options).fingerprint}
    assert sum("another process reads the same images" in err for _, err in outputs) == 1


# ------------------------------------------------------------------ from the command line


def test_a_run_with_the_cache_has_the_same_losses(options, tmp_path):
    images = {"train_data_dir": options.train_data_dir, "random_flip": True, "cache_dir": options.cache_dir}
    few = {"max_train_steps": 3, "validation_fraction": 0, "use_ema": False, "logging_steps": 1}
    load_data(options)
    for mode in ("never", "always"):
        reset_accelerate()
        trainer.train(tiny_run(tmp_path / mode, **images, **few, cache_images=mode))
    assert losses(tmp_path / "never") == losses(tmp_path / "always")
    assert len(losses(tmp_path / "never")) == 3
    one, other = (load_file(tmp_path / mode / "unet" / WEIGHTS) for mode in ("never", "always"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_digits_need_no_cache(tmp_path):
    with pytest.raises(ConfigError, match="--cache_images always needs --train_data_dir or --dataset_name"):
        tiny_run(tmp_path, cache_images="always")
