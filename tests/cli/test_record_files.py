"""Damaged and forged records of our own: each is one sentence, or drawn again; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli

DAMAGE = {
    "empty": b"", "null": b"null", "true": b"true", "list": b"[1, 2]", "number": b"1e400", "nan": b'{"before": NaN}',
    "no key": b"{}", "wrong type": b'{"before": 3}', "deep": b'{"before": ' + b"[" * 100_000,
    "digits": b'{"before": ' + b"9" * 4000 + b"}", "latin": b'{"before": "\xe9"}', "nul": b"\0" * 40,
    "surrogate": b'{"before": "\\udc80"}', "twice": b'{"before": {}, "before": {}}', "torn": b'{"before": {"a": 1',
    "other chain": b'{"before": {"num_train_timesteps": 7}}', "float": b'{"before": {"num_train_timesteps": 20.0}}',
}  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "run"
    DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20)).save_pretrained(folder)
    assert cli.main(["fit-variance", str(folder), "--draws", "1", "--max_steps", "3", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def run(fitted, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fitted, "run")
    return Path("run")


def refused(capsys, *line: str) -> str:
    """The error line of a command that fails with status 2."""
    assert cli.main(list(line)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def put(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(DAMAGE[kind])


@pytest.mark.parametrize("kind", [*DAMAGE, "folder", "pipe", "zeros"])
def test_the_record_of_a_fit(run, kind, capsys):
    before = (run / "scheduler/scheduler_config.json").read_bytes()
    put(run / "variance_fit.json", kind)
    for more in ([], ["--undo"]):
        assert "variance_fit.json" in refused(capsys, "fit-variance", "run", *more)
        assert (run / "scheduler/scheduler_config.json").read_bytes() == before


@pytest.mark.parametrize("wrong", [{"sample_max_value": {}}, {"beta_end": "x"}, {"prediction_type": 3}])
def test_settings_that_no_scheduler_takes_are_not_restored(run, wrong, capsys):
    before = (run / "scheduler/scheduler_config.json").read_bytes()
    record = json.loads((run / "variance_fit.json").read_text())
    (run / "variance_fit.json").write_text(json.dumps(record | {"before": record["before"] | wrong}))
    assert next(iter(wrong)) in refused(capsys, "fit-variance", "run", "--undo")
    assert (run / "scheduler/scheduler_config.json").read_bytes() == before


def test_undo_restores(run, capsys):
    config = json.loads((run / "scheduler/scheduler_config.json").read_text())
    assert config["optimal_timesteps"]
    assert cli.main(["fit-variance", "run", "--undo"]) == 0
    assert not json.loads((run / "scheduler/scheduler_config.json").read_text()).get("optimal_timesteps")
    assert "has no variance_fit.json" in refused(capsys, "fit-variance", "run", "--undo")


def line(out: str, *more: str) -> list[str]:
    return ["sample", "run", "--num_images", "3", "--num_inference_steps", "2", "--device", "cpu", "--out", out, *more]


@pytest.mark.parametrize("kind", ["empty", "null", "list", "nan", "deep", "digits", "latin", "torn", "pipe", "zeros"])
def test_the_record_of_a_sampling(run, kind, capsys):
    assert cli.main(line("each")) == 0
    images = sorted(Path("each").glob("*.png"))
    put(Path("each/samples.json"), kind)
    assert "samples.json" in refused(capsys, *line("each"))
    assert sorted(Path("each").glob("*.png")) == images


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"PK\3\4" + bytes(50)),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: np.savez(path, image=np.zeros((8, 9, 1), np.float32)),
        lambda path: np.savez(path, image=np.full((8, 8, 1), np.nan, np.float32)),
        lambda path: np.savez(path, image=np.array([{}], dtype=object)),
        lambda path: np.savez(path, other=np.zeros((8, 8, 1), np.float32)),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
)  # fmt: skip
def test_a_damaged_part_is_drawn_again(run, damage, monkeypatch, capsys):
    from diffusers_ddpm_ext.cli.sample_output import OneFile

    class Kill(BaseException):
        pass

    def finish(self, count):
        raise Kill

    assert cli.main(line("whole.npy")) == 0
    with monkeypatch.context() as context:
        context.setattr(OneFile, "finish", finish)
        with pytest.raises(Kill):
            cli.main(line("a.npy"))
    damage(Path(".a.npy.part/000001.npz"))
    capsys.readouterr()
    assert cli.main(line("a.npy")) == 0
    assert "2 of 3 images exist already" in capsys.readouterr().err
    assert np.allclose(np.load("a.npy"), np.load("whole.npy"), atol=1e-5)
    assert not Path(".a.npy.part").exists()


@pytest.mark.parametrize("content", [b"precious", b'{"a": 1}', b"[]", b"\xff", b"[" * 100_000])
def test_a_foreign_file_is_not_replaced_by_a_result(run, content, capsys):
    Path("notes.json").write_bytes(content)
    flags = ["--num_timesteps", "2", "--max_images", "2", "--device", "cpu", "--json", "notes.json"]
    assert "is not a result of this command" in refused(capsys, "evaluate", "run", *flags)
    assert Path("notes.json").read_bytes() == content
    Path("notes.json").write_bytes(b"")  # as mktemp leaves it
    for _ in range(2):
        assert cli.main(["evaluate", "run", *flags]) == 0
    assert "bits_per_dim" in json.loads(Path("notes.json").read_text())


def test_outputs_that_are_inputs(run, capsys):
    Path("photos").mkdir()
    data = ["--train_data_dir", "photos", "--validation_data_dir", "photos"]
    assert "is what --train_data_dir reads" in refused(capsys, "evaluate", "run", *data, "--out", "photos")
    np.save("c.npy", np.zeros((1, 1, 8, 8)))
    assert "is what --concat_inputs reads" in refused(capsys, *line("c.npy", "--concat_inputs", "./c.npy"))


@pytest.mark.parametrize(
    ("out", "answer"),
    [
        ("missing/a.npy", "in a folder that does not exist"),
        ("a" * 300, "bytes"),
        ("a" * 240 + ".npy", "bytes"),
        ("pipe.npy", "a pipe or a device"),
        ("run/model_index.json/a.npy", "in a folder that does not exist"),
        ("loop.npy", "Too many levels"),
        ("a\0b", "NUL"),
        ("a.bmp", "must end in one of"),
        ("run", "is not empty"),
    ],
)
def test_outputs_that_cannot_be_written(run, out, answer, capsys):
    os.mkfifo("pipe.npy")
    Path("loop.npy").symlink_to("loop.npy")
    before = sorted(os.listdir())
    assert answer in refused(capsys, *line(out))
    assert sorted(os.listdir()) == before
