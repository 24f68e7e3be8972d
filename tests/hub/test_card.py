"""A model card shows names from outside and never obeys them: two renderers and a YAML reader are the oracle."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import markdown
import markdown_it
import numpy as np
import pytest
import yaml
from diffusers import UNet2DModel
from helpers.tiny import tiny_unet

from diffusers_ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.hub.card import CARD_MARKER, make_card, may_replace_card
from diffusers_ddpm_ext.hub.markdown import code_span, inline_text, preformatted
from diffusers_ddpm_ext.hub.push import _add_card_and_proof

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</code></pre></details><h1>owned</h1>",
    "<!-- comment",
    "# heading",
    "x\n\n# heading\n\n",
    "x\n---\n",
    "---\nlicense: evil\n---",
    "x\r\n===\r\n",
    "[click](https://evil.example)",
    "[click][1]\n\n[1]: https://evil.example",
    "![pixel](https://evil.example/p.png)",
    "<https://evil.example>",
    "https://evil.example",
    "www.evil.example",
    "someone@evil.example",
    "a | b | c",
    "a \\| b",
    "`",
    "``` \n<b>x</b>\n```",
    "a`b``c```d",
    "` <b> `",
    "*bold* __bold__ ~~gone~~",
    "&lt;b&gt; &#60;",
    "$$x$$",
    "\x1b[31mred\x07",
    "\u202egnp.exe",
    "- item\n- item",
    "> quote",
    "1. one",
    "\\",
    "a\\",
    " ",
    "",
    "n" * 5000,
    "é 猫 🐈",
    "{{ template }} {% raw %}",
]


class Elements(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.tags.append(f"comment {data.strip()}")


def renderers():
    gfm = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    python = markdown.Markdown(extensions=["tables", "fenced_code"])
    return {"markdown-it": gfm.render, "Python-Markdown": lambda text: python.reset().convert(text)}


def body_of(card: str) -> str:
    return re.fullmatch(r"---\n.*?\n---\n(.*)", card, re.S)[1]


def folder_named(tmp_path, name: str, classes: bool = True):
    """A pipeline's folder with a name at every place where one can stand."""
    if not (tmp_path / "model_index.json").exists():
        DDPMExtPipeline(tiny_unet(1), DDPMExtScheduler(20)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"conditioning_key": name or "none", "id2label": {"0": name.strip() or "x", "1": "cat"}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    name = name or " "
    data = {"name": name, "train": 1234, "validation": 5, "fingerprint": name}
    if classes:
        data["classes"] = [{"name": name, "images": 1000}, {"name": "dog", "images": 234}]
    environment = {"packages": {name: name, "torch": name}, "python": name, "device": name, "data": data}
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"dataset_name": name}, "seed": name}))
    (tmp_path / "evaluation").mkdir(exist_ok=True)
    facts = {"bits_per_dim": 3.1, "low": None, "high": None, "num_images": 1, "split": name, "decoder_kind": name}
    facts |= {"chain": 20, "chain_timesteps": "all", "bin_width": None, "confidence": 0.95}
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(facts))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 7, "val/loss_simple": 0.25, name: 1.0}) + "\n")
    return tmp_path


@pytest.fixture(scope="module")
def plain_elements(tmp_path_factory):
    """What the card of a folder with harmless names renders to."""
    folder = folder_named(tmp_path_factory.mktemp("plain"), "harmless_name")
    return {name: Elements(render(body_of(make_card(folder, "me/x")))) for name, render in renderers().items()}


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_element_comes_from_a_name(name, tmp_path, plain_elements):
    card = make_card(folder_named(tmp_path, name), "me/x", license_name=name)
    metadata = yaml.safe_load(card.split("\n---\n")[0])
    assert set(metadata) <= {"library_name", "pipeline_tag", "tags", "license", "datasets", "model-index"}
    assert metadata["library_name"] == "diffusers"
    for renderer, render in renderers().items():
        page, plain = Elements(render(body_of(card))), plain_elements[renderer]
        without_spans = [[tag for tag in each.tags if tag != "code"] for each in (page, plain)]
        assert without_spans[0] == without_spans[1], renderer
        assert page.attributes == plain.attributes
        assert "\x1b" not in page.text
        if renderer == "markdown-it" and name.isprintable() and 0 < len(name.strip()) < 200:
            assert page.text.count(name) >= 9
        if name.strip():
            assert "1,000" in page.text


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_spans_and_blocks_show_what_they_hold(name):
    shown = Elements(markdown_it.MarkdownIt("commonmark").render(f"A {code_span(name)} z"))
    if name.strip() and name.isprintable() and len(name) < 200:
        assert shown.text.strip("\n") == f"A {name} z"
    assert set(shown.tags) <= {"p", "code"}
    block = Elements(markdown_it.MarkdownIt("commonmark").render(f"x\n\n{preformatted(name)}\n\ny"))
    assert block.tags == ["p", "pre", "code", "p"]


def test_plain_words_stay_plain():
    assert [inline_text(word) for word in ("cat", "Great Dane 2", "2.13.0", "a-b")] == [
        "cat",
        "Great Dane 2",
        "2.13.0",
        "a-b",
    ]
    assert [inline_text(word) for word in ("a_b", "a.b", "x@y", "-a", "a- b")] == [
        "`a_b`",
        "`a.b`",
        "`x@y`",
        "`-a`",
        "`a- b`",
    ]


