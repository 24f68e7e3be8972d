"""Hostile pickles act when they are unpickled, but never when our readers read them."""

from __future__ import annotations

import io
import os
import pickletools
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from helpers.hostile_pickles import PLANTED_NAMES, corpus
from helpers.paths import PYTHONPATH


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a separate process, with its own memory and registries."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_corpus_has_sixty_files(tmp_path):
    files = corpus(tmp_path)
    assert len({hostile.name for hostile in files}) == len({hostile.data for hostile in files}) == len(files) == 60
    assert len(set(PLANTED_NAMES)) == len(PLANTED_NAMES)
    assert list(tmp_path.iterdir()) == [], "creating them runs nothing"


def test_every_calling_opcode_is_covered(tmp_path):
    """According to Python's disassembler, which cannot read the one whose length exceeds the file."""
    seen = set()
    for hostile in corpus(tmp_path):
        if hostile.loader == "pickle" and hostile.name != "endless_bytes":
            seen |= {opcode.name for opcode, _, _ in pickletools.genops(io.BytesIO(hostile.data))}
    assert seen >= {
        "REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "APPEND", "APPENDS", "ADDITEMS", "SETITEM",
        "SETITEMS", "GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "LONG_BINPUT", "MEMOIZE",
        "FRAME",
    }  # fmt: skip


def test_every_file_acts_when_it_is_trusted(tmp_path):
    """A reader that trusts its file: all sixty leave their marker."""
    script = """
        import io, pickle, sys
        from pathlib import Path
        import numpy, torch
        from helpers.hostile_pickles import corpus
        for hostile in corpus(Path(sys.argv[1])):
            file = io.BytesIO(hostile.data)
            try:
                if hostile.loader == "pickle":
                    pickle.load(file)
                elif hostile.loader == "torch":
                    torch.load(file, weights_only=False)
                else:
                    found = numpy.load(file, allow_pickle=True)
                    found = [found[name] for name in getattr(found, "files", [])]
            except Exception:
                pass  # some act first and then fail
        """
    result = run_script(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {hostile.name for hostile in corpus(tmp_path)}


def test_the_polyglot_is_valid_for_safetensors(tmp_path):
    from safetensors.numpy import load

    data = {hostile.name: hostile.data for hostile in corpus(tmp_path)}["pickle_in_safetensors"]
    assert [tensor.dtype.name for tensor in load(data).values()] == ["uint8"]


PLANT = """
    import pickle, sys
    from pathlib import Path
    from helpers.hostile_pickles import PLANTED_NAMES, corpus
    from diffusers_ddpm_ext.training.checkpoints import folders as checkpoints
    from diffusers_ddpm_ext.training.checkpoints.manifest import MANIFEST, FileDigest, digest_file, encode_manifest

    CALLS = ("pickle.find_class", "marshal.loads", "exec", "compile", "os.system", "subprocess.Popen", "import")
    events = []
    watching = False

    def note(event, arguments):
        if watching and event in CALLS:
            events.append(event)

    sys.addaudithook(note)

    markers, parent = Path(sys.argv[1]), Path(sys.argv[2])
    files, counts = corpus(markers), {"stray": 0, "damaged": 0, "named": 0}
    (parent / "checkpoint-8").mkdir(parents=True)
    for content in (b"{}", encode_manifest(8, {})):  # imports what reading needs, before anything is watched
        (parent / "checkpoint-8" / MANIFEST).write_bytes(content)
        checkpoints.newest(parent)
    sound = FileDigest(2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")  # of {}
    for name in PLANTED_NAMES:
        place = parent / "checkpoint-8" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        for hostile in files:
            for way in ("stray", "damaged", "named"):
                place.write_bytes(hostile.data)
                with open(place, "rb", buffering=0) as file:
                    digests = {"stray": {}, "damaged": {name: sound}, "named": {name: digest_file(file)}}[way]
                if name != MANIFEST:
                    (parent / "checkpoint-8" / MANIFEST).write_bytes(encode_manifest(8, digests))
                watching = True
                found = checkpoints.newest(parent)
                if found.checkpoint is not None and way == "named":
                    assert (found.checkpoint.path / name).read_bytes() == hostile.data
                watching = False
                assert (found.checkpoint is None) == (way == "damaged" or name == MANIFEST), (name, hostile.name, way)
                counts[way] += 1
        place.unlink()
    acted = list(events)
    watching = True
    pickle.loads(pickle.dumps(Path))  # the hook does see what is unpickled
    assert events[len(acted):] == ["pickle.find_class"]
    print(counts, acted, [path.name for path in markers.iterdir()])
    """


def test_none_acts_when_a_checkpoint_is_read(tmp_path):
    """Planted under every name: not in the manifest, replacing a file, and listed in a consistent manifest."""
    memory = Path("/dev/shm")  # to wait for a disk five thousand times shows nothing
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        markers, parent = Path(name, "markers"), Path(name, "run")
        markers.mkdir()
        result = run_script(PLANT, markers, parent)
    assert result.returncode == 0, result.stderr
    each = 60 * len(PLANTED_NAMES)
    assert result.stdout.strip() == f"{{'stray': {each}, 'damaged': {each}, 'named': {each}}} [] []"


STATE = """
    import shutil, sys
    from pathlib import Path
    from helpers.hostile_pickles import corpus
    from helpers.state_cases import advance, small_run, small_task
    from diffusers_ddpm_ext.training.checkpoints import manifest
    from diffusers_ddpm_ext.training.checkpoints import snapshot
    from diffusers_ddpm_ext.training.checkpoints.state import capture_snapshot

    markers, folder = Path(sys.argv[1]), Path(sys.argv[2]) / "checkpoint-1"
    run = small_run(small_task())
    advance(run, 1)
    folder.mkdir(parents=True)
    snapshot.write_snapshot(capture_snapshot(run.objects, run.progress), folder)
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused = 0
    for name in sound:
        for hostile in corpus(markers):
            (folder / name).write_bytes(hostile.data)
            digests = {}
            for path in folder.iterdir():
                if path.name != manifest.MANIFEST:
                    with open(path, "rb", buffering=0) as file:
                        digests[path.name] = manifest.digest_file(file)
            (folder / manifest.MANIFEST).write_bytes(manifest.encode_manifest(1, digests))
            manifest.verify(folder)  # its checksums are right: the one who planted it could count
            try:
                snapshot.read_snapshot(folder)
            except ValueError as error:
                refused += name in str(error)
        (folder / name).write_bytes(sound[name])
    snapshot.read_snapshot(folder)
    print(len(sound), refused, [path.name for path in markers.iterdir()])
    """


def test_none_acts_when_the_state_is_read(tmp_path):
    """Under the four names that a resumed run reads, in a consistent checkpoint: refused by name."""
    (tmp_path / "markers").mkdir()
    result = run_script(STATE, tmp_path / "markers", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"4 {4 * 60} []"
