"""The cache of latents: equal to encoding, built once, completed after a kill, repaired after damage."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import VQModel
from helpers.cache_cases import COUNT, HELD_OUT, RECORD, SIZE, make_data, make_stage
from helpers.paths import PYTHONPATH, TESTS

from diffusers_ddpm_ext.errors import ConfigError, RunError
from diffusers_ddpm_ext.models.first_stage import FirstStage
from diffusers_ddpm_ext.training.data import cache_building, cache_folder, latent_cache
from diffusers_ddpm_ext.training.data.augmentation import Augmentation, RandomCrop
from diffusers_ddpm_ext.training.data.conditions import ConditionColumns
from diffusers_ddpm_ext.training.data.image_set import levels_to_pixels
from diffusers_ddpm_ext.training.data.latents import LatentEncoder
from diffusers_ddpm_ext.training.data.posterior import encode_posterior
from diffusers_ddpm_ext.utils.folder_lock import FolderLock


def cache_latents(parent, dtype, data, stage, accelerator, through=False):
    return latent_cache.cache_latents(
        parent, dtype, data, LatentEncoder(stage, 0, concat_through_vae=through), accelerator
    )


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def stage():
    return make_stage()


@pytest.fixture
def encoded(monkeypatch):
    """The pixels of every image that is encoded; blank ones show the shape of latents."""
    calls = []
    original = FirstStage.posterior

    def posterior(self, pixels):
        if pixels.any():
            calls.append(pixels.clone())
        return original(self, pixels)

    monkeypatch.setattr(FirstStage, "posterior", posterior)
    return calls


def only_folder(parent):
    (folder,) = [path for path in parent.iterdir() if path.is_dir()]
    return folder


def assert_same(posterior, expected):
    assert torch.equal(posterior.mean, expected.mean)
    assert torch.equal(posterior.std, expected.std)


def assert_complete(cached, data, stage):
    """Every stored posterior equals the one that training would compute, whichever way the image is mirrored."""
    indices = torch.arange(len(data.train))
    for epoch in range(2):
        epochs = [epoch] * len(indices)
        levels = data.train.load_levels(indices, 7, epochs).values
        expected = encode_posterior(stage, levels_to_pixels(levels, 256))
        assert_same(cached.train.load_posteriors(indices, 7, epochs), expected)
    held_out = torch.arange(HELD_OUT)
    assert_same(cached.validation.load_posteriors(held_out), encode_posterior(stage, data.validation.pixels(held_out)))


# ------------------------------------------------------------------ what it holds


@pytest.mark.parametrize(
    ("augmentation", "symmetries"),
    [
        ({"flips": True}, 2),
        ({"flips": False}, 1),
        ({"flips": False, "vertical_flip": True}, 2),
        ({"vertical_flip": True}, 4),
        ({"rotate90": True}, 8),
    ],
)
def test_stored_posteriors_are_those_that_training_computes(augmentation, symmetries, stage, accelerator, tmp_path):
    data = make_data(**augmentation)
    cached = cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    assert_complete(cached, data, stage)
    expected = COUNT * symmetries
    assert sum(path.stat().st_size for path in only_folder(tmp_path).glob("*.bin")) == expected * RECORD


def test_the_mirrored_latent_is_not_the_latent_of_the_mirrored_image(stage, accelerator, tmp_path):
    store = cache_latents(str(tmp_path), "float32", make_data(), stage, accelerator).train.posteriors
    plain, mirrored = (store.load(torch.tensor([4]), torch.tensor([flipped])) for flipped in (False, True))
    difference = (mirrored.mean - plain.mean.flip(-1)).abs().mean() / plain.mean.abs().mean()
    assert difference > 0.1


def test_random_parts_cannot_be_stored(stage, accelerator, tmp_path):
    data = make_data()
    augmentation = Augmentation(random_crop=RandomCrop((0.5, 1.0)))
    data = replace(data, train=replace(data.train, augmentation=augmentation))
    with pytest.raises(ConfigError, match=r"--cache_latents .* --random_crop before cuts another one each time"):
        cache_latents(str(tmp_path), "float32", data, stage, accelerator)


def test_an_image_is_encoded_once_for_all_later_runs(stage, accelerator, tmp_path, encoded):
    data = make_data()
    cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    assert len(encoded) == 2 * COUNT
    files = {path: path.stat().st_mtime_ns for path in only_folder(tmp_path).iterdir()}
    rescaled = stage.with_scale(0.5, mean=[1.0] * 4, std=[2.0] * 4)
    again = cache_latents(str(tmp_path), "float32", data, rescaled, accelerator)
    assert len(encoded) == 2 * COUNT  # the scale is not part of what is stored
    assert files == {path: path.stat().st_mtime_ns for path in only_folder(tmp_path).iterdir()}
    assert_complete(again, data, stage)


@pytest.mark.parametrize("change", ["stage", "config", "images", "flips", "turns", "dtype", "size"])
def test_anything_else_has_a_cache_of_its_own(change, stage, accelerator, tmp_path):
    data, dtype = make_data(), "float32"
    cache_latents(str(tmp_path), dtype, data, stage, accelerator)
    if change == "stage":
        stage = make_stage(seed=1)
    elif change == "config":
        stage = make_stage(force_upcast=False)
    elif change == "images":
        data = make_data(seed=1)
    elif change == "flips":
        data = make_data(flips=False)
    elif change == "turns":
        data = make_data(vertical_flip=True)
    elif change == "size":
        data = make_data(size=(SIZE, SIZE // 2))
        data = replace(
            data,
            train=replace(data.train, size=(SIZE, SIZE // 2)),
            validation=replace(data.validation, size=(SIZE, SIZE // 2)),
        )
    else:
        dtype = "float16"
    cache_latents(str(tmp_path), dtype, data, stage, accelerator)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_a_deterministic_first_stage_has_means_alone(accelerator, tmp_path):
    torch.manual_seed(0)
    vq = VQModel(
        3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (4, 8), norm_num_groups=2, num_vq_embeddings=8
    )
    stage, data = FirstStage(vq.eval()), make_data()
    cached = cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    posterior = cached.train.load_posteriors([0, 1])
    assert posterior.std is None
    assert torch.equal(posterior.mean, encode_posterior(stage, data.train.pixels([0, 1])).mean)


def test_float16_changes_decoded_pictures_by_a_fraction_of_a_level(stage, accelerator, tmp_path):
    data = make_data()
    full, half = (cache_latents(str(tmp_path), dtype, data, stage, accelerator) for dtype in ("float32", "float16"))
    first, second = (data.train.load_posteriors(range(COUNT - HELD_OUT)) for data in (full, half))
    assert second.mean.dtype == torch.float32
    with torch.no_grad():
        pictures = [stage.decode(stage.normalize(posterior.mean)) for posterior in (first, second)]
    assert 0 < (pictures[0] - pictures[1]).abs().max() * 127.5 < 0.12


def test_concatenated_pictures_have_a_cache_of_their_own(stage, accelerator, tmp_path):
    data = make_data()
    concat = make_data(seed=5).train.images
    columns = ConditionColumns(None, concat, None, "")
    sets = [replace(images, columns=columns) for images in (data.train, data.validation)]
    data = replace(data, train=sets[0], validation=sets[1])
    cached = cache_latents(str(tmp_path), "float32", data, stage, accelerator, through="mode")
    for epoch in range(3):
        pictures = data.train.conditions(range(COUNT - HELD_OUT), 3, [epoch] * (COUNT - HELD_OUT)).concat_inputs
        stored = cached.train.conditions(range(COUNT - HELD_OUT), 3, [epoch] * (COUNT - HELD_OUT)).concat_inputs
        assert torch.equal(stored, encode_posterior(stage, pictures).mean)
    pictures = data.validation.conditions([1]).concat_inputs
    assert torch.equal(cached.validation.conditions([1]).concat_inputs, encode_posterior(stage, pictures).mean)
    without = cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    assert without.train.concat_latents is None
    assert torch.equal(without.validation.conditions([1]).concat_inputs, pictures)


def test_a_data_worker_maps_the_files_itself(stage, accelerator, tmp_path):
    """A map that is pickled would be a copy of the whole cache."""
    store = cache_latents(str(tmp_path), "float32", make_data(), stage, accelerator).train.posteriors
    request = (torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.bool))
    expected = store.load(*request)
    content = pickle.dumps(store)
    assert len(content) < 5_000
    assert_same(pickle.loads(content).load(*request), expected)
    with pytest.raises(ValueError, match="not have images that are flipped or turned so"):
        replace(store, symmetries=(0,)).load(torch.tensor([0]), torch.tensor([True]))


# ------------------------------------------------------------------ interrupted and damaged


def interrupt_after(monkeypatch, count):
    """Stop a build after so many images, as a signal would."""
    original, calls = FirstStage.posterior, []

    def posterior(self, pixels):
        calls.append(1)
        if len(calls) > count + 1:  # one is blank
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(FirstStage, "posterior", posterior)


@pytest.mark.parametrize("torn", [0, 1, 20, 400])
def test_a_build_goes_on_where_it_was_interrupted(torn, stage, accelerator, tmp_path, monkeypatch, encoded):
    """With a record that was cut off anywhere: at its number, in its checksum, in its values."""
    data = make_data()
    with monkeypatch.context() as context:
        interrupt_after(context, 9)
        with pytest.raises(KeyboardInterrupt):
            cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    folder = only_folder(tmp_path)
    assert not (folder / "manifest.json").exists()
    (file,) = folder.glob("*.bin")
    with file.open("ab") as stream:
        stream.write(file.read_bytes()[:torn])
    encoded.clear()
    cached = cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    assert len(encoded) == 2 * COUNT - 9
    assert_complete(cached, data, stage)
    assert sum(path.stat().st_size for path in folder.glob("*.bin")) == 2 * COUNT * RECORD


def test_a_build_that_lacks_only_its_manifest_encodes_nothing(stage, accelerator, tmp_path, encoded):
    data = make_data()
    cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    (only_folder(tmp_path) / "manifest.json").unlink()
    (only_folder(tmp_path) / "records-0123456789abcdef.bin").touch()  # of a process that was killed before its first
    encoded.clear()
    assert_complete(cache_latents(str(tmp_path), "float32", data, stage, accelerator), data, stage)
    assert len([call for call in encoded if call.shape[0] == 1]) == len(encoded)
    names = {path.name for path in only_folder(tmp_path).iterdir()}
    assert "records-0123456789abcdef.bin" not in names
    assert len(names) == 2


def flip_bit(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda folder, file: flip_bit(file, 3 * RECORD + 300), 1),
        (lambda folder, file: flip_bit(file, 3 * RECORD), 1),  # its number: another image's latent
        (lambda folder, file: flip_bit(file, 3 * RECORD + 9), 1),
        (lambda folder, file: os.truncate(file, 5 * RECORD + 7), 2 * COUNT - 5),
        (lambda folder, file: file.write_bytes(file.read_bytes() + b"x"), 0),
        (lambda folder, file: file.write_bytes(file.read_bytes()[RECORD:] + file.read_bytes()[-RECORD:]), 1),
        (lambda folder, file: file.write_bytes(bytes(file.stat().st_size)), 2 * COUNT),
        (lambda folder, file: file.unlink(), 2 * COUNT),
        (lambda folder, file: (file.unlink(), file.mkdir()), 2 * COUNT),
        (lambda folder, file: (file.unlink(), os.mkfifo(file)), 2 * COUNT),
        (lambda folder, file: (folder / "manifest.json").write_text("{"), 0),
        (lambda folder, file: (folder / "manifest.json").write_text("[]"), 0),
        (lambda folder, file: (folder / "manifest.json").write_text('{"key": 1, "files": {"../x": {"size": 1}}}'), 0),
        (lambda folder, file: flip_bit(folder / "manifest.json", -10), 0),
    ],
)
def test_damage_is_found_and_only_damaged_latents_are_encoded_again(
    damage, lost, stage, accelerator, tmp_path, encoded, capsys
):
    data = make_data()
    cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    folder = only_folder(tmp_path)
    (file,) = folder.glob("*.bin")
    damage(folder, file)
    encoded.clear()
    capsys.readouterr()
    cached = cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    assert len(encoded) == lost
    message = capsys.readouterr().err
    assert f"{lost} latents of it are encoded again" in message
    assert len(message.strip().splitlines()) == 1
    assert_complete(cached, data, stage)
    encoded.clear()
    cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    assert encoded == []
    assert capsys.readouterr().err == ""


def test_a_record_of_another_cache_does_not_count(stage, accelerator, tmp_path, encoded):
    """Its checksum is right, but for the other key."""
    data = make_data()
    cache_latents(str(tmp_path / "a"), "float32", data, stage, accelerator)
    cache_latents(str(tmp_path / "b"), "float32", data, make_stage(seed=1), accelerator)
    own, other = only_folder(tmp_path / "a"), only_folder(tmp_path / "b")
    (file,), (foreign,) = own.glob("*.bin"), other.glob("*.bin")
    file.write_bytes(foreign.read_bytes())
    encoded.clear()
    assert_complete(cache_latents(str(tmp_path / "a"), "float32", data, stage, accelerator), data, stage)
    assert len(encoded) >= 2 * COUNT


def test_damage_during_a_run_ends_it(stage, accelerator, tmp_path):
    cached = cache_latents(str(tmp_path), "float32", make_data(), stage, accelerator)
    (file,) = only_folder(tmp_path).glob("*.bin")
    with file.open("r+b") as stream:  # in place: the file is mapped
        stream.seek(RECORD * 4 + 300)
        stream.write(b"damage")
    store = cached.train.posteriors
    assert store.load(torch.tensor([1, 3]), torch.tensor([False, False])).mean.isfinite().all()
    with pytest.raises(RunError, match=r"is damaged: resume from the last checkpoint"):
        store.load(torch.tensor([1, 2]), torch.tensor([False, False]))


def test_a_run_keeps_what_another_run_replaces(stage, accelerator, tmp_path):
    """A repair deletes the damaged file; a run that reads it has it mapped. A new data worker says what is missing."""
    cached = cache_latents(str(tmp_path), "float32", make_data(), stage, accelerator)
    request = (torch.arange(COUNT - 1), torch.zeros(COUNT - 1, dtype=torch.bool))
    expected = cached.train.posteriors.load(*request)
    (file,) = only_folder(tmp_path).glob("*.bin")
    flip_bit(file, (2 * COUNT - 1) * RECORD + 100)
    cache_latents(str(tmp_path), "float32", make_data(), stage, accelerator)
    assert not file.exists()
    assert_same(cached.train.posteriors.load(*request), expected)
    with pytest.raises(RunError, match=r"cannot be read .* resume from the last checkpoint"):
        pickle.loads(pickle.dumps(cached.train.posteriors)).load(*request)


# ------------------------------------------------------------------ several runs, several processes


def test_a_second_run_waits_for_the_first_and_encodes_nothing(
    stage, accelerator, tmp_path, encoded, monkeypatch, capsys
):
    data = make_data()
    cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    folder = only_folder(tmp_path)
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    monkeypatch.setattr(cache_folder, "SECONDS_BETWEEN_ATTEMPTS", 0.05)
    code = (
        "import sys, time, pathlib\n"
        "from diffusers_ddpm_ext.utils.folder_lock import FolderLock\n"
        "with FolderLock(pathlib.Path(sys.argv[1]), sys.argv[2]):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), folder.name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "locked\n"

        def finish():
            time.sleep(0.3)
            (tmp_path / "manifest.json").rename(folder / "manifest.json")
            holder.communicate("\n")

        finisher = threading.Thread(target=finish)
        finisher.start()
        encoded.clear()
        cached = cache_latents(str(tmp_path), "float32", data, stage, accelerator)
        finisher.join()
    finally:
        holder.kill()
        holder.wait()
    assert encoded == []
    assert capsys.readouterr().out.count("Another run is encoding the same images into") == 1
    assert_complete(cached, data, stage)


def test_a_killed_run_leaves_no_lock(stage, accelerator, tmp_path):
    data = make_data()
    cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    folder = only_folder(tmp_path)
    code = (
        "import sys, time, pathlib\n"
        "from diffusers_ddpm_ext.utils.folder_lock import FolderLock\n"
        "FolderLock(pathlib.Path(sys.argv[1]), sys.argv[2]).acquire()\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), folder.name], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        holder.send_signal(signal.SIGKILL)
    (folder / "manifest.json").unlink()
    assert_complete(cache_latents(str(tmp_path), "float32", data, stage, accelerator), data, stage)


def test_a_complete_cache_may_be_read_only(stage, accelerator, tmp_path, monkeypatch):
    """It is opened without a lock and without a file being written."""
    data = make_data()
    cache_latents(str(tmp_path), "float32", data, stage, accelerator)

    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(FolderLock, "acquire", refuse)
    monkeypatch.setattr(cache_building.RecordWriter, "append", refuse)
    assert_complete(cache_latents(str(tmp_path), "float32", data, stage, accelerator), data, stage)


def test_records_are_spread_over_several_files(stage, accelerator, tmp_path, monkeypatch):
    from diffusers_ddpm_ext.training.data import posterior_files

    monkeypatch.setattr(posterior_files, "MAX_FILE_BYTES", 3 * RECORD)
    data = make_data()
    cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    files = list(only_folder(tmp_path).glob("*.bin"))
    assert len(files) == -(-2 * COUNT // 3)
    manifest = json.loads((only_folder(tmp_path) / "manifest.json").read_text())
    assert {file.name for file in files} == set(manifest["files"])
    assert_complete(cache_latents(str(tmp_path), "float32", data, stage, accelerator), data, stage)


def build(parent, processes, fail_at=0):
    """Build the cache by processes that `torchrun` starts; a process may end itself after some images."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(TESTS / "helpers" / "cache_cases.py"), str(parent), str(fail_at)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode == 0) == (fail_at == 0), done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_build_the_cache_of_one(stage, accelerator, tmp_path, encoded):
    """Each encodes half of it on two threads; then one process opens it, and finds the bits of one thread."""
    data = make_data()
    output = build(tmp_path, 2)
    assert sorted(output.split()) == sorted([f"encoded={COUNT}"] * 2)
    assert len(list(only_folder(tmp_path).glob("*.bin"))) == 2
    assert_complete(cache_latents(str(tmp_path), "float32", data, stage, accelerator), data, stage)


