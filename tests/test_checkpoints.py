"""Checkpoint folders exist or do not, say what is wrong with them, and survive whatever ends a process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from safetensors import SafetensorError

from diffusers_ddpm_ext.training import checkpoints, manifest
from diffusers_ddpm_ext.training.checkpoints import (
    CheckpointNotWritten,
    clean_leftovers,
    list_checkpoints,
    newest,
    prune,
    set_aside,
    set_aside_newer,
    write_checkpoint,
)
from diffusers_ddpm_ext.training.manifest import DamagedCheckpoint, NewerCheckpoint, read_manifest, seal, verify

ROOT = Path(__file__).parents[1]
CONTENT = {"optimizer.safetensors": b"o" * 3000, "state.json": b'{"epoch": 2}', "unet/model.safetensors": b"u" * 900}


def fill(folder: Path, content: dict[str, bytes] = CONTENT) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process of its own, with this repository on its path."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with checkpoints of steps 4, 8 and 12."""
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, step, fill, {"seed": 7})
    return tmp_path


# ---- what is written is what is read


def test_round_trip(tmp_path):
    path = write_checkpoint(tmp_path, 40, fill, {"world_size": 2, "model": "ä"})
    assert path == tmp_path / "checkpoint-40"
    assert names(tmp_path) == ["checkpoint-40"]
    found = verify(path)
    assert (found.step, found.facts, found.unnamed) == (40, {"world_size": 2, "model": "ä"}, ())
    assert {name: found.read(name) for name in found.files} == CONTENT


def test_the_manifest_says_what_other_tools_say(tmp_path):
    """Sizes and sums by the file system and by hashlib; the seal by a plain reading of the file."""
    path = write_checkpoint(tmp_path, 40, fill)
    raw = (path / "manifest.json").read_bytes()
    said = json.loads(raw)
    assert said["format"] == 1
    assert said["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in CONTENT.items()
    }
    assert said["sha256"] == hashlib.sha256(raw.split(b"\n", 2)[2]).hexdigest()
    assert list(said) == ["sha256", "format", "version", "step", "facts", "files"]
    assert {path.stat().st_size for path in path.iterdir() if path.name == "state.json"} == {12}


def test_a_checkpoint_opens_under_another_name(run):
    shutil.copytree(run / "checkpoint-8", run / "the-good-one")
    assert verify(run / "the-good-one").step == 8


def test_a_copy_under_the_name_of_another_step_is_named(run):
    shutil.copytree(run / "checkpoint-8", run / "checkpoint-9")
    with pytest.raises(DamagedCheckpoint, match="checkpoint-9 holds step 8"):
        verify(run / "checkpoint-9")


