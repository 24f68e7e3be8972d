"""Images, histograms and the configuration of a run in its trackers."""

from __future__ import annotations

import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.accelerate_state import fresh_accelerate  # noqa: F401
from helpers.runs import rows, tiny_run

from diffusers_ddpm_ext.training import trainer

THEIR_WARNINGS = pytest.mark.filterwarnings("ignore")


def test_tensorboard(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_run(tmp_path / "run", report_to="tensorboard", save_images_steps=3, learn_logvar=True)
    folder = trainer.train(config)
    readers = []
    for place in {path.parent for path in folder.rglob("events.out*")}:
        events = EventAccumulator(str(place), size_guidance={"images": 0, "histograms": 0})
        events.Reload()
        readers += [events] if events.Tags()["images"] else []
    (events,) = readers
    tags = events.Tags()
    names = ("inputs", "diffusion_row", "samples", "denoise_row", "loss", "logvar")
    assert set(tags["images"]) == {f"pictures/{name}" for name in names}
    assert [event.step for event in events.Images("pictures/samples")] == [3, 6]
    last = events.Images("pictures/samples")[-1]
    with Image.open(folder / "samples" / "samples-6.png") as image:
        assert (last.width, last.height) == image.size
    histograms = events.Histograms("train/loss_simple of steps")
    losses = [row["train/loss_simple"] for row in rows(folder) if "train/loss_simple" in row]
    assert sum(event.histogram_value.num for event in histograms) == len(losses) == 6
    assert np.isclose(sum(event.histogram_value.sum for event in histograms), sum(losses), rtol=1e-5)
    assert list(folder.rglob("hparams.yml"))


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = trainer.train(tiny_run(tmp_path / "run", report_to="wandb", save_images_steps=3))
    assert (folder / "finished.json").is_file()
    media = {path.name.split("_")[0] for path in tmp_path.rglob("media/images/pictures/*.png")}
    assert {"samples", "inputs", "loss"} <= media


def run_in(tmp_path, monkeypatch, tracker: str):
    """A run with four kinds of images at steps 0, 3 and 6, whose tracker writes below the working directory."""
    monkeypatch.chdir(tmp_path)
    return trainer.train(tiny_run(tmp_path / "run", report_to=tracker, save_images_steps=3, learn_logvar=True))


@THEIR_WARNINGS
def test_mlflow(tmp_path, monkeypatch, capfd):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_in(tmp_path, monkeypatch, "mlflow")
    assert "--report_to" not in capfd.readouterr().err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'diffusers-ddpm-ext'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["learning_rate"] == "0.002"
    files = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")]
    logged = {(name.split("+")[0], name.split("+")[2]) for name in files}
    assert {("pictures~samples", "3"), ("pictures~samples", "6"), ("pictures~inputs", "0")} <= logged
    paths = [file.path for file in client.list_artifacts(run.info.run_id, "histograms/train")]
    tables = [mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{path}") for path in paths]
    assert sum(sum(table["counts"]) for table in tables) == 6
    assert all(len(table["edges"]) == len(table["counts"]) + 1 for table in tables)


@THEIR_WARNINGS
def test_two_trackers(tmp_path, monkeypatch, capfd):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    folder = run_in(tmp_path, monkeypatch, "tensorboard, mlflow")
    assert "--report_to" not in capfd.readouterr().err
    assert list(folder.rglob("events.out*"))
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_experiments()


@THEIR_WARNINGS
def test_trackio(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    run_in(tmp_path, monkeypatch, "trackio")
    assert "--report_to" not in capfd.readouterr().err
    steps = {path.parent.name for path in (tmp_path / "trackio" / "media").rglob("*.png")}
    assert steps == {"0", "3", "6"}
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as kept:
        content = " ".join(str(row) for (table,) in kept.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                        for row in kept.execute(f"SELECT * FROM {table}"))  # fmt: skip
    for text in ("train/loss_simple of steps", "pictures/samples", "learning_rate"):
        assert text in content


@THEIR_WARNINGS
def test_comet_offline(tmp_path, monkeypatch, capfd):
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    run_in(tmp_path, monkeypatch, "comet_ml")
    assert "--report_to" not in capfd.readouterr().err
    (archive,) = (tmp_path / "comet").glob("*.zip")
    content = zipfile.ZipFile(archive).read("messages.json").decode()
    for text in ("train/loss_simple of steps", "pictures/samples", "learning_rate"):
        assert text in content


def test_a_tracker_without_images_is_skipped(tmp_path):
    from diffusers_ddpm_ext.training.tracking.trackers import log_images_and_losses

    class Plain:
        name = "plain"

    log_images_and_losses([Plain()], {"missing": tmp_path / "missing.png"}, [1.0], 1)
