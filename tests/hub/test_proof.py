"""A proof describes a closed world: whatever else is in the folder is a finding, and nothing of it is opened."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.pushed_folders import save_pushed_folder

from diffusers_ddpm_ext import cli
from diffusers_ddpm_ext.hub.proof import read_proof, write_proof
from diffusers_ddpm_ext.hub.upload import PUSH_RECORD


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a push brings to the Hub, in a folder, with its card's images."""
    return save_pushed_folder(tmp_path_factory.mktemp("pushed") / "digits", 20)


@pytest.fixture
def pushed(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "digits"))


def verify(folder, capsys):
    status = cli.main(["verify", str(folder)])
    out = capsys.readouterr()
    assert out.err.count("\n") == (status != 0)
    return status, out.out + out.err


def shard(folder: Path) -> None:
    """An index with a shard of other weights, which Diffusers prefers."""
    unet, weights = folder / "unet", "diffusion_pytorch_model-00001-of-00001.safetensors"
    shutil.copy(unet / "diffusion_pytorch_model.safetensors", unet / weights)
    index = {"metadata": {}, "weight_map": {"conv_in.weight": weights}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def file(name: str, content: bytes = b"x"):
    def add(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    add.__name__ = name
    return add


def link(name: str, target: str):
    def add(folder: Path) -> None:
        (folder / name).symlink_to(target)

    add.__name__ = f"{name} to {target}"
    return add


def moved_behind_link(name: str):
    def change(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    change.__name__ = f"{name} behind a link"
    return change


def other_index(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["evil", "Network"]}))


CHANGES = [
    (shard, "index.json"),
    (file("logvar/diffusion_pytorch_model.safetensors"), "logvar/diffusion_pytorch_model.safetensors"),
    (file("pipeline.py", b"print('executed')"), "pipeline.py"),
    (file("unet/model.py"), "unet/model.py"),
    (file("unet/diffusion_pytorch_model.bin"), "unet/diffusion_pytorch_model.bin"),
    (file("unet/diffusion_pytorch_model.fp16.safetensors"), "fp16.safetensors"),
    (file("vae/config.json", b"{}"), "vae/config.json"),
    (file("class_embedder/config.json", b"{}"), "class_embedder/config.json"),
    (file("best/model_index.json", b"{}"), "best/model_index.json"),
    (file("checkpoint-9/manifest.json", b"{}"), "checkpoint-9/manifest.json"),
    (file("scheduler/scheduler_config.json.bak"), "scheduler_config.json.bak"),
    (file("unet/.gitattributes"), "unet/.gitattributes"),
    (file(".hidden"), ".hidden"),
    (file(".cache/torch/model.pt"), ".cache/torch/model.pt"),
    (file("requirements.txt"), "requirements.txt"),
    (lambda folder: (folder / "text_encoder").mkdir(), "text_encoder/"),
    (lambda folder: os.mkfifo(folder / "unet" / "pipe"), "not a regular file: unet/pipe"),
    (link("more", "unet"), "a link: more"),
    (link("unet/loop", "loop"), "a link: unet/loop"),
    (link("again", ".."), "a link: again"),
    (link("raw.safetensors", "unet/diffusion_pytorch_model.safetensors"), "a link: raw.safetensors"),
    (moved_behind_link("unet/diffusion_pytorch_model.safetensors"), "a link: unet/diffusion_pytorch_model.safe"),
    (moved_behind_link("unet"), "a link: unet"),
    (moved_behind_link("proof.json"), "proof.json is a link"),
    (moved_behind_link("card/samples.npz"), "a link: card/samples.npz"),
    (other_index, "model_index.json has"),
    (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
    (file("README.md", b"another card"), "README.md has 12 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "finding"), CHANGES, ids=[getattr(c, "__name__", "") for c, _ in CHANGES])
def test_whatever_the_proof_does_not_name_is_a_finding(change, finding, pushed, capsys, monkeypatch):
    import diffusers_ddpm_ext.cli.verify as command

    def opened(*arguments):
        raise AssertionError("a changed folder was opened")

    monkeypatch.setattr(command, "load_pipeline", opened)
    change(pushed)
    status, text = verify(pushed, capsys)
    assert status == (2 if "no model_index.json" in finding else 1), text
    assert finding in text


def test_what_may_stand_beside_it(pushed, capsys):
    """What the Hub, Git and the Hub's client add by themselves, and what they call so elsewhere is a finding."""
    for name in (
        ".gitattributes",
        ".git/config",
        ".git/objects/ab/cd",
        ".cache/huggingface/download/README.md.metadata",
    ):
        file(name)(pushed)
    status, text = verify(pushed, capsys)
    assert status == 0, text
    assert "agree in 100.00%" in text


def test_the_run_that_was_pushed_has_more(pushed, capsys):
    """Checkpoints and logs, which the message names; but nothing that the pipeline opens."""
    for name in (PUSH_RECORD, "checkpoint-7/state.json", "logs/events", "best/model_index.json", ".run.lock"):
        file(name)(pushed)
    status, text = verify(pushed, capsys)
    assert status == 0, text
    assert "not checked: .hub.json, .run.lock, best, checkpoint-7, logs" in text
    file("unet/diffusion_pytorch_model.bin")(pushed)
    assert verify(pushed, capsys)[0] == 1


def test_a_snapshot_in_the_cache_of_the_hubs_client(pushed, tmp_path, capsys):
    """Its files are links to blobs of the same repository; a link to anything else is a finding."""
    repo = tmp_path / "models--alice--digits"
    snapshot = repo / "snapshots" / "0123abc"
    for path in [path for path in pushed.rglob("*") if path.is_file()]:
        name = path.relative_to(pushed)
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        if name.name == "proof.json":
            shutil.copy(path, snapshot / name)
        else:
            (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    status, text = verify(snapshot, capsys)
    assert status == 0, text
    shutil.copy(snapshot / "metrics.jsonl", tmp_path / "elsewhere")
    (snapshot / "metrics.jsonl").unlink()
    (snapshot / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    assert "a link: metrics.jsonl" in verify(snapshot, capsys)[1]


def sealed(folder: Path, **changes) -> None:
    """A forged proof with a right seal; a change to `...` removes the key."""
    proof = json.loads((folder / "proof.json").read_text()) | changes
    proof = {key: value for key, value in proof.items() if key != "sha256" and value is not ...}
    seal = hashlib.sha256((json.dumps(proof, indent=1, sort_keys=True) + "\n").encode()).hexdigest()
    (folder / "proof.json").write_text(json.dumps(proof | {"sha256": seal}, indent=1, sort_keys=True) + "\n")


DRAWN = {"count": 9, "seed": 0, "num_inference_steps": 20}
ENTRY = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"images": DRAWN | {"count": 10**9}},
        {"images": DRAWN | {"count": -1}},
        {"images": DRAWN | {"count": 9.0}},
        {"images": DRAWN | {"count": True}},
        {"images": DRAWN | {"count": None}},
        {"images": DRAWN | {"num_inference_steps": 10**12}},
        {"images": DRAWN | {"num_inference_steps": 21}},
        {"images": DRAWN | {"num_inference_steps": "20"}},
        {"images": DRAWN | {"seed": -1}},
        {"images": DRAWN | {"seed": 2**70}},
        {"images": {}},
        {"images": [9, 0, 20]},
        {"images": "nine"},
        {"images": None},
        {"files": []},
        {"files": {}},
        {"files": {"a": None}},
        {"files": {"a": {"size": 1}}},
        {"files": {"a": {"size": "1", "sha256": "0" * 64}}},
        {"files": {"a": {"size": 1, "sha256": "x"}}},
        {"files": {"../../etc/passwd": ENTRY}},
        {"files": {"/etc/passwd": ENTRY}},
        {"files": {"a//b": ENTRY}},
        {"files": {"a\0b": ENTRY}},
        {"files": {"\ud800": ENTRY}},
        {"files": {"n" * 300: ENTRY}},
        {"format": 2},
        {"format": "1"},
        {"format": None},
        {"format": ...},
        {"files": ...},
        {"images": ...},
        {"deep": json.loads("[" * 90 + "]" * 90)},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_forged_proof_is_one_sentence(changes, pushed, capsys):
    sealed(pushed, **changes)
    status, text = verify(pushed, capsys)
    assert status == 1, text
    assert text.startswith(f"error: {pushed}: ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 20_000, b'{"sha256": NaN}', b'{"a": 1, "a": 2}',
     b'{"format": ' + b"9" * 5000 + b"}", b"0" * (17 * 2**20)],
    ids=range(11),
)  # fmt: skip
def test_a_proof_that_is_none(content, pushed, capsys):
    (pushed / "proof.json").write_bytes(content)
    status, text = verify(pushed, capsys)
    assert status == 1, text
    assert "proof.json" in text


@pytest.mark.parametrize("steps", [10**9, 10**18, 0, -5, "many", 2.5])
def test_a_chain_of_absurd_length_is_refused_before_its_tables_are_made(steps, pushed, capsys):
    """Stock Diffusers would make them first: 20 GB."""
    config = pushed / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": steps}))
    write_proof(pushed, read_proof(pushed)["images"])
    status, text = verify(pushed, capsys)
    assert status == 1, text
    assert "num_train_timesteps is" in text


def archive(array: np.ndarray | bytes, name: str = "images.npy", repeat: int = 1) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file, file.open(name, "w") as member:
        if isinstance(array, bytes):
            for _ in range(repeat):
                member.write(array)
        else:
            np.lib.format.write_array(member, array)
    return content.getvalue()


HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }"


@pytest.mark.parametrize(
    "content",
    [
        archive(np.zeros((9, 2048, 2048, 1), np.uint8)),
        archive(bytes(2**20), repeat=300),
        archive(HEADER.ljust(127) + b"\n" + bytes(99)),
        archive(np.zeros((9, 8, 8, 1), np.float32)),
        archive(np.zeros((8, 8, 8, 1), np.uint8)),
        archive(np.zeros((9, 8, 8), np.uint8)),
        archive(np.zeros((9, 8, 8, 1), np.uint8), "pictures.npy"),
        archive(np.zeros((9, 8, 8, 1), np.uint8))[:-30],
        b"PK\x03\x04",
        b"",
    ],
    ids=range(10),
)
def test_images_that_are_none(content, pushed, capsys):
    (pushed / "card" / "samples.npz").write_bytes(content)
    write_proof(pushed, read_proof(pushed)["images"])
    status, text = verify(pushed, capsys)
    assert status == 1, text
    assert "card/samples.npz" in text


def test_thousands_of_added_files_are_counted(pushed, capsys):
    for index in range(3000):
        (pushed / f"{index:04}.txt").touch()
    (pushed / "red\x1b[31m.txt").touch()
    status, text = verify(pushed, capsys)
    assert status == 1
    assert "0007.txt and 2,992 more" in text
    assert "its name has control characters: red\\x1b[31m.txt" in text
    assert len(text) < 1500
