"""Checkpoint folders are complete or absent, damage is named, and folders are moved aside, cleaned and pruned."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers.checkpoint_cases import CONTENT, fill, names, run_script
from helpers.paths import ROOT

from diffusers_ddpm_ext.training.checkpoints import manifest
from diffusers_ddpm_ext.training.checkpoints.folders import (
    SearchResult,
    list_checkpoints,
    move_aside,
    move_newer_aside,
    newest,
    prune_checkpoints,
    remove_leftovers,
)
from diffusers_ddpm_ext.training.checkpoints.manifest import (
    DamagedCheckpoint,
    NewerCheckpointFormat,
    add_checksum,
    read_manifest,
    verify,
)
from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint
from diffusers_ddpm_ext.utils import files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with checkpoints of steps 4, 8 and 12."""
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, step, fill)
    return tmp_path


# ---- writing and reading back


def test_round_trip(tmp_path):
    path = write_checkpoint(tmp_path, 40, fill)
    assert path == tmp_path / "checkpoint-40"
    assert names(tmp_path) == ["checkpoint-40"]
    checkpoint = verify(path)
    assert (checkpoint.path, checkpoint.step) == (path, 40)
    assert {name: (path / name).read_bytes() for name in checkpoint.files} == CONTENT


def test_manifest_agrees_with_other_tools(tmp_path):
    """Sizes from the file system, checksums from hashlib; the manifest's own checksum from the raw file."""
    path = write_checkpoint(tmp_path, 40, fill)
    raw = (path / "manifest.json").read_bytes()
    content = json.loads(raw)
    assert content["format"] == manifest.MANIFEST_FORMAT == 1
    assert content["facts"] == {}
    assert content["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in CONTENT.items()
    }
    assert content["sha256"] == hashlib.sha256(raw.split(b"\n", 2)[2]).hexdigest()
    assert list(content) == ["sha256", "format", "version", "step", "facts", "files"]
    assert {path.stat().st_size for path in path.iterdir() if path.name == "state.json"} == {12}


def test_a_checkpoint_opens_under_another_name(run):
    shutil.copytree(run / "checkpoint-8", run / "the-good-one")
    assert verify(run / "the-good-one").step == 8


def test_a_copy_under_the_name_of_another_step_is_refused(run):
    shutil.copytree(run / "checkpoint-8", run / "checkpoint-9")
    with pytest.raises(DamagedCheckpoint, match="checkpoint-9 contains step 8"):
        verify(run / "checkpoint-9")


