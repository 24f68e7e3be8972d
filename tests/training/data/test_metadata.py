"""Metadata of image folders, as people's tools write it; the oracle is `datasets`' own ImageFolder."""

from __future__ import annotations

import gc
import unicodedata
from pathlib import Path

import datasets
import pytest
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.data.dataset import load_data

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD"))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder with files, and an image under every name that ends in .png; its gray level is its position."""
    for number, (name, content) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            Image.new("L", (8, 8), number).save(path)
        else:
            path.write_bytes(content)
    return folder


def our_labels(folder: Path) -> dict[int, int]:
    """Gray level of each image -> its label."""
    options = DataOptions(train_data_dir=str(folder), resolution=(8, 8), validation_fraction=0, class_column="label")
    images = load_data(options, "adm").train
    levels = images.load_levels(range(len(images))).values[:, 0, 0, 0].tolist()
    return dict(zip(levels, images.columns.labels.tolist(), strict=True))


def their_labels(folder: Path, cache: Path) -> dict[int, int]:
    table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(cache))
    labels = {row["image"].getpixel((0, 0)): int(row["label"]) for row in table}
    gc.collect()  # `datasets` leaves CSV files open: their warnings are ignored here, not in the next test
    return labels


DIALECTS = {
    "plain": {"a.png": b"", "metadata.csv": b"file_name,label\na.png,1\n"},
    "byte order mark": {"a.png": b"", "metadata.csv": b"\xef\xbb\xbffile_name,label\na.png,1\n"},
    "byte order mark and JSON": {"a.png": b"", "metadata.jsonl": b'\xef\xbb\xbf{"file_name": "a.png", "label": 1}\n'},
    "Windows' line ends": {"a.png": b"", "metadata.csv": b"file_name,label\r\na.png,1\r\n\r\n"},
    "no line end": {"a.png": b"", "metadata.jsonl": b'{"file_name": "a.png", "label": 1}'},
    "dot": {"x/a.png": b"", "metadata.csv": b"file_name,label\n./x/./a.png,1\n"},
    "detour": {"x/a.png": b"", "metadata.csv": b"file_name,label\nx/../x//a.png,1\n"},
    "in the subfolders": {
        "x/a.png": b"", "x/metadata.csv": b"file_name,label\na.png,1\n",
        "y/a.png": b"", "y/metadata.csv": b"file_name,label\na.png,2\n",
    },
    "in a folder above": {"x/y/a.png": b"", "x/metadata.jsonl": b'{"file_name": "y/a.png", "label": 3}\n'},
    "quoted comma": {"a, b.png": b"", "metadata.csv": b'label,file_name\n4,"a, b.png"\n'},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", DIALECTS)
def test_metadata_is_read_as_datasets_reads_it(name, tmp_path):
    folder = write(tmp_path / "images", DIALECTS[name])
    assert our_labels(folder) == their_labels(folder, tmp_path / "cache")


@pytest.mark.parametrize(
    ("image", "name"),
    [("x/a.png", "x\\a.png"), ("x/a.png", ".\\x\\a.png"), (NFC, NFD), (NFD, NFC), ("x y/" + NFD, "x y\\" + NFC)],
)
def test_names_of_another_system_lead_to_the_image(image, name, tmp_path):
    write(tmp_path, {image: b"", "metadata.csv": f"file_name,label\n{name},1\n".encode()})
    assert our_labels(tmp_path) == {0: 1}


def test_a_name_that_exists_as_written_is_not_normalized(tmp_path):
    rows = f"file_name,label\n{NFC},1\n{NFD},2\nx\\a.png,3\n"
    write(tmp_path, {NFC: b"", NFD: b"", "x\\a.png": b"", "metadata.csv": rows.encode()})
    assert our_labels(tmp_path) == {0: 1, 1: 2, 2: 3}


WRONG = {
    "twice": (b"file_name,label\na.png,1\n./a.png,2\n", "row 2 describes a.png, as .*row 1 does"),
    "absolute": (b"file_name,label\na.png,1\n/etc/passwd,2\n", "row 2 .*below that folder"),
    "outside": (b"file_name,label\na.png,1\nx/../../a.png,2\n", "row 2 .*below that folder"),
    "another file system": (b"file_name,label\na.png,1\nzip://b.png::c.zip,2\n", "row 2 .*below that folder"),
    "no name": (b"file_name,label\na.png,1\n,2\n", "row 2 has no file_name"),
    "no row": (b"file_name,label\nb.png,1\n", "no value for 'a.png'"),
    "other case": (b"file_name,label\nA.PNG,1\n", "no value for 'a.png'"),
    "no column": (b"file_name,kind\na.png,1\n", "'label' is not in .*file_name, kind"),
    "semicolons": (b"file_name;label\na.png;1\n", "column file_name"),
    "column twice": (b"file_name,label,label\na.png,1,2\n", "label.*twice"),
    "short row": (b"file_name,label\na.png\n", "1 field"),
    "empty": (b"", "one row per image"),
    "UTF-16": ("file_name,label\na.png,1\n".encode("utf-16"), "UTF-8"),
    "NUL": (b"file_name,label\na.png,1\0\n", "NUL"),
    "a field of 1 MiB": (b"file_name,label\na.png," + b"x" * 2**20, "field"),
    "300,000 columns": (b"file_name,label," + b",".join(b"%d" % i for i in range(300_000)) + b",299999\n", "twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_metadata_is_one_sentence(name, tmp_path):
    content, message = WRONG[name]
    write(tmp_path, {"a.png": b"", "metadata.csv": content})
    with pytest.raises(ConfigError, match=message) as caught:
        our_labels(tmp_path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]\n", "line 1"),
        (b'{"file_name": "a.png", "label": 1}\nnot json\n', "line 2"),
        (b'{"file_name": "a.png", "label": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n", "nested"),
        (b'{"file_name": 7, "label": 1}\n', "row 1 has no file_name"),
        (b'{"file_name": "a.png", "label": 1, "label": 2}\n', "twice"),
        (b"\xff\xfe\n", "UTF-8"),
    ],
)
def test_wrong_json_lines_are_one_sentence(content, message, tmp_path):
    write(tmp_path, {"a.png": b"", "metadata.jsonl": content})
    with pytest.raises(ConfigError, match=message):
        our_labels(tmp_path)


def test_two_files_in_one_folder_are_refused(tmp_path):
    row = b'{"file_name": "a.png", "label": 2}\n'
    write(tmp_path, {"a.png": b"", "metadata.csv": b"file_name,label\na.png,1\n", "metadata.jsonl": row})
    with pytest.raises(ConfigError, match="in one folder"):
        our_labels(tmp_path)
