"""Captions of images: every source gives the same texts, one is drawn by key, and what is no caption is refused."""

from __future__ import annotations

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers.text_models import tiny_text_encoder, tiny_tokenizer
from PIL import Image

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.models.conditioning import Conditions
from diffusers_ddpm_ext.models.text_encoder import TextEncoder
from diffusers_ddpm_ext.training.config.condition_checks import data_conditions, select_columns
from diffusers_ddpm_ext.training.config.data_options import DataOptions
from diffusers_ddpm_ext.training.config.train_config import TrainConfig, parse_train_args
from diffusers_ddpm_ext.training.data.batches import batch_stream
from diffusers_ddpm_ext.training.data.caption_text import captions_of_cell, csv_cells
from diffusers_ddpm_ext.training.data.captions import CaptionReader
from diffusers_ddpm_ext.training.data.condition_dropout import make_condition_dropout
from diffusers_ddpm_ext.training.data.dataset import ImageData, load_data
from diffusers_ddpm_ext.training.data.early_checks import check_input_files

COUNT = 12
SEVERAL = [["one", "two", "three"] if number % 2 else f"only {number}" for number in range(COUNT)]


class Letters:
    """A tokenizer whose ids are the code points of a text, between a begin and an end that also pads."""

    length = 16

    def __init__(self) -> None:
        self.tokenized: list[str] = []

    def tokenize_and_find_cut(self, prompts: list[str]) -> tuple[torch.Tensor, list[str]]:
        self.tokenized += prompts
        rows = [[1, *map(ord, prompt[: self.length - 2])] for prompt in prompts]
        ids = torch.tensor([row + [2] * (self.length - len(row)) for row in rows])
        return ids, [prompt for prompt in prompts if len(prompt) > self.length - 2]


def images(folder: Path, captions: list[Any], names: list[str] | None = None, kind: str = "jsonl") -> Path:
    """A folder of images with captions in a metadata file."""
    names = names or [f"{number:02d}.png" for number in range(len(captions))]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / name)
    rows = [{"file_name": name, "text": caption} for name, caption in zip(names, captions, strict=True)]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        cells = ['"' + str(row["text"]).replace('"', '""') + '"' for row in rows]
        lines = [f"{row['file_name']},{cell}" for row, cell in zip(rows, cells, strict=True)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    return folder


def load(folder: Path, column: str = "text", **options: Any) -> ImageData:
    options = {"validation_fraction": 0} | options
    chosen = DataOptions(train_data_dir=str(folder), resolution=(8, 8), caption_column=column, **options)
    return load_data(chosen, "crossattn", tokenizer=Letters())


def texts(data: ImageData, numbers: torch.Tensor) -> list[str]:
    assert data.captions is not None
    return data.captions.texts(numbers)


def first_captions(data: ImageData) -> list[str]:
    return texts(data, data.train.conditions(range(len(data.train))).captions)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_has_the_captions_that_datasets_reads(kind, tmp_path):
    captions = ["a cat", 'the "dog", asleep', "caf\u00e9 \u732b \U0001f469\u200d\U0001f680", "two\nlines", "7 cats"]
    images(tmp_path / "images", captions, kind=kind)
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "images"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert first_captions(load(tmp_path / "images")) == theirs["text"][:] == captions
    gc.collect()  # `datasets` leaves CSV files open: their warnings are ignored here, not in the next test


def test_text_files_beside_the_images_have_a_caption_in_each_line(tmp_path):
    images(tmp_path, ["", "", ""], ["a.png", "x/b.c.png", "x/d.JPG"], kind="none")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  a pet \r\n")
    (tmp_path / "x/b.c.txt").write_bytes("caf\u00e9".encode())
    (tmp_path / "x/d.TXT").write_bytes(b"old\rlines\r")
    data = load(tmp_path, "txt")
    assert first_captions(data) == ["a cat", "caf\u00e9", "old"]
    assert data.captions.texts(range(len(data.captions))) == ["", "a cat", "a pet", "caf\u00e9", "old", "lines"]


def test_names_of_folders_are_captions_where_that_is_asked_for(tmp_path):
    images(tmp_path, ["", ""], ["a red cat/a.png", "a dog/b.png"], kind="none")
    assert first_captions(load(tmp_path, "folder")) == ["a dog", "a red cat"]


def test_columns_of_datasets_have_texts_or_lists_of_texts(tmp_path):
    pictures = [Image.new("L", (8, 8), number) for number in range(3)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string")),
                                  "kind": datasets.ClassLabel(names=["cat", "dog"])})  # fmt: skip
    rows = {"image": pictures, "text": [["a cat", "a pet"], ["a dog"], ["a bird"]], "kind": [0, 1, 0]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    options = DataOptions(dataset_name=str(tmp_path / "saved"), resolution=(8, 8), caption_column="text",
                          validation_fraction=0)  # fmt: skip
    data = load_data(options, "crossattn", tokenizer=Letters())
    assert first_captions(data) == ["a cat", "a dog", "a bird"]
    options = DataOptions(dataset_name=str(tmp_path / "saved"), resolution=(8, 8), caption_column="kind")
    with pytest.raises(ConfigError, match=r"'kind' .*holds classes, not captions: use --class_column"):
        load_data(options, "crossattn", tokenizer=Letters())


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", None], "row 1 has no caption: its value is empty"),
        (["a", ""], "row 1 has no caption"),
        ([1, 2], r"row 0 has the caption 1 \(a number\)"),
        ([["a"], []], "row 1 has a list of 0 captions"),
        ([["a"], None], "row 1 has no caption"),
        ([["a"], ["b", None]], "row 1 has a list whose caption 2 is empty"),
        ([b"a", b"b"], "row 0 .*of type bytes"),
        ([{"en": "a"}, {"en": "b"}], "row 0 .*of type dict"),
        ([[[0.5]], [[0.5]]], "row 0 has a list whose caption 1 is .*of type list"),
    ],
)
def test_a_bad_cell_of_a_dataset_is_refused_by_its_row(column, message, tmp_path):
    pictures = [Image.new("L", (8, 8), number) for number in range(2)]
    table = datasets.Dataset.from_dict({"image": pictures, "text": column})
    table.cast_column("image", datasets.Image()).with_format("numpy").save_to_disk(tmp_path / "saved")
    options = DataOptions(dataset_name=str(tmp_path / "saved"), resolution=(8, 8), caption_column="text")
    with pytest.raises(ConfigError, match=f"--caption_column text: {message}"):
        load_data(options, "crossattn", tokenizer=Letters())