def test_everything_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    """A machine that loses power keeps what was synced: each file and folder, then the name, then its folder."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        events.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    write_checkpoint(tmp_path, 4, fill)
    at = events.index(("rename", str(tmp_path / "checkpoint-4")))
    synced = [Path(name).relative_to(tmp_path).parts[1:] for _, name in events[:at]]
    assert {"/".join(parts) for parts in synced} == {*CONTENT, "manifest.json", "unet", ""}
    assert synced.index(("manifest.json",)) > max(synced.index(tuple(name.split("/"))) for name in CONTENT)
    assert events[at + 1 :] == [("sync", str(tmp_path))]


@pytest.mark.parametrize("exchange", [True, False])
def test_the_same_step_again(run, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(checkpoints, "_exchange", lambda one, other: False)
    write_checkpoint(run, 12, lambda folder: fill(folder, {"new.json": b"{}"}))
    assert list(verify(run / "checkpoint-12").files) == ["new.json"]
    assert names(run) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_bad_fills_are_our_own_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json is written last"):
        write_checkpoint(tmp_path, 4, lambda folder: fill(folder, {"manifest.json": b"{}"}))
    with pytest.raises(ValueError, match="link is neither a plain file"):
        write_checkpoint(tmp_path, 4, lambda folder: (folder / "link").symlink_to("/etc/hostname"))
    with pytest.raises(ValueError, match="step -1"):
        write_checkpoint(tmp_path, -1, fill)
    assert names(tmp_path) == []


# ---- what is damaged is named


def reseal(path: Path, **changes: object) -> None:
    """Write a manifest of other words that is sound in itself, as somebody who knows the format can."""
    said = json.loads((path / "manifest.json").read_bytes())
    said.pop("sha256")
    (path / "manifest.json").write_bytes(seal(json.dumps(said | changes, indent=1).encode()))


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def swap_for(path: Path, make) -> None:
    path.unlink()
    make(path)


DAMAGE = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
    "empty manifest": (lambda p: (p / "manifest.json").write_bytes(b""), r"manifest\.json is not as it was written"),
    "a bit in the manifest": (lambda p: one_bit(p / "manifest.json"), r"manifest\.json is not as it was written"),
    "no JSON": (lambda p: (p / "manifest.json").write_bytes(seal(b"{\n x")), r"manifest\.json is not JSON"),
    "deep JSON": (
        lambda p: (p / "manifest.json").write_bytes(seal(b'{\n"a": ' + b"[" * 100_000)),
        r"manifest\.json is not JSON",
    ),
    "no format": (lambda p: reseal(p, format="1"), "names no format"),
    "no step": (lambda p: reseal(p, step=True), "lacks a step"),
    "no files": (lambda p: reseal(p, files=[]), "lacks a step, files or facts"),
    "no size": (lambda p: reseal(p, files={"state.json": {"sha256": ""}}), r"no size and sha256 for state\.json"),
    "file missing": (lambda p: (p / "state.json").unlink(), r"state\.json is missing"),
    "folder missing": (lambda p: shutil.rmtree(p / "unet"), r"unet/model\.safetensors is missing"),
    "longer": (lambda p: (p / "state.json").write_bytes(b"x" * 13), r"state\.json has 13 bytes, more than the 12"),
    "shorter": (lambda p: os.truncate(p / "state.json", 3), r"state\.json has 3 bytes and should have 12"),
    "a bit": (lambda p: one_bit(p / "optimizer.safetensors"), r"the sha256 of optimizer\.safetensors is not"),
    "link to a file": (
        lambda p: swap_for(p / "state.json", lambda path: path.symlink_to(p / "optimizer.safetensors")),
        r"state\.json is a symbolic link",
    ),
    "link to a folder": (
        lambda p: (shutil.move(p / "unet", p.parent / "elsewhere"), (p / "unet").symlink_to(p.parent / "elsewhere")),
        "unet is a symbolic link",
    ),
    "a folder": (lambda p: swap_for(p / "state.json", Path.mkdir), r"state\.json is not a plain file"),
    "a pipe": (lambda p: swap_for(p / "state.json", os.mkfifo), r"state\.json is not a plain file"),
    "manifest a link": (
        lambda p: swap_for(p / "manifest.json", lambda path: path.symlink_to("state.json")),
        r"manifest\.json is a symbolic link",
    ),
    "not a folder": (lambda p: (shutil.rmtree(p), p.write_bytes(b"")), "checkpoint-12 is not a folder"),
    "link to nothing": (lambda p: (shutil.rmtree(p), p.symlink_to("nothing")), "checkpoint-12 is not a folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_older_one_taken(run, kind):
    act, words = DAMAGE[kind]
    act(run / "checkpoint-12")
    with pytest.raises(DamagedCheckpoint, match=words) as caught:
        verify(run / "checkpoint-12")
    assert "\n" not in str(caught.value)
    found = newest(run)
    assert found.checkpoint is not None
    assert found.checkpoint.path == run / "checkpoint-8"
    assert found.damaged == [(run / "checkpoint-12", str(caught.value))]
    aside = set_aside(*found.damaged[0])
    assert newest(run).damaged == []
    assert (run / "aside-checkpoint-12.txt").read_text() == f"{caught.value}\n"
    assert os.path.lexists(aside)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../x", "", ".", "a//b", "a\\b", "a\0b", "a\nb", "manifest.json"]
)
def test_names_that_lead_out_are_refused(run, name):
    (run / "secret").write_bytes(b"x")
    reseal(run / "checkpoint-12", files={name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}})
    with pytest.raises(DamagedCheckpoint, match="no name of a file in it"):
        verify(run / "checkpoint-12")


def test_a_newer_format_is_neither_read_nor_passed_over(run):
    """Its whole content may mean something else; to set it aside or go on without it would lose work."""
    reseal(run / "checkpoint-12", format=2, version="3.1", files="elsewhere")
    with pytest.raises(NewerCheckpoint, match=r"format 2 .* reads format 1: install diffusers-ddpm-ext 3\.1 or newer"):
        newest(run)


def test_unnamed_files_are_listed_and_never_opened(run, monkeypatch):
    path = run / "checkpoint-12"
    (path / "random_states_0.pkl").write_bytes(b"x")
    (path / "notes").mkdir()
    (path / "notes" / "mine.txt").write_text("good one")
    (path / "link").symlink_to("notes")
    opened = []
    open_ = os.open
    monkeypatch.setattr(os, "open", lambda p, *rest: opened.append(Path(p).name) or open_(p, *rest))
    found = verify(path)
    assert found.unnamed == ("link", "notes/mine.txt", "random_states_0.pkl")
    assert set(opened) == {"manifest.json", *(Path(name).name for name in CONTENT)}
    with pytest.raises(DamagedCheckpoint, match=r"names no random_states_0\.pkl"):
        found.read("random_states_0.pkl")


def test_what_is_read_is_what_was_compared(run):
    """Changed between the search and the loading: read compares its own bytes."""
    found = newest(run).checkpoint
    assert found is not None
    one_bit(found.path / "optimizer.safetensors")
    with pytest.raises(DamagedCheckpoint, match="the sha256 of optimizer"):
        found.read("optimizer.safetensors")


def test_no_permission_is_not_damage(run, monkeypatch):
    """A whole checkpoint is not set aside because this user, or this moment, cannot open it."""

    def refuse(path: Path, *rest: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        newest(run)


def test_random_faults_in_short(tmp_path):
    """The short form of benchmarks/torture/faults.py."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "torture"))
    try:
        import faults
    finally:
        sys.path.pop(0)
    tally = faults.torture(tmp_path, count=200, seed=0)
    assert tally.silent == []
    assert tally.unnamed == []
    assert tally.faults == 200