def test_everything_is_synced_before_the_final_name(tmp_path, monkeypatch):
    """A power failure keeps only what was synced: each file and folder, then the name, then its folder."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    write_checkpoint(tmp_path, 4, fill)
    rename_index = events.index(("rename", str(tmp_path / "checkpoint-4")))
    synced = [Path(name).relative_to(tmp_path).parts[1:] for _, name in events[:rename_index]]
    assert {"/".join(parts) for parts in synced} == {*CONTENT, "manifest.json", "unet", ""}
    assert synced.index(("manifest.json",)) > max(synced.index(tuple(name.split("/"))) for name in CONTENT)
    assert events[rename_index + 1 :] == [("sync", str(tmp_path))]


@pytest.mark.parametrize("exchange", [True, False])
def test_writing_the_same_step_again_replaces_it(run, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    write_checkpoint(run, 12, lambda folder: fill(folder, {"new.json": b"{}"}))
    assert list(verify(run / "checkpoint-12").files) == ["new.json"]
    assert names(run) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_fill_may_not_write_a_manifest_or_a_link(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json is reserved"):
        write_checkpoint(tmp_path, 4, lambda folder: fill(folder, {"manifest.json": b"{}"}))
    with pytest.raises(ValueError, match="link is neither a regular file"):
        write_checkpoint(tmp_path, 4, lambda folder: (folder / "link").symlink_to("/etc/hostname"))
    with pytest.raises(ValueError, match="step -1"):
        write_checkpoint(tmp_path, -1, fill)
    assert names(tmp_path) == []


# ---- damage


def reseal(path: Path, **changes: object) -> None:
    """Write a changed manifest with a correct checksum, as anybody who knows the format can."""
    content = json.loads((path / "manifest.json").read_bytes())
    content.pop("sha256")
    (path / "manifest.json").write_bytes(add_checksum(json.dumps(content | changes, indent=1).encode()))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replace_with(path: Path, make) -> None:
    path.unlink()
    make(path)


DAMAGE = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
    "empty manifest": (
        lambda p: (p / "manifest.json").write_bytes(b""),
        r"manifest\.json does not match its own sha256",
    ),
    "a bit in the manifest": (
        lambda p: flip_bit(p / "manifest.json"),
        r"manifest\.json does not match its own sha256",
    ),
    "no JSON": (lambda p: (p / "manifest.json").write_bytes(add_checksum(b"{\n x")), r"manifest\.json is not JSON"),
    "deep JSON": (
        lambda p: (p / "manifest.json").write_bytes(add_checksum(b'{\n"a": ' + b"[" * 100_000)),
        r"manifest\.json is not JSON",
    ),
    "no format": (lambda p: reseal(p, format="1"), "has no format number"),
    "no step": (lambda p: reseal(p, step=True), "lacks a step"),
    "no files": (lambda p: reseal(p, files=[]), "lacks a step, files or facts"),
    "no size": (lambda p: reseal(p, files={"state.json": {"sha256": ""}}), r"no size and sha256 for state\.json"),
    "file missing": (lambda p: (p / "state.json").unlink(), r"state\.json is missing"),
    "folder missing": (lambda p: shutil.rmtree(p / "unet"), r"unet/model\.safetensors is missing"),
    "longer": (lambda p: (p / "state.json").write_bytes(b"x" * 13), r"state\.json has 13 bytes, more than the 12"),
    "shorter": (lambda p: os.truncate(p / "state.json", 3), r"state\.json has 3 bytes and should have 12"),
    "a bit": (lambda p: flip_bit(p / "optimizer.safetensors"), r"the sha256 of optimizer\.safetensors is not"),
    "link to a file": (
        lambda p: replace_with(p / "state.json", lambda path: path.symlink_to(p / "optimizer.safetensors")),
        r"state\.json is a symbolic link",
    ),
    "link to a folder": (
        lambda p: (shutil.move(p / "unet", p.parent / "elsewhere"), (p / "unet").symlink_to(p.parent / "elsewhere")),
        "unet is a symbolic link",
    ),
    "a folder": (lambda p: replace_with(p / "state.json", Path.mkdir), r"state\.json is not a regular file"),
    "a pipe": (lambda p: replace_with(p / "state.json", os.mkfifo), r"state\.json is not a regular file"),
    "manifest a link": (
        lambda p: replace_with(p / "manifest.json", lambda path: path.symlink_to("state.json")),
        r"manifest\.json is a symbolic link",
    ),
    "not a folder": (lambda p: (shutil.rmtree(p), p.write_bytes(b"")), "checkpoint-12 is not a folder"),
    "link to nothing": (lambda p: (shutil.rmtree(p), p.symlink_to("nothing")), "checkpoint-12 is not a folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_older_checkpoint_found(run, kind):
    damage, message = DAMAGE[kind]
    damage(run / "checkpoint-12")
    with pytest.raises(DamagedCheckpoint, match=message) as caught:
        verify(run / "checkpoint-12")
    assert "\n" not in str(caught.value)
    result = newest(run)
    assert result.checkpoint is not None
    assert result.checkpoint.path == run / "checkpoint-8"
    assert result.damaged == [(run / "checkpoint-12", str(caught.value))]
    aside = move_aside(*result.damaged[0])
    assert newest(run).damaged == []
    assert (run / "aside-checkpoint-12.txt").read_text() == f"{caught.value}\n"
    assert os.path.lexists(aside)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../x", "", ".", "a//b", "a\\b", "a\0b", "a\nb", "manifest.json"]
)
def test_names_outside_the_folder_are_refused(run, name):
    (run / "secret").write_bytes(b"x")
    reseal(run / "checkpoint-12", files={name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}})
    with pytest.raises(DamagedCheckpoint, match="not a name of a file in it"):
        verify(run / "checkpoint-12")


def test_a_newer_format_is_neither_read_nor_ignored(run):
    """Its content may mean something else; moving it aside or resuming without it would lose work."""
    reseal(run / "checkpoint-12", format=2, version="3.1", files="elsewhere")
    with pytest.raises(
        NewerCheckpointFormat, match=r"format 2 .* reads format 1: install diffusers-ddpm-ext 3\.1 or newer"
    ):
        newest(run)


def test_files_missing_from_the_manifest_are_never_opened(run, monkeypatch):
    path = run / "checkpoint-12"
    (path / "random_states_0.pkl").write_bytes(b"x")
    (path / "notes").mkdir()
    (path / "notes" / "mine.txt").write_text("good one")
    (path / "link").symlink_to("notes")
    opened = []
    open_ = os.open
    monkeypatch.setattr(os, "open", lambda p, *rest: opened.append(Path(p).name) or open_(p, *rest))
    assert verify(path).files.keys() == CONTENT.keys()
    assert set(opened) == {"manifest.json", *(Path(name).name for name in CONTENT)}


def test_no_permission_is_not_damage(run, monkeypatch):
    """An intact checkpoint that this user cannot open now is not reported as damaged."""

    def refuse(path: Path, *rest: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        newest(run)


def test_random_faults_are_found_and_named(tmp_path):
    """A short run of benchmarks/torture/faults.py."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "torture"))
    try:
        import faults
    finally:
        sys.path.pop(0)
    tally = faults.torture(tmp_path, count=200, seed=0)
    assert tally.silent == []
    assert tally.unnamed == []
    assert tally.faults == 200