def test_each_text_is_tokenized_once_and_padding_is_restored():
    tokenizer = Letters()
    reader = CaptionReader(tokenizer)
    cells = {"a": ["same", "x" * 40], "b": "same", "c": "other"}
    first, second = reader.read("--caption_column x", cells, ["a", "b"]), reader.read("-", cells, ["c"])
    table = reader.table()
    assert tokenizer.tokenized == ["", "same", "x" * 40, "other"]
    assert torch.equal(table.input_ids(range(len(table))), Letters().tokenize_and_find_cut(tokenizer.tokenized)[0])
    assert table.input_ids([3, 0]).dtype == torch.int64
    assert [first.numbers[0].tolist(), first.numbers[1].tolist(), second.numbers[0].tolist()] == [[1, 2], [1], [3]]


def test_captions_that_the_tokenizer_does_not_know_or_cuts_are_counted():
    class Digits(Letters):
        def tokenize_and_find_cut(self, prompts):
            return super().tokenize_and_find_cut(["".join(filter(str.isdigit, prompt)) for prompt in prompts])

    def warnings(*captions):
        reader = CaptionReader(Digits())
        reader.read("x", {str(i): caption for i, caption in enumerate(captions)}, [*map(str, range(len(captions)))])
        return reader.table().warnings

    assert warnings("cat 7", "8") == []
    assert warnings("cat 7", "dog", "a\nbird", "1" * 14, "2" * 15) == [
        "--tokenizer knows nothing of 'dog' and 1 more: the tokens are those of the empty prompt",
        "captions are cut after 16 tokens: '222222222222222'",
    ]


