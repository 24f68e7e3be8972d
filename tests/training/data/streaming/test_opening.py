"""Tests of sources that are read in order: every format gives its rows, from any of them on."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.data.sources import payload_of_cell
from diffusers_ddpm_ext.training.data.streaming.opening import open_dataset, open_folder
from diffusers_ddpm_ext.training.data.streaming.rows import first_rows

datasets = pytest.importorskip("datasets")
COUNT = 23
LABELS = {"class_labels": "label"}


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), number).save(file, "PNG")
    return file.getvalue()


def table(start=0, stop=COUNT):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
            "other": datasets.Value("string"),
        }
    )
    rows = range(start, stop)
    images = [{"bytes": png(row), "path": f"{row}.png"} for row in rows]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [row % 3 for row in rows], "other": ["x"] * len(rows)}, features=features
    )


def write_tar(path, start, stop, image=png, extension="png"):
    with tarfile.open(path, "w") as tar:
        for row in range(start, stop):
            for name, content in ((f"{row:04d}.{extension}", image(row)), (f"{row:04d}.cls", str(row % 3).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write(kind, root):
    """The rows in a format; and what to name, its column of classes, and the number of parts."""
    if kind == "parquet":
        for number, (start, stop) in enumerate([(0, 9), (9, 9), (9, COUNT)]):
            arrow = (
                table(start, stop).with_format("arrow")[:]
                if start < stop
                else table(0, 1).with_format("arrow")[:].slice(1)
            )
            pq.write_table(arrow, root / f"train-{number}-of-3.parquet", row_group_size=4)
        return str(root), "label", 7
    if kind == "saved":
        table().save_to_disk(root / "saved")
        return str(root / "saved"), "label", COUNT
    if kind == "arrow":
        for number, (start, stop) in enumerate([(0, 9), (9, COUNT)]):
            arrow = table(start, stop).with_format("arrow")[:]
            with (
                pa.OSFile(str(root / f"{number}.arrow"), "wb") as sink,
                pa.ipc.new_stream(sink, arrow.schema) as writer,
            ):
                writer.write_table(arrow, max_chunksize=4)
        return str(root / "*.arrow"), "label", 2
    for number, (start, stop) in enumerate([(0, 9), (9, COUNT)]):
        write_tar(root / f"{number}.tar", start, stop)
    return str(root), "cls", 2


def numbers(rows):
    """Which image each row has, by its bytes, and its class."""
    known = {png(number): number for number in range(COUNT)}
    return [known[payload_of_cell(row.cells.get("image", row.cells.get("png")))] for row in rows]


@pytest.mark.parametrize("kind", ["parquet", "saved", "arrow", "tar"])
def test_rows_of_every_format(tmp_path, kind):
    name, column, parts = write(kind, tmp_path)
    opened = open_dataset(name, "train", None, None, str(tmp_path / "cache"), {"class_labels": column})
    rows = first_rows(opened.rows, 100)
    assert numbers(rows) == list(range(COUNT))
    assert [row.cells[column] for row in rows] == [number % 3 for number in range(COUNT)]
    assert set(rows[0].cells) == {opened.image_column, column}
    assert len({row.number for row in rows}) == COUNT
    assert opened.rows.num_parts == parts
    assert opened.rows.num_rows in (None, COUNT)
    assert opened.class_names == (None if kind == "tar" else ["a", "b", "c"])
    count = 4 if opened.rows.num_rows is not None else parts
    divided = [list(opened.rows.read(part, count)) for part in range(count)]
    assert [row.number for part in divided for row in part] == [row.number for row in rows]
    for part, expected in enumerate(divided):
        for start in (1, len(expected) - 1, len(expected)):
            again = list(opened.rows.read(part, count, start))
            assert numbers(again) == numbers(expected[start:])
    assert [row.cells for row in first_rows(opened.rows.only(column), 3)] == [{column: each} for each in (0, 1, 2)]
    assert numbers(first_rows(opened.rows.without_first(11), 100)) == list(range(11, COUNT))
    file = {
        "parquet": "row 1 of train-2-of-3.parquet",
        "saved": "row 10",
        "arrow": "row 1 of 1.arrow",
        "tar": "row 1 of 1.tar",
    }
    assert opened.rows.name(rows[10].number) == file[kind]


def test_images_of_a_folder(tmp_path):
    for number in range(COUNT):
        (tmp_path / str(number % 3)).mkdir(exist_ok=True)
        (tmp_path / str(number % 3) / f"{number:02d}.png").write_bytes(png(number))
    opened = open_folder("--train_data_dir", str(tmp_path), {"class_labels": "folder"})
    rows = first_rows(opened.rows, 100)
    paths = sorted(tmp_path.rglob("*.png"))
    assert [row.cells["image"] for row in rows] == paths
    assert [row.cells["folder"] for row in rows] == [path.parent.name for path in paths]
    assert opened.rows.name(3) == paths[3].relative_to(tmp_path).as_posix()
    identity = opened.identity
    paths[5].write_bytes(png(5) + b"x")
    assert open_folder("--train_data_dir", str(tmp_path), {"class_labels": "folder"}).identity != identity


def test_arrays_keep_their_dtype(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 6, 4, 3)).astype(np.float32)
    features = datasets.Features({"a": datasets.Array3D((6, 4, 3), "float32"), "n": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"a": values, "n": list(range(5))}, features=features)
    made.to_parquet(tmp_path / "train.parquet")
    made.save_to_disk(tmp_path / "saved")

    def npy(row):
        file = io.BytesIO()
        np.save(file, values[row])
        return file.getvalue()

    write_tar(tmp_path / "train.tar", 0, 5, npy, "npy")
    for name in ("train.parquet", "saved", "train.tar"):
        opened = open_dataset(str(tmp_path / name), "train", None, None, str(tmp_path / "cache"), {})
        cells = [payload_of_cell(row.cells[opened.image_column]) for row in first_rows(opened.rows, 9)]
        assert all(cell.dtype == np.float32 for cell in cells), name
        np.testing.assert_array_equal(np.stack(cells), values)


def test_one_row_group_of_a_million_rows_is_read_in_pieces(tmp_path):
    """What is in memory depends neither on the file nor on its row groups; `datasets` would read a whole one."""
    count = 1 << 20
    pq.write_table(
        pa.table({"image": pa.array([b"x" * 40] * count)}), tmp_path / "train.parquet", row_group_size=count
    )
    opened = open_dataset(str(tmp_path / "train.parquet"), "train", None, "image", str(tmp_path / "cache"), {})
    before = pa.total_allocated_bytes()
    rows = opened.rows.read(0, 1, 1000)
    assert next(rows).number == 1000
    assert pa.total_allocated_bytes() - before < 16 << 20
    assert opened.rows.num_rows == count


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none", {}, r"--dataset_name '.*none', split 'train', cannot be opened: "),
        ("set", {"split": "nothing"}, r"split 'nothing', cannot be opened: .*nothing"),
        ("set", {"image_column": "photo"}, r"--image_column 'photo': .* has the columns image, label, other"),
        ("set", {"image_column": "label"}, r"--image_column 'label' of .* has no images: it has ClassLabel"),
        ("set", {"columns": {"class_labels": "kind"}}, r"column 'kind' is not in .*: it has image, label, other"),
        ("broken", {}, r"broken', split 'train', cannot be opened: "),
        ("torn", {}, r"torn.parquet', split 'train', cannot be opened: "),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, name, options, message):
    (tmp_path / "set").mkdir()
    table(0, 3).to_parquet(tmp_path / "set" / "train.parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet")
    content = (tmp_path / "set" / "train.parquet").read_bytes()
    (tmp_path / "torn.parquet").write_bytes(content[: len(content) // 2])
    name = "torn.parquet" if name == "torn" else name
    arguments = {"split": "train", "image_column": None, "columns": {}} | options
    with pytest.raises(ConfigError, match=message) as caught:
        open_dataset(
            str(tmp_path / name), arguments["split"], None, arguments["image_column"], str(tmp_path / "cache"),
            arguments["columns"],
        )  # fmt: skip
    assert "\n" not in str(caught.value)


def test_identity_follows_the_content(tmp_path):
    def identity():
        return open_dataset(str(tmp_path / "a.parquet"), "train", None, None, str(tmp_path / "c"), LABELS).identity

    table(0, 5).to_parquet(tmp_path / "a.parquet")
    first = identity()
    assert identity() == first
    table(1, 6).to_parquet(tmp_path / "a.parquet")
    assert identity() != first


def test_a_torn_file_among_others_is_one_line(tmp_path):
    for number in range(2):
        table(0, 5).to_parquet(tmp_path / f"train-{number}.parquet")
    content = (tmp_path / "train-1.parquet").read_bytes()
    (tmp_path / "train-1.parquet").write_bytes(content[:-20])
    with pytest.raises(ConfigError, match="cannot be read: ArrowInvalid") as caught:
        open_dataset(str(tmp_path), "train", None, None, str(tmp_path / "c"), LABELS)
    assert "\n" not in str(caught.value)
