"""Conditions of `ddpm-ext sample`: names of classes, arrays by row, and what does not fit, before torch loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import UNet2DConditionModel, UNet2DModel
from helpers.paths import ROOT
from helpers.tiny import EXACT, tiny_unet
from PIL import Image

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, cli
from diffusers_ddpm_ext.plotting.sheets import CAPTION_HEIGHT

NAMES = {0: "Bread", 1: "Dairy product", 2: "tench, Tinca tinca", 4: "7"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    unet = UNet2DModel(**tiny_unet(1).config | {"num_class_embeds": 8})
    DDPMExtPipeline(unet, DDPMExtScheduler(20), "adm", null_class_label=6, id2label=NAMES).save_pretrained(
        root / "food"
    )
    DDPMExtPipeline(unet, DDPMExtScheduler(20), "adm").save_pretrained(root / "numbers")
    concat = tiny_unet(channels=5, out_channels=3)
    DDPMExtPipeline(concat, DDPMExtScheduler(20), "concat").save_pretrained(root / "concat")
    context = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=6, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMExtPipeline(context, DDPMExtScheduler(20), "crossattn").save_pretrained(root / "context")
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler(20)).save_pretrained(root / "plain")
    return root


@pytest.fixture
def sample(folders, tmp_path, monkeypatch, capsys):
    """Exit status and error line of the command; nothing is left after an error."""
    monkeypatch.chdir(tmp_path)

    def command(name: str, *flags: str) -> tuple[int, str]:
        line = [
            "sample",
            str(folders / name),
            "--device",
            "cpu",
            *EXACT,
            "--num_inference_steps",
            "2",
            "--num_images",
            "3",
        ]
        before = sorted(os.listdir())
        status = cli.main([*line, "--out", "each", *flags])
        error = capsys.readouterr().err
        if status:
            assert status == 2
            assert error.count("error: ") == 1
            assert sorted(os.listdir()) == before
        return status, error

    return command


@pytest.mark.parametrize(
    ("typed", "labels"),
    [
        (["Bread"], [0]),
        (["Dairy product", "3"], [1, 3]),
        (["Tinca tinca"], [2]),
        (["tench, Tinca tinca", "Bread"], [2, 0]),
        (["7"], [4]),  # a name of digits
        (["Bread,3"], [0, 3]),
        (["1,2", "3 5"], [1, 2, 3, 5]),
        (["Bread", "Bread", "6"], [0, 0, 6]),  # the null class may be asked for
    ],
)
def test_labels_are_names_or_numbers(sample, typed, labels):
    assert sample("food", "--class_labels", *typed)[0] == 0
    record = json.loads(Path("each/samples.json").read_text())
    assert record["class_labels"] == labels
    assert record["class_names"] == [NAMES.get(label, str(label)) for label in labels]


def test_a_name_draws_what_its_number_draws(sample):
    assert sample("food", "--class_labels", "Dairy product", "--out", "name.npy")[0] == 0
    assert sample("food", "--class_labels", "1", "--out", "number.npy")[0] == 0
    assert np.array_equal(np.load("name.npy"), np.load("number.npy"))


@pytest.mark.parametrize(
    ("name", "typed", "answer"),
    [
        ("food", ["bred"], 'did you mean "Bread"?'),
        ("food", ["Dairy", "product"], 'did you mean "Dairy product"?'),
        ("food", ["Bread,xyzzy"], 'the classes are "Bread"'),
        ("food", ["8"], "the classes of"),
        ("food", ["-1"], "-1"),
        ("food", ["1.0"], "1.0"),
        ("food", ["9" * 40], "is not a class"),
        ("food", ["\x1b[2J"], "is not a class"),
        ("numbers", ["Bread"], "have no names"),
        ("plain", ["0"], "takes none"),
    ],
)
def test_wrong_labels(sample, name, typed, answer):
    status, error = sample(name, "--class_labels", *typed)
    assert status == 2
    assert answer in error


def test_names_are_below_the_images_of_a_grid(sample):
    assert sample("food", "--class_labels", "Bread", "--out", "named.png")[0] == 0
    assert sample("numbers", "--class_labels", "0", "--out", "plain.png")[0] == 0
    with Image.open("named.png") as named, Image.open("plain.png") as plain:
        rows = (plain.height + 4) // 100
        assert named.height == plain.height + rows * CAPTION_HEIGHT
        strip = np.asarray(named)[96 : 96 + CAPTION_HEIGHT, :96]
        assert (strip < 128).any(), "no text"


def rows(*shape: int, **changes: float) -> np.ndarray:
    array = np.zeros(shape)
    for row, value in changes.items():
        array[int(row[1:])].flat[-1] = value
    return array


@pytest.mark.parametrize(
    ("name", "array", "answer"),
    [
        ("concat", rows(3, 2, 8, 8, _1=np.nan), "a value of row 1 is NaN"),
        ("concat", rows(3, 2, 8, 8, _2=-np.inf), "a value of row 2 is NaN or infinite"),
        ("concat", rows(3, 2, 8, 8, _0=1e39), "a value of row 0 is too large for float32"),
        ("concat", rows(3, 1, 8, 8), "the network takes (N, 2, 8, 8)"),
        ("concat", rows(3, 2, 8, 9), "the network takes (N, 2, 8, 8)"),
        ("concat", rows(2, 8, 8), "has shape (2, 8, 8)"),
        ("concat", rows(0, 2, 8, 8), "with N at least 1"),
        ("context", rows(3, 4, 7), "the network takes (N, any, 6)"),
        ("context", rows(3, 0, 6), "has shape (3, 0, 6)"),
        ("context", rows(2, 3, 6, _1=np.inf), "a value of row 1"),
        ("context", rows(2, 3, 6).astype(complex), "not real numbers"),
        ("context", rows(2, 3, 6).astype("datetime64[s]"), "not real numbers"),
        ("context", rows(2, 3, 6).astype("U3"), "not real numbers"),
        ("context", rows(2, 3, 6).astype(bool), "not numbers"),
        ("context", rows(2, 3, 6).astype(object), "object"),
    ],
)
def test_arrays_are_refused_by_row(sample, name, array, answer):
    np.save("condition.npy", array)
    status, error = sample(
        name, f"--{'concat_inputs' if name == 'concat' else 'encoder_hidden_states'}", "condition.npy"
    )
    assert status == 2
    assert answer in error


def test_a_value_must_fit_the_precision_of_the_network(sample):
    np.save("condition.npy", rows(2, 3, 6, _1=7e4))
    status, error = sample("context", "--encoder_hidden_states", "condition.npy", "--dtype", "float16")
    assert status == 2
    assert "a value of row 1 is too large for float16" in error
    assert sample("context", "--encoder_hidden_states", "condition.npy", "--dtype", "bfloat16")[0] == 0


def make_damaged(kind: str) -> Path:
    path = Path(f"{kind}.npy")
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "torn":
        np.save(path, np.zeros((3, 2, 8, 8)))
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "promise":
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 2, 8, 8)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
    else:
        path.write_bytes({"empty": b"", "text": b"1 2 3\n"}[kind])
    return path


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "torn", "promise", "empty", "text"])
def test_damaged_condition_files(sample, kind):
    path = make_damaged(kind)
    status, error = sample("concat", "--concat_inputs", str(path))
    assert status == 2
    assert path.name in error


@pytest.mark.parametrize(
    ("name", "flags", "answer"),
    [
        ("plain", ["--num_images", "1000000001"], "--num_images must be"),
        ("plain", ["--num_images", "1000000000", "--out", "a.npy"], "this machine has"),
        ("plain", ["--num_images", "30000000", "--out", "a.gif"], "too large for .gif"),
        ("plain", ["--num_images", "90000", "--out", "a.webp"], "at most 16383 per side"),
        ("plain", ["--num_images", "900000000", "--batch_size", "900000000"], "--batch_size 900000000"),
        ("plain", ["--num_inference_steps", "21"], "was trained with 20 steps"),
        ("plain", ["--guidance_scale", "2"], "is unconditional"),
        ("plain", ["--bit_depth", "16", "--out", "a.npy"], "no effect on --out a.npy"),
        ("plain", ["--variant", "raw"], "has no such weights"),
        ("concat", [], "needs --concat DIR or --concat_inputs FILE.npy"),
        ("context", ["--class_labels", "1"], "takes none"),
    ],
)
def test_what_does_not_fit_the_model(sample, name, flags, answer):
    status, error = sample(name, *flags)
    assert status == 2
    assert answer in error


DAMAGE = {
    "null": "null", "nan": '{"_class_name": NaN}', "deep": "[" * 100_000, "digits": '{"unet": ' + "9" * 5000 + "}",
    "latin": b'{"unet": "\xe9"}', "empty": "", "surrogate": '{"unet": "\\ud800"}', "list": "[1, 2]", "vae": None,
}  # fmt: skip


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_configurations(folders, tmp_path, monkeypatch, capsys, file, kind):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "plain", "plain")
    content = DAMAGE[kind]
    if content is None:
        if file != "model_index.json":
            return
        index = json.loads(Path("plain", file).read_text())
        content = json.dumps(index | {"vqvae": ["diffusers", "VQModel"]})
    Path("plain", file).write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (["sample", "plain"], ["evaluate", "plain"], ["fit-variance", "plain"]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert file.rsplit("/", 1)[-1] in error


def test_mistakes_that_files_show_are_told_before_torch_loads(folders, tmp_path):
    """CPU time, and the modules that were loaded."""
    np.save(tmp_path / "nan.npy", rows(1, 2, 8, 8, _0=np.nan))
    lines = [
        ["sample", str(folders / "food"), "--class_labels", "bred"],
        ["sample", str(folders / "concat"), "--concat_inputs", "nan.npy"],
        ["sample", str(folders / "plain"), "--num_inference_steps", "21"],
        ["sample", "model.ckpt"],
        ["evaluate", str(folders / "plain")],
        ["evaluate", str(folders / "plain"), "--train_data_dir", "missing"],
        ["fit-variance", str(folders / "plain"), "--first_step", "20"],
    ]
    code = "import sys, resource; from diffusers_ddpm_ext.cli import main; status = main(sys.argv[1:]); print(status, "
    code += "'torch' in sys.modules, resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-c", code, *line], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        status, loaded, seconds = done.stdout.split()
        assert (status, loaded) == ("2", "False"), (line, done.stderr)
        assert float(seconds) < 1.5


def test_images_of_other_classes_are_not_measured(folders, tmp_path, monkeypatch, capsys):
    """Labels that the network has no class for, and folders whose names are other classes."""
    monkeypatch.chdir(tmp_path)
    for command in (["evaluate", "--num_timesteps", "2"], ["fit-variance", "--draws", "1"]):
        line = [command[0], str(folders / "numbers"), *command[1:], "--device", "cpu", "--batch_size", "8"]
        assert cli.main(line) == 2  # the digits have ten classes
        assert "the data have a class 9; the classes of" in capsys.readouterr().err
        for name in ("Bread", "Pasta"):
            for index in range(2):
                path = Path("photos", name, f"{index}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 60 * index).save(path)
        line[1] = str(folders / "food")
        assert cli.main([*line, "--train_data_dir", "photos", "--channels", "1"]) == 2
        error = capsys.readouterr().err
        assert "class 1 of the data is 'Pasta', and that of" in error
        assert "'Dairy product'" in error
