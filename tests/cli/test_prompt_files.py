"""Files of prompts: what is a prompt, and one line for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusers_ddpm_ext.cli.prompt_files import PromptRow, read_prompts, with_negative
from diffusers_ddpm_ext.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return file


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("a cat\na dog\n", ["a cat", "a dog"]),
        ("a cat", ["a cat"]),
        ("\n a cat \n\n\t\n# one\n", ["a cat", "# one"]),  # blank lines are skipped, and there are no comments
        ("a cat\r\na dog\r\n", ["a cat", "a dog"]),
        ("\ufeffa cat\n", ["a cat"]),
        ("a cat, \u201cred\u201d\n\U0001f431\n", ["a cat, \u201cred\u201d", "\U0001f431"]),
        ("a\u2028b\nc\x0bd\n", ["a\u2028b", "c\x0bd"]),  # only \n ends a line
        ('{a cat}\n"a dog"\na {x} b\n', ["{a cat}", '"a dog"', "a {x} b"]),
    ],
)
def test_every_line_is_a_prompt(write, content, prompts):
    assert read_prompts(write("p.txt", content)) == tuple(map(PromptRow, prompts))
    assert read_prompts(write("p", content)) == read_prompts(write("P.TXT", content))


def test_objects_have_negative_prompts_and_seeds(write):
    rows = [{"prompt": "a cat"}, {"prompt": "", "negative_prompt": "", "seed": 0}, {"prompt": "b", "seed": 2**63 - 1}]
    content = "\n\n".join(map(json.dumps, rows)) + "\n"
    expected = (PromptRow("a cat"), PromptRow("", "", 0), PromptRow("b", None, 2**63 - 1))
    assert read_prompts(write("p.jsonl", content)) == expected


def test_negative_prompts_are_for_all_or_one_each():
    rows = (PromptRow("a"), PromptRow("b", "own", 3))
    assert with_negative(rows, None) == rows
    assert with_negative(rows, ["x"]) == (PromptRow("a", "x"), rows[1])
    assert with_negative(rows, ["x", "y"]) == (PromptRow("a", "x"), rows[1])
    with pytest.raises(ConfigError, match="3 texts for 2 prompts"):
        with_negative(rows, ["x", "y", "z"])


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("p.txt", "", "has no prompt"),
        ("p.txt", " \n\t\n", "has no prompt"),
        ("p.txt", b"\xff\xfea", "is not UTF-8"),
        ("p.txt", "a\0b", "NUL"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', "rename it to .jsonl"),
        ("p.json", "[]", "ends in .txt"),
        ("p.csv", "a\nb\n", "ends in .txt"),
        ("p.jsonl", "a cat\n", "line 1 is not JSON"),
        ("p.jsonl", '\n{"prompt": "a"}\n["b"]\n', "line 3 holds"),
        ("p.jsonl", '"a cat"\n', "not an object"),
        ("p.jsonl", "{}\n", "prompt is missing"),
        ("p.jsonl", '{"prompt": null}', "prompt is missing"),
        ("p.jsonl", '{"prompt": 3}', "prompt is 3; it must be a text"),
        ("p.jsonl", '{"prompt": ["a"]}', "it must be a text"),
        ("p.jsonl", '{"prompts": "a"}', "did you mean prompt?"),
        ("p.jsonl", '{"prompt": "a", "negativeprompt": "b"}', "did you mean negative_prompt?"),
        ("p.jsonl", '{"prompt": "a", "xyzzy": 1}', "the keys are prompt, negative_prompt, seed"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "seed is -1"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.0}', "seed is 1.0, not an integer"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "seed is true, not an integer"),
        ("p.jsonl", '{"prompt": "a", "seed": 9223372036854775808}', "seed is 9223372036854775808"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "twice"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "not valid Unicode"),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": 1}', "negative_prompt is 1"),
        ("p.jsonl", "[" * 70 + "]" * 70, "nested"),
    ],
)
def test_wrong_files(write, name, content, answer):
    path = write(name, content)
    with pytest.raises(ConfigError, match="--prompts") as caught:
        read_prompts(path)
    assert answer in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", ".", "a\0b", "x" * 300])
def test_what_is_no_file(tmp_path, name):
    with pytest.raises(ConfigError, match="--prompts"):
        read_prompts(tmp_path / name)