def test_the_tokens_of_a_text_encoder_are_those_of_its_tokenizer():
    """With CLIP's own class: a caption that just fits is not cut."""
    tokenizer = tiny_tokenizer(length=8)
    reader = CaptionReader(TextEncoder(tiny_text_encoder(length=8), tokenizer))
    captions = ["a cat", "A  CAT", "a b c d e f", "a b c d e f g", "red " * 20]
    reader.read("x", {"image": captions}, ["image"])
    table = reader.table()
    texts = table.texts(range(len(table)))
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=8, return_tensors="pt").input_ids
    assert torch.equal(table.input_ids(range(len(table))), expected)
    assert table.warnings == ["captions are cut after 8 tokens: 'a b c d e f g' and 1 more"]


def test_a_caption_that_is_all_one_token_keeps_its_length():
    class Constant:
        def tokenize_and_find_cut(self, prompts):
            return torch.full((len(prompts), 5), 3), []

    reader = CaptionReader(Constant())
    reader.read("x", {"a": "cat"}, ["a"])
    assert reader.table().input_ids([0, 1]).tolist() == [[3] * 5] * 2


def test_every_caption_of_an_image_is_drawn_about_as_often(tmp_path):
    data = load(images(tmp_path, SEVERAL))
    drawn = Counter(texts(data, data.train.conditions([1] * 900, seed=3, epochs=range(900)).captions))
    assert set(drawn) == {"one", "two", "three"}
    assert all(abs(count - 300) < 5 * np.sqrt(200) for count in drawn.values())


def drawn_in(data: ImageData, accumulation: int, world: int, steps: range, **options: Any) -> list[list[int]]:
    """Number of the caption at each position of the effective batch of 4, by step."""
    batch = 4 // (accumulation * world)
    result = [[-1] * 4 for _ in steps]
    for rank in range(world):
        stream = batch_stream(data.train, 5, batch, accumulation, rank, world, start_step=steps.start, **options)
        for _, item in zip(range(len(steps) * accumulation), stream, strict=False):
            for position, number in zip(item.positions.tolist(), item.conditions.captions.tolist(), strict=True):
                result[item.step - steps.start][position] = number
    return result


@pytest.mark.parametrize(("accumulation", "world", "workers"), [(1, 2, 0), (2, 1, 0), (2, 2, 0), (1, 1, 2)])
def test_captions_do_not_depend_on_the_split_of_a_batch(accumulation, world, workers, tmp_path):
    data = load(images(tmp_path, SEVERAL))
    alone = drawn_in(data, 1, 1, range(9))
    assert len({number for step in alone for number in step}) > COUNT // 2 + 1
    assert drawn_in(data, accumulation, world, range(9), num_workers=workers) == alone


def test_a_run_that_resumes_draws_the_captions_of_the_run_that_went_on(tmp_path):
    data = load(images(tmp_path, SEVERAL))
    assert drawn_in(data, 1, 1, range(4, 9)) == drawn_in(data, 1, 1, range(9))[4:]


def test_validation_takes_the_first_caption_and_shares_the_table(tmp_path):
    train = images(tmp_path / "train", ["a cat", "a dog"])
    held_out = images(tmp_path / "held_out", [["a dog", "a pet"], "a bird"])
    data = load(train, validation_data_dir=str(held_out))
    numbers = data.validation.conditions([0, 1], seed=8).captions
    assert numbers.tolist() == [2, 4]
    assert texts(data, numbers) == ["a dog", "a bird"]
    assert texts(data, data.train.conditions([0, 1]).captions) == ["a cat", "a dog"]
    part = load(train, validation_fraction=0.5)
    both = torch.cat([part.train.conditions([0]).captions, part.validation.conditions([0]).captions])
    assert set(texts(part, both)) == {"a cat", "a dog"}


def test_the_fingerprint_follows_captions_and_their_order(tmp_path):
    variants = [["a", "b"], ["b", "a"], ["a", "c"], [["a", "c"], "b"], ["a", ["c", "b"]], [["a"], "b"]]
    prints = [load(images(tmp_path / str(i), each)).fingerprint for i, each in enumerate(variants)]
    assert len(set(prints[:5])) == 5
    assert prints[5] == prints[0]  # a list of one text is that text