# ---- listing, moving aside, cleaning, pruning


def test_only_names_with_a_step_are_checkpoints(tmp_path):
    others = ["checkpoint-", "checkpoint-04", "checkpoint-4x", "xcheckpoint-4", "checkpoint--4", "checkpoint-٤",
              "aside-checkpoint-4", ".writing-4-00000000", "checkpoint-4.tmp"]  # fmt: skip
    for name in (*others, "checkpoint-10", "checkpoint-9", "checkpoint-0"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0", "checkpoint-9", "checkpoint-10"]
    assert list_checkpoints(tmp_path / "nothing") == []
    assert newest(tmp_path / "nothing") == SearchResult(None, [])


def test_moving_aside_never_overwrites(run):
    moved = {}
    for turn in range(3):
        write_checkpoint(run, 12, lambda folder, turn=turn: fill(folder, {"turn": b"%d" % turn}))
        moved[move_aside(run / "checkpoint-12", "one sentence.").name] = b"%d" % turn
    assert {name: (run / name / "turn").read_bytes() for name in moved} == moved
    assert list(moved) == ["aside-checkpoint-12", "aside-checkpoint-12-2", "aside-checkpoint-12-3"]


def test_resuming_from_an_older_step_moves_the_newer_aside(run):
    assert [path.name for path in move_newer_aside(run, 4)] == ["aside-checkpoint-12", "aside-checkpoint-8"]
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-4"]
    assert (run / "aside-checkpoint-8.txt").read_text() == "The run resumed from step 4.\n"
    assert verify(run / "aside-checkpoint-8").step == 8


def test_moving_aside_in_a_read_only_folder_is_refused(run, monkeypatch):
    def refuse(*names: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(
        OSError, match=r"checkpoint-12 cannot be moved aside \(Read-only file system\): make .* writable"
    ):
        move_aside(run / "checkpoint-12", "torn")


def test_only_leftovers_are_removed(run):
    for name in (".writing-16-0123abcd", ".deleting-2-0123abcd", ".replaced-12-0123abcd"):
        shutil.copytree(run / "checkpoint-12", run / name)
    shutil.copytree(run / "checkpoint-12", run / ".replaced-14-0123abcd")  # its successor was never renamed
    others = {".writing-mine", ".deleting-2-0123abcd.zip", ".saving-x", "samples", "aside-checkpoint-2"}
    for name in others:
        (run / name).mkdir()
    removed = remove_leftovers(run)
    assert [path.name for path in removed] == [".deleting-2-0123abcd", ".replaced-12-0123abcd", ".writing-16-0123abcd"]
    assert set(names(run)) == others | {f"checkpoint-{step}" for step in (4, 8, 12, 14)}


def test_pruning_deletes_the_oldest_and_only_ours(run):
    write_checkpoint(run, 16, fill)
    (run / "checkpoint-2").mkdir()
    (run / "checkpoint-2" / "random_states_0.pkl").write_bytes(b"from another program")
    assert [path.name for path in prune_checkpoints(run, 2, keep=[4])] == ["checkpoint-8"]
    assert [path.name for path in prune_checkpoints(run, 1)] == ["checkpoint-4", "checkpoint-12"]
    assert names(run) == ["checkpoint-16", "checkpoint-2"]
    with pytest.raises(ValueError, match="total_limit 0"):
        prune_checkpoints(run, 0)


def test_folders_and_manifest_import_no_torch():
    modules = ("folders", "manifest", "run_folder", "output_dir", "writer")
    lines = "\n".join(f"import diffusers_ddpm_ext.training.checkpoints.{module}" for module in modules)
    result = run_script(f"{lines}\nimport sys\nassert not {{'torch', 'diffusers', 'pickle'}} & set(sys.modules)\n")
    assert result.returncode == 0, result.stderr


def test_the_manifest_can_be_read_alone(run):
    checkpoint = read_manifest(run / "checkpoint-8")
    flip_bit(run / "checkpoint-8" / "optimizer.safetensors")
    assert read_manifest(run / "checkpoint-8") == checkpoint