# ---- finding, setting aside, cleaning, pruning


def test_only_steps_are_checkpoints(tmp_path):
    others = ["checkpoint-", "checkpoint-04", "checkpoint-4x", "xcheckpoint-4", "checkpoint--4", "checkpoint-٤",
              "aside-checkpoint-4", ".writing-4-00000000", "checkpoint-4.tmp"]  # fmt: skip
    for name in (*others, "checkpoint-10", "checkpoint-9", "checkpoint-0"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0", "checkpoint-9", "checkpoint-10"]
    assert list_checkpoints(tmp_path / "nothing") == []
    assert newest(tmp_path / "nothing") == checkpoints.Search(None, [])


def test_setting_aside_never_overwrites(run):
    kept = {}
    for turn in range(3):
        write_checkpoint(run, 12, lambda folder, turn=turn: fill(folder, {"turn": b"%d" % turn}))
        kept[set_aside(run / "checkpoint-12", "one sentence.").name] = b"%d" % turn
    assert {name: (run / name / "turn").read_bytes() for name in kept} == kept
    assert list(kept) == ["aside-checkpoint-12", "aside-checkpoint-12-2", "aside-checkpoint-12-3"]


def test_going_back_sets_the_newer_aside(run):
    assert [path.name for path in set_aside_newer(run, 4)] == ["aside-checkpoint-12", "aside-checkpoint-8"]
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-4"]
    assert (run / "aside-checkpoint-8.txt").read_text() == "The run went on from step 4.\n"
    assert verify(run / "aside-checkpoint-8").step == 8


def test_setting_aside_in_a_folder_that_is_read_only(run, monkeypatch):
    def refuse(*names: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(
        OSError, match=r"checkpoint-12 cannot be set aside \(Read-only file system\): make .* writable"
    ):
        set_aside(run / "checkpoint-12", "torn")


def test_leftovers_go_and_nothing_else(run):
    for name in (".writing-16-0123abcd", ".deleting-2-0123abcd", ".replaced-12-0123abcd"):
        shutil.copytree(run / "checkpoint-12", run / name)
    shutil.copytree(run / "checkpoint-12", run / ".replaced-14-0123abcd")  # whose successor never came
    others = {".writing-mine", ".deleting-2-0123abcd.zip", ".saving-x", "samples", "aside-checkpoint-2"}
    for name in others:
        (run / name).mkdir()
    gone = clean_leftovers(run)
    assert [path.name for path in gone] == [".deleting-2-0123abcd", ".replaced-12-0123abcd", ".writing-16-0123abcd"]
    assert set(names(run)) == others | {f"checkpoint-{step}" for step in (4, 8, 12, 14)}


def test_pruning(run):
    write_checkpoint(run, 16, fill)
    (run / "checkpoint-2").mkdir()
    (run / "checkpoint-2" / "random_states_0.pkl").write_bytes(b"of another program")
    assert [path.name for path in prune(run, 2, keep=[4])] == ["checkpoint-8"]
    assert [path.name for path in prune(run, 1)] == ["checkpoint-4", "checkpoint-12"]
    assert names(run) == ["checkpoint-16", "checkpoint-2"]
    with pytest.raises(ValueError, match="total_limit 0"):
        prune(run, 0)


# ---- a disk that is full or closed


def test_a_disk_that_refuses_loses_nothing(run):
    """The system's limit on file sizes (RLIMIT_FSIZE) stands in for a full disk: one class, one sentence."""
    script = """
        import resource, sys
        from pathlib import Path
        from diffusers_ddpm_ext.training.checkpoints import CheckpointNotWritten, write_checkpoint
        import numpy, safetensors.numpy
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        fills = {
            "python": lambda folder: (folder / "x").write_bytes(b"x" * 60_000),
            "safetensors": lambda folder: safetensors.numpy.save_file({"x": numpy.zeros(60_000)}, folder / "x"),
            "manifest": lambda folder: [(folder / f"a-long-name-of-a-file-{i}").touch() for i in range(500)],
        }
        for name, fill in fills.items():
            try:
                write_checkpoint(Path(sys.argv[1]), 16, fill)
            except CheckpointNotWritten as error:
                print(name, error.errno, error)
        """
    result = run_script(script, run)
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [k, str(errno.EFBIG)] for k in ("python", "safetensors", "manifest")
    ]
    assert all("checkpoint-16 could not be written (File too large); older checkpoints" in line for line in lines)
    assert names(run) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    assert verify(run / "checkpoint-12").step == 12
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system takes the right to mount one")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_loses_nothing(small_disk):
    write_checkpoint(small_disk, 4, lambda folder: fill(folder, {"x": b"x" * 600_000}))
    for _ in range(2):
        with pytest.raises(CheckpointNotWritten, match="No space left on device") as caught:
            write_checkpoint(small_disk, 8, lambda folder: fill(folder, {"x": b"x" * 600_000}))
        assert caught.value.errno == errno.ENOSPC
    assert names(small_disk) == ["checkpoint-4"]
    assert verify(small_disk / "checkpoint-4").step == 4
    set_aside(small_disk / "checkpoint-4", "no room for this sentence")
    write_checkpoint(small_disk, 12, lambda folder: fill(folder, {"x": b"x" * 300_000}))
    assert newest(small_disk).checkpoint is not None


def test_a_full_disk_in_the_words_of_safetensors(tmp_path):
    """That library raises its own class; another fault of its own is not taken for a full disk."""

    def fail(words: str):
        def fill(folder: Path) -> None:
            raise SafetensorError(words)

        return fill

    with pytest.raises(CheckpointNotWritten, match="No space left") as caught:
        write_checkpoint(tmp_path, 4, fail("Error while serializing: I/O error: No space left (os error 28)"))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(SafetensorError, match="invalid dtype"):
        write_checkpoint(tmp_path, 4, fail("invalid dtype"))
    assert names(tmp_path) == []


def test_a_folder_that_is_missing_or_closed(tmp_path):
    with pytest.raises(CheckpointNotWritten, match="No such file"):
        write_checkpoint(tmp_path / "nothing", 4, fill)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointNotWritten, match="Not a directory"):
        write_checkpoint(tmp_path / "file", 4, fill)


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_each_refused_call_leaves_the_older_ones(run, monkeypatch, failing):
    """The n-th call fails with an error of the disk, for every n that there is."""
    real, calls = getattr(os, failing), 0
    monkeypatch.setattr(checkpoints, "_exchange", lambda one, other: False)
    for deadly in range(1, 50):
        calls = 0

        def refuse(*arguments: object, deadly: int = deadly) -> None:
            nonlocal calls
            calls += 1
            if calls == deadly:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, failing, refuse)
            try:
                write_checkpoint(run, 12, lambda folder: fill(folder, {"x": b"again", "y": b""}))
                break
            except CheckpointNotWritten:
                pass
        clean_leftovers(run)
        assert [verify(path).step for path in list_checkpoints(run)] == [4, 8, 12]
    assert deadly > (5 if failing == "fsync" else 2)