@pytest.mark.slow
def test_three_processes_complete_what_two_had_begun(stage, accelerator, tmp_path, encoded):
    build(tmp_path, 2, fail_at=3)
    records = sum(path.stat().st_size // RECORD for path in only_folder(tmp_path).glob("*.bin"))
    assert 3 <= records < 2 * COUNT
    output = build(tmp_path, 3)
    assert sum(int(word.removeprefix("encoded=")) for word in output.split()) == 2 * COUNT - records
    data = make_data()
    cached = cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    encoded.clear()
    cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    assert encoded == []
    assert_complete(cached, data, stage)


# ------------------------------------------------------------------ refusals


def test_random_crops_are_refused(stage, accelerator, tmp_path):
    data = make_data(size=(SIZE, SIZE + 4))
    with pytest.raises(ConfigError, match=r"stores one crop of each image, and images of 8x12 .* add --center_crop"):
        cache_latents(str(tmp_path / "cache"), "float32", data, stage, accelerator)
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_refused(stage, accelerator, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--cache_latents .*file cannot be written: .*; name another folder"):
        cache_latents(str(tmp_path / "file"), "float32", make_data(), stage, accelerator)


def test_a_disk_without_space_is_refused_before_anything_is_encoded(
    stage, accelerator, tmp_path, monkeypatch, encoded
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"the latents take 6,336 bytes, and 1,000 are free: .* float16"):
        cache_latents(str(tmp_path), "float32", make_data(), stage, accelerator)
    assert encoded == []


def test_what_a_full_disk_has_kept_is_not_encoded_again(stage, accelerator, tmp_path, monkeypatch, encoded):
    data = make_data()
    append = cache_building.RecordWriter.append

    def fill(self, record):
        if len(self.locations) == 5:
            self._file.write(record.tobytes()[:100])
            raise OSError(28, "No space left on device")
        append(self, record)

    with monkeypatch.context() as context:
        context.setattr(cache_building.RecordWriter, "append", fill)
        with pytest.raises(RunError, match=r"--cache_latents .* No space left on device; .* what is encoded stays"):
            cache_latents(str(tmp_path), "float32", data, stage, accelerator)
    encoded.clear()
    assert_complete(cache_latents(str(tmp_path), "float32", data, stage, accelerator), data, stage)


@pytest.mark.parametrize(
    ("factor", "dtype", "message"),
    [
        (1e6, "float16", r"--cache_latents_dtype float16: the latents of \d.png reach .* use float32"),
        (float("nan"), "float32", r"--vae: it encodes \d.png as values that are not finite"),
        (float("nan"), "float16", r"--vae: it encodes \d.png as values that are not finite"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(factor, dtype, message, stage, accelerator, tmp_path):
    with torch.no_grad():
        stage.autoencoder.quant_conv.weight.mul_(factor)
    with pytest.raises(ConfigError, match=message):
        cache_latents(str(tmp_path), dtype, make_data(), stage, accelerator)
    assert not list(tmp_path.glob("*/manifest.json"))


def test_no_layout_accepts_a_posterior_of_another_image():
    """Every byte of a record counts."""
    from diffusers_ddpm_ext.training.data.posterior import Posterior
    from diffusers_ddpm_ext.training.data.posterior_files import RecordFormat

    layout = RecordFormat("key", 2, (1, 2, 2), "float32")
    record = layout.encode(5, Posterior(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0)))
    assert layout.is_valid(record[0])
    content = record.tobytes()
    for offset in [*range(12), *range(16, len(content))]:
        changed = bytearray(content)
        changed[offset] ^= 4
        assert not layout.is_valid(np.frombuffer(bytes(changed), layout.record)[0])
    assert not RecordFormat("another", 2, (1, 2, 2), "float32").is_valid(record[0])