def test_a_dropped_caption_is_the_empty_prompt(tmp_path):
    dropout, null_class = make_condition_dropout({"captions": {"p": 0.3, "val": ""}}, ("captions",), None)
    assert null_class is None
    numbers = torch.arange(1, 4001)
    dropped = dropout.apply(Conditions(captions=numbers), 0, 0, torch.arange(4000)).captions
    assert abs(int((dropped == 0).sum()) - 1200) < 5 * np.sqrt(840)
    assert torch.equal(dropped[dropped != 0], numbers[dropped != 0])
    halves = [dropout.apply(Conditions(captions=numbers[part]), 0, 0, torch.arange(4000)[part]).captions
              for part in (slice(0, 1500), slice(1500, 4000))]  # fmt: skip
    assert torch.equal(torch.cat(halves), dropped)
    with pytest.raises(ConfigError, match="'captions': val '7' must be left out"):
        make_condition_dropout({"captions": {"p": 0.3, "val": 7}}, ("captions",), None)
    with pytest.raises(ConfigError, match="the conditions of this run are captions"):
        make_condition_dropout({"encoder_hidden_states": 0.1}, ("captions",), None)


BAD_CELLS = {
    "none": (None, r"has no value for '01.png'"),
    "empty": ("", "has no value for '01.png'"),
    "white space": (" \t\n", "its value is empty"),
    "mark": ("\ufeff", "its value is empty"),
    "number": (7, r"7 \(a number\)"),
    "fraction": (0.5, r"0.5 \(a number\)"),
    "boolean": (True, r"True \(true or false\)"),
    "object": ({"en": "a cat"}, "of type dict"),
    "no list": ([], "a list of 0 captions"),
    "long list": (["x"] * 1001, "a list of 1,001 captions"),
    "null in a list": (["a", None], "caption 2 is empty"),
    "number in a list": (["a", 3], r"caption 2 is 3 \(a number\)"),
    "list in a list": (["a", ["b"]], "caption 2 is .*of type list"),
    "empty in a list": (["a", ""], "its value is empty"),
    "huge": ("x" * 20_001, "20,001 characters: use at most 20,000"),
    "escape": ("\x1b[31mred", r"control character U\+001B"),
    "bell": ("a\x07", r"control character U\+0007"),
    "nul": ("a\0b", r"control character U\+0000"),
    "next line": ("a\x85b", r"control character U\+0085"),
    "nan": ("NaN", "stands for no value"),
    "null": ("null", "stands for no value"),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_what_is_no_caption_is_refused_by_the_name_of_its_image(case, tmp_path):
    cell, message = BAD_CELLS[case]
    with pytest.raises(ConfigError, match=message) as refused:
        load(images(tmp_path, ["fine", cell]))
    assert "01.png" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ConfigError, match=r"half of a surrogate pair U\+D83D"):
        captions_of_cell("row 3", "a \ud83d")