# ---- kill -9

# Each call into the system that changes a file system, counted; the process dies before the n-th.
DIE = """
    import os, signal, sys
    from pathlib import Path
    from diffusers_ddpm_ext.training import checkpoints
    from diffusers_ddpm_ext.training.checkpoints import clean_leftovers, list_checkpoints, prune, write_checkpoint
    from diffusers_ddpm_ext.training.manifest import verify

    CALLS = ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink")
    if sys.argv[2] == "rename":
        checkpoints._exchange = lambda one, other: False

    def die_at(deadly):
        left = deadly
        def deadly_call(real):
            def call(*arguments, **keywords):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **keywords)
            return call
        for name in CALLS:
            setattr(os, name, deadly_call(getattr(os, name)))
        checkpoints._exchange = deadly_call(checkpoints._exchange)

    def fill(mark):
        def write(folder):
            os.mkdir(folder / "unet")
            for name in ("a", "unet/b"):
                at = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
                for _ in range(3):
                    os.write(at, mark * 500)
                os.close(at)
        return write

    def reset(parent):
        for path in parent.iterdir():
            checkpoints._remove(path)
        write_checkpoint(parent, 4, fill(b"old"))
        write_checkpoint(parent, 8, fill(b"old"))

    def work(parent):
        write_checkpoint(parent, 8, fill(b"new"))
        write_checkpoint(parent, 12, fill(b"new"))
        prune(parent, 1)

    parent, deaths, after = Path(sys.argv[1]), 0, set()
    while True:
        reset(parent)
        child = os.fork()
        if child == 0:
            die_at(deaths + 1)
            work(parent)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        deaths += 1
        steps = []
        for turn in ("as it lies", "cleaned"):
            if turn == "cleaned":
                clean_leftovers(parent)
                assert all(path in list_checkpoints(parent) for path in parent.iterdir()), sorted(parent.iterdir())
            found = [verify(path) for path in list_checkpoints(parent)]  # none is torn
            steps = [checkpoint.step for checkpoint in found]
            assert {checkpoint.read("a") for checkpoint in found} <= {b"old" * 1500, b"new" * 1500}
            if turn == "cleaned" or sys.argv[2] == "exchange":
                assert steps[-1] >= 8, steps  # nothing goes backwards
        after.add(tuple(steps))
    print(deaths, sorted(after))
    """


