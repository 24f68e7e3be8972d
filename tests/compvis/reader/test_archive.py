"""Checkpoint files: intact ones give what torch loads; damaged ones give one sentence, or what torch would load."""

from __future__ import annotations

import collections
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.hostile_pickles import corpus, torch_archive, torch_legacy
from helpers.paths import PYTHONPATH
from safetensors.torch import save_file

from diffusers_ddpm_ext.compvis.reader.archive import read_legacy, read_tensors, read_zip
from diffusers_ddpm_ext.compvis.reader.pickle_machine import GlobalName, StandIn, UnreadableCheckpoint
from diffusers_ddpm_ext.compvis.reader.storages import LazyTensor
from diffusers_ddpm_ext.compvis.reader.unpickle import unpickle

FORMATS = {"zip": True, "legacy": False}
READERS = {"zip": read_zip, "legacy": read_legacy}


class Callback:
    """In place of a class of Lightning, which is pickled by name."""


def state() -> dict[str, torch.Tensor]:
    """Tensors of every dtype; shared, sliced, transposed and empty ones."""
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    dtypes = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {name: torch.arange(7).to(getattr(torch, name)) for name in dtypes}
    shared = {"shared": base, "turned": base.t(), "cut": base[2:4, 1:9:3], "scalar": base[3, 3]}
    return tensors | shared | {"empty": torch.empty(0, 3), "weight": torch.randn(4, 3, 2, 2)}