@pytest.mark.parametrize("repo_id", ["me/<b>", "a\nb", 'x"); import os #', "", "a/b/c", "-x-"])
def test_an_id_that_no_repository_has_is_refused(repo_id, tmp_path):
    with pytest.raises(ConfigError, match="repository"):
        make_card(folder_named(tmp_path, "x"), repo_id)


def test_classes_and_their_images_are_listed(tmp_path):
    folder = folder_named(tmp_path, "Great Dane")
    assert "| Great Dane | 1,000 |\n| dog | 234 |" in make_card(folder, "me/x")
    folder_named(tmp_path, "Great Dane", classes=False)
    assert "| Great Dane |  |\n| cat |  |" in make_card(folder, "me/x")


def test_the_grid_of_a_card_names_its_classes(tmp_path):
    """The images stay as they are, for `verify`; a line of text stands under each."""
    grids, arrays = [], []
    for names in (None, {0: "cat", 1: "<b>\x1b[31m"}):
        unet = UNet2DModel(**tiny_unet(1).config | {"num_class_embeds": 3})
        unet.load_state_dict({name: tensor.fill_(0.01) for name, tensor in unet.state_dict().items()})
        folder = tmp_path / str(len(grids))
        DDPMExtPipeline(unet, DDPMExtScheduler(4), "adm", null_class_label=2, id2label=names).save_pretrained(folder)
        _add_card_and_proof(folder, "me/x", None, True)
        grids.append((folder / "card" / "samples.png").read_bytes())
        arrays.append(np.load(folder / "card" / "samples.npz")["images"])
    assert np.array_equal(*arrays)
    heights = [int.from_bytes(grid[20:24]) for grid in grids]
    assert heights[1] > heights[0]
    assert "| cat |  |" in (folder / "README.md").read_text()


def test_thousands_of_classes_do_not_fill_the_card(tmp_path):
    folder = folder_named(tmp_path, "x")
    environment = json.loads((folder / "environment.json").read_text())
    environment["data"]["classes"] = [{"name": f"class {i}", "images": i} for i in range(5000)]
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "config.yaml").write_text("seed: 1\n" + "# comment\n" * 50_000)
    card = make_card(folder, "me/x")
    assert "4,800 more classes" in card
    assert len(card) < 20_000


def test_a_full_chain_and_a_single_image(tmp_path):
    """evaluation.json then has the word `all` and no interval."""
    card = make_card(folder_named(tmp_path, "x"), "me/x")
    assert "| bits per dimension (chain of 20 steps), 1 images | 3.1000 |" in card


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("environment.json", "[]"),
        ("environment.json", '{"data": {"name": 5, "train": 1, "validation": 0}, "python": "3"}'),
        ("environment.json", '{"data": {"name": "x", "train": "many", "validation": 0}, "python": "3"}'),
        ("environment.json", '{"packages": [1], "python": "3"}'),
        ("environment.json", '{"packages": {}}'),
        ("environment.json", "{" * 20_000),
        ("evaluation/evaluation.json", '{"bits_per_dim": "three"}'),
        ("evaluation/evaluation.json", '{"bits_per_dim": NaN}'),
        ("evaluation/evaluation.json", '{"bits_per_dim": 3, "low": [], "high": 1}'),
        ("evaluation/evaluation.json", '{"bits_per_dim": 3, "chain_timesteps": [null]}'),
        ("evaluation/sample_metrics.json", '{"format": 1}'),
        ("evaluation/sample_metrics.json", '{"metrics": {"kid": {"value": "small"}}}'),
        ("metrics.jsonl", '{"step": "seven"}\n'),
        ("metrics.jsonl", '{"val/loss_simple": 1}\n'),
        ("metrics.jsonl", '{"step": 1e300}\n'),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"step": 7, "val/loss_simple": true}\n'),
        ("config.yaml", "a: [\n"),
        ("config.yaml", "a: \x00"),
        ("config.yaml", "# " + "x" * 2**21),
    ],
)
def test_what_is_unreadable_is_left_out_with_a_warning(file, content, tmp_path, capsys):
    folder = folder_named(tmp_path, "x")
    (folder / file).write_text(content)
    card = make_card(folder, "me/x")
    err = capsys.readouterr().err
    assert err.count("left out of the card") == err.count("\n") == 1, err
    assert file.split("/")[-1] in err
    assert "## Limits" in card


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    "content", [b"[]", b"\xff", b"{", b'{"id2label": 5, "sample_size": "big", "num_train_timesteps": []}']
)
def test_a_pipeline_that_cannot_be_read_has_no_card(file, content, tmp_path):
    folder = folder_named(tmp_path, "x")
    (folder / file).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(file.split("/")[-1])):
        make_card(folder, "me/x")


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        (None, True),
        (CARD_MARKER.encode(), True),
        (b"mine", False),
        (b"caf\xe9 mine", False),
        (b"\0", False),
        (b"", False),
    ],
)
def test_whose_card_it_is(content, ours, tmp_path):
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    assert may_replace_card(tmp_path) is ours


def test_datasets_of_a_mixture_are_named_and_none_stands_for_all(tmp_path):
    folder = folder_named(tmp_path, "harmless_name")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"dataset_name": ["user/a", "./local", "user/b"]}}))
    metadata = yaml.safe_load(make_card(folder, "me/x").split("\n---\n")[0])
    assert metadata["datasets"] == ["user/a", "user/b"]
    assert metadata["model-index"][0]["results"][0]["dataset"]["type"] == "images"
