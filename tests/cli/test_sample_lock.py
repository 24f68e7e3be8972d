"""Two samplings into one place: the second is refused by name, and no place ever holds a mix of two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.tiny import tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.utils.folder_lock import LOCK, FolderLock

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
HOLD = """
import sys
from pathlib import Path
from diffusers_ddpm_ext.utils.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), *sys.argv[2:]).acquire()
print("held", flush=True)
sys.stdin.readline()
"""
IMAGES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipe")
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(50)).save_pretrained(place)
    return place


def arguments(folder: Path, out: str, seed: int = 0, *more: str) -> list[str]:
    line = ["sample", str(folder), "--out", out, "--seed", str(seed), "--device", "cpu", "--num_inference_steps", "4"]
    return [*line, "--num_images", str(IMAGES), "--batch_size", "2", *more]


@contextmanager
def holder(*place: str):
    """Another process that holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *place], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("out", "held", "more"),
    [
        ("each", ("each",), ()),
        ("link", ("each",), ()),  # a link to the same folder
        ("a.npy", (".", "a.npy"), ()),
        ("each/../a.npz", (".", "a.npz"), ()),
        ("b.png", (".", "apart"), ("--individual", "apart")),
        ("b.gif", (".", "b.gif"), ()),
    ],
)
def test_the_second_is_refused_by_name(folder, tmp_path, monkeypatch, capsys, out, held, more):
    monkeypatch.chdir(tmp_path)
    Path("each").mkdir()
    Path("link").symlink_to("each")
    before = sorted(tmp_path.iterdir())
    with holder(*held) as process:
        assert cli.main(arguments(folder, out, 0, *more)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --{'individual' if more else 'out'}: another run uses ")
        assert f"(process {process.pid}): wait for it, end it, or name another" in error
    for name in (LOCK, *(f".{name}.lock" for name in ("a.npy", "a.npz", "apart", "b.gif"))):
        for place in (tmp_path, tmp_path / "each"):
            (place / name).unlink(missing_ok=True)  # the killed holder's
    assert sorted(tmp_path.iterdir()) == before
    assert cli.main(arguments(folder, out, 0, *more)) == 0


def test_a_sampling_and_a_training_keep_out_of_each_other(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with FolderLock(tmp_path):  # as a run that has just begun
        assert cli.main(arguments(folder, str(tmp_path))) == 2
        assert "another run uses" in capsys.readouterr().err
    Path("each").mkdir()
    with holder("each"):
        assert cli.main(["train", "--output_dir", "each", "--max_train_steps", "1"]) == 2
        assert "another run uses each" in capsys.readouterr().err


def test_a_dead_sampling_holds_no_lock(folder, tmp_path, monkeypatch, capsys):
    """What kill -9 leaves of a sampling, before its first image and after it, is taken over."""
    monkeypatch.chdir(tmp_path)
    Path("each").mkdir()
    Path("each", LOCK).write_text("4194304 elsewhere\n")
    Path("each", ".samples.json.77.part").write_text("{")
    Path(".a.npy.lock").write_text(f"{os.getpid()} here\n")
    assert cli.main(arguments(folder, "each")) == 0
    assert cli.main(arguments(folder, "a.npy")) == 0
    Path("each/00003.png").unlink()
    Path("each", ".00003.png.77.part").write_bytes(b"torn")
    Path("each", LOCK).write_text("")
    assert cli.main(arguments(folder, "each")) == 0
    assert "5 of 6 images exist already" in capsys.readouterr().err
    assert sorted(os.listdir("each")) == [*(f"{index:05d}.png" for index in range(IMAGES)), "samples.json"]
    assert sorted(os.listdir()) == ["a.npy", "each"]


def test_what_fails_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    """An error that only the first forward pass finds."""

    def fail(*_, **__):
        raise ValueError("non-finite samples")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DDPMExtPipeline, "__call__", fail)
    for out in ("each", "a.npy", "a.gif"):
        assert cli.main(arguments(folder, out)) == 2
        assert "non-finite samples" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_images_beside_the_grid_survive_a_kill(folder, tmp_path, monkeypatch, capsys):
    """Killed while it writes the individual files: the same command finishes, from the images it had drawn."""
    from diffusers_ddpm_ext.cli.sample_files import SampleFormat

    class Kill(BaseException):
        pass

    def save(form, path, image):
        if path.name == "00003.png":
            raise Kill
        return before(form, path, image)

    monkeypatch.chdir(tmp_path)
    before = SampleFormat.save
    with monkeypatch.context() as context:
        context.setattr(SampleFormat, "save", save)
        with pytest.raises(Kill):
            cli.main(arguments(folder, "a.npy", 0, "--individual", "apart"))
    assert cli.main(arguments(folder, "a.npy", 0, "--individual", "apart")) == 0
    assert "6 of 6 images exist already" in capsys.readouterr().err
    assert len(os.listdir("apart")) == IMAGES
    assert sorted(os.listdir()) == ["a.npy", "apart"]


def test_a_folder_that_sampling_did_not_write_is_not_deleted(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in (".a.npy.part", ".apart.part"):
        Path(name).mkdir()
        Path(name, "thesis.tex").write_text("mine")
        assert cli.main(arguments(folder, "a.npy", 0, "--individual", "apart")) == 2
        assert "thesis.tex, which ddpm-ext sample did not write" in capsys.readouterr().err
        Path(name).rename(f"kept{name}")
    assert len(list(tmp_path.glob("kept*/thesis.tex"))) == 2


def drawn(out: Path) -> np.ndarray:
    """Images of an output, as integers of 8 bits."""
    if out.is_dir():
        return np.stack([np.asarray(Image.open(out / f"{index:05d}.png")) for index in range(IMAGES)])
    return (np.load(out) * 255).round().astype(np.uint8)


def check_pairs(folder: Path, place: Path, pairs: int, run) -> None:
    """Pairs of samplings with different seeds, started together: every result is of one seed, whole."""
    expected = []
    for seed in (0, 1):
        assert cli.main(arguments(folder, str(place / f"seed{seed}.npy"), seed)) == 0
        expected.append(drawn(place / f"seed{seed}.npy"))
    refused = 0
    for pair in range(pairs):
        out = place / (f"pair{pair}" if pair % 2 else f"pair{pair}.npy")
        statuses = run([arguments(folder, str(out), seed) for seed in (0, 1)])
        assert 0 in statuses
        assert set(statuses) <= {0, 2}
        refused += 2 in statuses
        images = drawn(out)
        # one level: where two batches round a value to either side
        assert any(np.abs(images.astype(int) - each).max() <= 1 for each in expected), f"pair {pair} is a mix"
        left = [path.name for path in place.iterdir() if path.name.startswith(".")]
        assert left == [], f"{left} was left behind"
    assert refused > pairs // 4


def run_forked(lines: list[list[str]]) -> list[int]:
    """Exit statuses of commands in two children of this process, which have torch imported already."""
    children = []
    for line in lines:
        child = os.fork()
        if child == 0:
            try:
                os.close(2)
                os.open(os.devnull, os.O_WRONLY)
                os._exit(cli.main(line))
            finally:
                os._exit(9)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_pairs_started_together(folder, tmp_path):
    check_pairs(folder, tmp_path, 4, run_forked)


def run_processes(lines: list[list[str]]) -> list[int]:
    command = [sys.executable, "-m", "diffusers_ddpm_ext"]
    started = [
        subprocess.Popen([*command, *line], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for line in lines
    ]
    return [process.wait() for process in started]


@pytest.mark.slow
def test_twenty_pairs_of_processes(folder, tmp_path):
    check_pairs(folder, tmp_path, 20, run_processes)


@pytest.mark.slow
def test_killed_samplings_resume(folder, tmp_path):
    """kill -9 at ten moments; the last command finishes, and nothing of the killed ones is left."""
    line = [sys.executable, "-m", "diffusers_ddpm_ext", *arguments(folder, "each", 0, "--batch_size", "1")]
    for moment in range(10):
        process = subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        time.sleep(2.5 + 0.2 * moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "each"))[-1] == "samples.json"
    assert len(os.listdir(tmp_path / "each")) == IMAGES + 1