def lightning() -> dict[object, object]:
    optimizer = {"state": {0: {"exp_avg": torch.randn(50), "step": 3}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {
        "state_dict": collections.OrderedDict(state()),
        "epoch": 3,
        "global_step": 70,
        "optimizer_states": [optimizer],
        "callbacks": {Callback: {"best": torch.tensor(0.5)}},
        "hyper_parameters": Callback(),
    }


def write(path: Path, content: object, kind: str) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


def same(tensors: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == truth.keys() and all(
        tensors[name].dtype == truth[name].dtype and torch.equal(tensors[name], truth[name]) for name in truth
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_all_that_torch_writes(kind, tmp_path):
    truth = state()
    path = write(tmp_path / "m.ckpt", truth, kind)
    assert same(read_tensors(path), torch.load(path, weights_only=True))
    parameters = {"w": torch.nn.Parameter(truth["weight"]), "b": torch.nn.Buffer(truth["shared"])}
    tensors = read_tensors(write(tmp_path / "p.ckpt", parameters, kind))
    assert torch.equal(tensors["w"], truth["weight"])
    assert torch.equal(tensors["b"], truth["shared"])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_lightning(kind, tmp_path):
    """Classes become names, and the optimizer's tensors are not loaded."""
    path = write(tmp_path / "m.ckpt", lightning(), kind)
    truth = torch.load(path, weights_only=False)
    assert same(read_tensors(path), dict(truth["state_dict"]))
    with path.open("rb") as file:
        content = READERS[kind](mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    assert (content["epoch"], content["global_step"]) == (3, 70)
    assert isinstance(content["optimizer_states"][0]["state"][0]["exp_avg"], LazyTensor)
    assert [str(key) for key in content["callbacks"]] == [f"{__name__}.Callback"[:40]]
    assert isinstance(next(iter(content["callbacks"])), GlobalName)
    assert isinstance(content["hyper_parameters"], StandIn)


def test_safetensors_and_shards(tmp_path):
    first, second = {"a": torch.randn(3)}, {"b": torch.randn(2, 2)}
    save_file(first, tmp_path / "one.safetensors")
    save_file(second, tmp_path / "two.safetensors")
    assert same(read_tensors(tmp_path / "one.safetensors"), first)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert same(read_tensors(index), first | second)
    renamed = tmp_path / "model.ckpt"
    renamed.write_bytes((tmp_path / "one.safetensors").read_bytes())
    assert same(read_tensors(renamed), first)
    for weight_map, message in (
        ({"a": "../one.safetensors"}, "outside"),
        ({"a": "three.safetensors"}, "missing"),
        ({"c": "one.safetensors"}, "lacks c"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UnreadableCheckpoint, match=message):
            read_tensors(index)


def deflated(folder: Path) -> bytes:
    path = write(folder / "z.ckpt", state(), "zip")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(folder / "d.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return (folder / "d.ckpt").read_bytes()


OTHERS = {
    "empty": (b"", "empty"),
    "a web page": (b"\n<!DOCTYPE html><html>not tensors</html>", "web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(64), "an image"),
    "YAML": (b"model:\n  target: x\n", "text file"),
    "noise": (random.Random(0).randbytes(5000), "encrypted or damaged"),
    "a tar file": (bytes(257) + b"ustar" + bytes(300), "torch 0.1"),
    "a plain pickle": (b"\x80\x02}.", "plain pickle"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "gzip"),
    "another zip": (b"PK\5\6" + bytes(18), "data.pkl"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_are_not_checkpoints(name, tmp_path):
    data, message = OTHERS[name]
    (tmp_path / "m.ckpt").write_bytes(data)
    with pytest.raises(UnreadableCheckpoint, match=message) as error:
        read_tensors(tmp_path / "m.ckpt")
    assert "\n" not in str(error.value)


def test_folders_compressed_members_and_pickled_objects_are_refused(tmp_path):
    with pytest.raises(UnreadableCheckpoint, match="folder"):
        read_tensors(tmp_path)
    (tmp_path / "m.ckpt").write_bytes(deflated(tmp_path))
    with pytest.raises(UnreadableCheckpoint, match="compressed"):
        read_tensors(tmp_path / "m.ckpt")
    data = bytearray(write(tmp_path / "e.ckpt", state(), "zip").read_bytes())
    entry = data.find(b"PK\1\2")
    data[entry + 8] |= 1
    (tmp_path / "e.ckpt").write_bytes(data)
    with pytest.raises(UnreadableCheckpoint, match="encrypted"):
        read_tensors(tmp_path / "e.ckpt")
    with pytest.raises(UnreadableCheckpoint, match="pickled object"):
        read_tensors(write(tmp_path / "o.ckpt", Callback(), "zip"))
    with pytest.raises(UnreadableCheckpoint, match="without a name"):
        read_tensors(write(tmp_path / "t.ckpt", torch.zeros(3), "zip"))
    with pytest.raises(UnreadableCheckpoint, match="no dictionary of tensors"):
        read_tensors(write(tmp_path / "n.ckpt", {"epoch": 1}, "zip"))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_truncation_is_refused(kind, tmp_path):
    data = write(tmp_path / "m.ckpt", {"a": torch.randn(100), "b": torch.randn(9)}, kind).read_bytes()
    for size in {*range(0, len(data), max(1, len(data) // 150)), len(data) - 1}:
        (tmp_path / "m.ckpt").write_bytes(data[:size])
        with pytest.raises(UnreadableCheckpoint):
            read_tensors(tmp_path / "m.ckpt")


def mutate(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        place = draw.randrange(len(changed))
        match draw.randrange(4):
            case 0:
                changed[place] ^= 1 << draw.randrange(8)
            case 1:
                changed[place] = draw.randrange(256)
            case 2:
                del changed[place : place + draw.randrange(1, 9)]
            case _:
                changed[place:place] = draw.randbytes(draw.randrange(1, 9))
    return bytes(changed)


def attempt(path: Path) -> tuple[dict[str, torch.Tensor] | None, str]:
    """The tensors of a file, or the refusal. Any other exception fails the test."""
    try:
        return read_tensors(path), ""
    except UnreadableCheckpoint as error:
        return None, str(error)


def test_five_hundred_mutations_of_a_zip_file(tmp_path):
    """One sentence, or the correct values, never others."""
    draw = random.Random(1)
    data = write(tmp_path / "m.ckpt", lightning(), "zip").read_bytes()
    truth = read_tensors(tmp_path / "m.ckpt")
    refused = 0
    for _ in range(500):
        path = tmp_path / "x.ckpt"
        path.write_bytes(mutate(data, draw))
        tensors, refusal = attempt(path)
        assert tensors is None or same(tensors, truth)
        assert "\n" not in refusal
        refused += tensors is None
    assert refused > 300


@pytest.mark.parametrize("kind", ["legacy", "safetensors"])
def test_five_hundred_mutations_without_checksums(kind, tmp_path):
    """One sentence, or any tensors: these formats have no checksums of the tensors."""
    draw = random.Random(2)
    path = tmp_path / "m.ckpt"
    if kind == "legacy":
        data = write(path, lightning(), kind).read_bytes()
    else:
        save_file({name: tensor.clone().contiguous() for name, tensor in state().items()}, path)
        data = path.read_bytes()
    refused = 0
    for _ in range(500):
        path.write_bytes(mutate(data, draw))
        tensors, refusal = attempt(path)
        assert tensors is None or all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        assert "\n" not in refusal
        refused += tensors is None
    assert refused > 100


HOSTILE = """
    import resource, sys, time
    from pathlib import Path
    from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
    from diffusers_ddpm_ext.compvis.reader.pickle_machine import UnreadableCheckpoint
    from compvis.reader.test_archive import hostile_files
    marks, place = Path(sys.argv[1]), Path(sys.argv[2])
    files = hostile_files(marks, place)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for name, data in files:
        path = place / "x.ckpt"
        path.write_bytes(data)
        before, began = peak(), time.monotonic()
        try:
            read_tensors(path)
            print("READ", name)
        except UnreadableCheckpoint as error:
            assert "\\n" not in str(error), name
        assert time.monotonic() - began < 10, name
        assert peak() - before <= 2 * len(data) + 64 * 2**20, (name, (peak() - before) / 2**20)
    print("files", len(files))
    """


def stride_zero() -> bytes:
    """A tensor of a million entries over a storage of one."""
    import io

    file = io.BytesIO()
    torch.save({"a": torch.zeros(1).expand(10**6)}, file)
    return file.getvalue()


def bombs() -> list[tuple[str, bytes]]:
    """Pickles that would use time or memory rather than run something."""
    doubling = b"\x80\x02]" + b"q\x00" + b"".join(b"](h%ch%ce" % (i, i) + b"q%c" % (i + 1) for i in range(60)) + b"."
    nest = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    tuples = b"\x80\x02)" + b"".join(b"q%c" % i + b"h%ch%c\x86" % (i, i) for i in range(60)) + b"K\x01}"
    return [
        ("LONG_BINPUT", b"\x80\x02Nr\xff\xff\xff\x7f."),
        ("doubled lists", doubling),
        ("nested lists", nest),
        ("tuples as keys", b"\x80\x02}" + tuples[3:-3] + b"K\x01s."),
        ("many objects", b"\x80\x02" + b"}\x94" * 3_000_000 + b"."),
        ("many instructions", b"\x80\x02" + b"N0" * 4_000_000 + b"N."),
        (
            "wide text",
            b"\x80\x02X" + (20 * 2**20).to_bytes(4, "little") + b"a" * (20 * 2**20 - 4) + "😀".encode() + b".",
        ),
        ("promised bytes", b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"."),
        ("long number", b"\x80\x02L" + b"9" * 4000 + b"L\n."),
    ]


def hostile_files(marks: Path, place: Path) -> list[tuple[str, bytes]]:
    """Every hostile pickle: bare, as the pickle of a zip file, and as that of an old file."""
    tensors = []
    pickles = [(hostile.name, hostile.data) for hostile in corpus(marks)] + bombs()
    for name, data in pickles:
        tensors += [(name, data), (f"{name} in a zip", torch_archive(data)), (f"{name}, old", torch_legacy(data))]
    return [*tensors, ("stride 0", stride_zero()), ("deflated", deflated(place))]


def test_the_hostile_corpus(tmp_path):
    """Nothing runs, nothing hangs, and memory stays within twice the file size plus 64 MiB."""
    marks, place = tmp_path / "marks", tmp_path / "place"
    marks.mkdir()
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(HOSTILE), str(marks), str(place)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(marks.iterdir()) == [], "something ran"
    assert f"files {3 * (60 + len(bombs())) + 2}" in done.stdout
    read = [line for line in done.stdout.splitlines() if line.startswith("READ")]
    assert read == ["READ pickle_in_safetensors"], "a valid safetensors file, whose pickle is never read"


def test_overlapping_members_are_refused(tmp_path):
    """A small file whose directory lists the same large member many times."""
    data = write(tmp_path / "m.ckpt", {"a": torch.zeros(10**6)}, "zip").read_bytes()
    end = data.rfind(b"PK\5\6")
    count, size, offset = struct.unpack_from("<HLL", data, end + 10)
    table = data[offset : offset + size]
    start = table.find(b"PK\1\2", table.find(b"/data.pkl"))
    large = next(i for i in range(len(table)) if table[i : i + 4] == b"PK\1\2" and b"/data/0" in table[i : i + 90])
    entry = table[large : large + 46 + sum(struct.unpack_from("<HHH", table, large + 28))]
    copies = b"".join(entry.replace(b"/data/0", b"/data/%c" % (97 + i)) for i in range(20))
    more = struct.pack("<HHLLH", count + 20, count + 20, size + len(copies), offset, 0)
    (tmp_path / "m.ckpt").write_bytes(data[:offset] + table + copies + b"PK\5\6" + bytes(4) + more)
    assert start
    with pytest.raises(UnreadableCheckpoint, match="overlap each other"):
        read_tensors(tmp_path / "m.ckpt")


def test_globals_cannot_be_changed():
    """BUILD and SETITEM on what a file names."""
    for tail in (b"}U\x01aK\x01sb.", b"K\x01K\x02s."):
        with pytest.raises(UnreadableCheckpoint):
            unpickle(b"\x80\x02cos\nenviron\n" + tail)


def test_a_tensor_larger_than_its_storage(tmp_path):
    (tmp_path / "m.ckpt").write_bytes(stride_zero())
    with pytest.raises(UnreadableCheckpoint, match="larger than its storage"):
        read_tensors(tmp_path / "m.ckpt")


@pytest.mark.slow
def test_four_gigabytes_are_mapped(tmp_path):
    """Reading a few values of a sparse 4 GB file uses hardly any memory."""
    script = """
        import resource, sys, torch
        from diffusers_ddpm_ext.compvis.reader.archive import read_tensors
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tensors = read_tensors(sys.argv[1])
        total = float(tensors["a"][:5].sum())
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(total, grown, tensors["a"].numel())
        """
    path = tmp_path / "big.safetensors"
    count = 2**30
    header = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * count)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], capture_output=True, text=True, check=True
    )
    total, grown, numel = map(float, done.stdout.split())
    assert (total, numel) == (0, count)
    assert grown < 64