@pytest.fixture
def swift_path(tmp_path):
    """In memory where there is such a place: to wait for a disk shows nothing about a killed process."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.mark.parametrize("how", ["exchange", "rename"])
def test_killed_before_every_single_call(swift_path, how):
    """Replacing a step, writing a new one and pruning: whichever call is the last, no folder is torn or lost."""
    place, other = swift_path / "run", swift_path / "other"
    place.mkdir()
    other.mkdir()
    if how == "exchange" and not checkpoints._exchange(place, other):
        pytest.skip("folders cannot swap names on this file system")
    result = run_script(DIE, place, how)
    assert result.returncode == 0, result.stderr
    deaths, outcomes = result.stdout.split(maxsplit=1)
    assert int(deaths) > 60
    assert outcomes.strip() == "[(4, 8), (4, 8, 12), (8, 12), (12,)]"


def test_killed_at_random_moments(tmp_path):
    """A writer that never rests, and a clock that knows nothing of it; each life goes on where the last one ended."""
    script = """
        import sys
        from pathlib import Path
        from diffusers_ddpm_ext.training.checkpoints import clean_leftovers, newest, prune, write_checkpoint
        from diffusers_ddpm_ext.training.lock import FolderLock
        with FolderLock(Path(sys.argv[1])):
            clean_leftovers(Path(sys.argv[1]))
            found = newest(Path(sys.argv[1]))
            assert not found.damaged, found.damaged
            step = found.checkpoint.step if found.checkpoint else 0
            print(step, flush=True)
            while True:
                step += 1
                write_checkpoint(Path(sys.argv[1]), step, lambda folder: (folder / "a").write_bytes(bytes(500_000)))
                prune(Path(sys.argv[1]), 1 + step % 2)
                print(step, flush=True)
        """
    clock, last = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first >= last, "a finished checkpoint was lost"
        try:
            process.wait(clock.uniform(0.0, 0.2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        last = int(rest[-1]) if rest else first
        assert process.returncode == -signal.SIGKILL
        assert newest(tmp_path).damaged == []
    assert last > 0


def test_an_interrupt_leaves_nothing_behind(run):
    def interrupted(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(run, 16, interrupted)
    assert names(run) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_no_torch_is_needed():
    rooms = ("checkpoints", "manifest", "lock")
    lines = "\n".join(f"import diffusers_ddpm_ext.training.{room}" for room in rooms)
    result = run_script(f"{lines}\nimport sys\nassert not {{'torch', 'diffusers', 'pickle'}} & set(sys.modules)\n")
    assert result.returncode == 0, result.stderr


def test_manifest_alone_can_be_read(run):
    found = read_manifest(run / "checkpoint-8")
    one_bit(run / "checkpoint-8" / "optimizer.safetensors")
    assert read_manifest(run / "checkpoint-8") == found
    assert found.facts == {"seed": 7}
    assert manifest.FORMAT == 1