BAD_FILES = {
    "missing": (None, r"01\.png has no text file 01\.txt beside it$"),
    "empty": (b"", r"01\.txt is empty"),
    "blank": (b"\n \r\n", r"01\.txt is empty"),
    "mark": (b"\xef\xbb\xbf", r"01\.txt is empty"),
    "latin-1": (b"caf\xe9", r"01\.txt is not text: byte 3 is not UTF-8"),
    "utf-16": ("a cat".encode("utf-16"), r"01\.txt is not text"),
    "nul": (b"a\0b", r"01\.txt .*NUL"),
    "huge": (b"x" * (2**20 + 1), r"01\.txt has 1,048,577 bytes"),
    "control": (b"a\x1b[2J", r"01\.png .*control character U\+001B"),
    "folder": ("a folder", r"01\.txt is a folder"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_text_file_is_refused_by_name(case, tmp_path):
    content, message = BAD_FILES[case]
    images(tmp_path, ["", ""], kind="none")
    (tmp_path / "00.txt").write_text("fine")
    if isinstance(content, str):
        (tmp_path / "01.txt").mkdir()
    elif content is not None:
        (tmp_path / "01.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, "txt")


def test_images_without_text_files_are_counted_before_anything_is_decoded(tmp_path):
    images(tmp_path, [""] * 5, kind="none")
    (tmp_path / "00.txt").write_text("fine")
    (tmp_path / "02.png").write_bytes(b"not an image")
    config = TrainConfig.from_flat({"train_data_dir": str(tmp_path), "caption_column": "txt", **WITH_ENCODER})
    with pytest.raises(ConfigError, match=r"01\.png has no text file 01\.txt beside it; 4 of 5 images have none"):
        check_input_files(config)


def test_cells_of_csv_files(tmp_path):
    lists = {"a": '["a cat", "a pet"]', "b": "[portrait] of [me]", "c": "[1, 2", "d": "['so' they said]"}
    assert csv_cells("x", lists) == lists | {"a": ["a cat", "a pet"]}
    with pytest.raises(ConfigError, match=r"x: a has a list that is not JSON \(\['a cat', 'a pet'\]\)"):
        csv_cells("x", {"a": "['a cat', 'a pet']"})
    with pytest.raises(ConfigError, match=r"01.png has a list whose caption 2 is 7 \(a number\)"):
        load(images(tmp_path, ["x", '["y", 7]'], kind="csv"))
    with pytest.raises(ConfigError, match=r"--caption_column text holds only numbers .*0 for 00.png"):
        load(images(tmp_path, ["0", "-1.5", "2e3"], kind="csv"))
    assert first_captions(load(images(tmp_path / "quoted", ["0", "1"]))) == ["0", "1"]  # JSON: these are texts


def test_a_wrong_column_is_named_with_the_ones_there_are(tmp_path):
    images(tmp_path / "named", ["a cat"])
    with pytest.raises(ConfigError, match=r"column 'caption' is not in .*: it has file_name, text"):
        load(tmp_path / "named", "caption")
    with pytest.raises(ConfigError, match="file_name has the names of the files"):
        load(tmp_path / "named", "file_name")
    images(tmp_path / "bare", ["a cat"], kind="none")
    with pytest.raises(ConfigError, match=r"no metadata.csv or metadata.jsonl: .*--caption_column txt"):
        load(tmp_path / "bare")
    with pytest.raises(ConfigError, match="the digits have no captions"):
        load_data(DataOptions(caption_column="digit", resolution=(8, 8)), "crossattn", tokenizer=Letters())
    with pytest.raises(ConfigError, match="--caption_column text needs --text_encoder"):
        load_data(DataOptions(train_data_dir=str(tmp_path / "named"), resolution=(8, 8), caption_column="text"),
                  "crossattn")  # fmt: skip


def columns_of(key: str | None, **options: Any) -> dict[str, str]:
    names = {"train_data_dir": "x", "dataset_name": None, "context_column": None, "class_column": None,
             "concat_column": None, "caption_column": "text"}  # fmt: skip
    return select_columns(key, names | options, "folder")


def test_captions_take_the_place_of_embeddings_where_the_key_has_cross_attention():
    assert columns_of("crossattn") == {"captions": "text"}
    assert columns_of("hybrid", concat_column="hint") == {"captions": "text", "concat_inputs": "hint"}
    assert columns_of("crossattn-adm") == {"captions": "text", "class_labels": "folder"}
    options = {"caption_column": "x", "train_data_dir": "x", "dataset_name": None, "context_column": None,
               "class_column": "kind"}  # fmt: skip
    assert data_conditions("hybrid-adm", options) == ("concat_inputs", "captions", "class_labels")
    for key in (None, "adm", "concat"):
        options = {"class_column": "kind"} if key == "adm" else {"concat_column": "hint"} if key == "concat" else {}
        with pytest.raises(
            ConfigError, match=f"--caption_column text has no effect with --conditioning_key {key or 'n'}"
        ):
            columns_of(key, **options)
    with pytest.raises(ConfigError, match="--context_column words and --caption_column text both"):
        columns_of("crossattn", context_column="words")
    with pytest.raises(ConfigError, match="--class_column kind has no effect with --conditioning_key crossattn"):
        columns_of("crossattn", class_column="kind")
    with pytest.raises(ConfigError, match=r"needs --context_column.*--caption_column with --text_encoder"):
        columns_of("crossattn", caption_column=None)


def test_a_caption_column_selects_cross_attention(tmp_path):
    folder = str(images(tmp_path, ["a cat"]))
    arguments = ["--train_data_dir", folder, "--caption_column", "text"]
    encoder = [part for name, value in WITH_ENCODER.items() for part in (f"--{name}", value)]
    config = parse_train_args([*arguments, *encoder])
    assert config.model.conditioning_key == "crossattn"
    assert config.data.caption_column == "text"


WITH_ENCODER = {"text_encoder": "user/encoder"}
