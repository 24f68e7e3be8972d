"""Which hostile file goes where, and which command or reader opens it.

A slot is a place for a file of one kind, in copies of intact subjects, with the commands that read that place.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hostile_files as files
from hostile_files import Write, changed_json, content
from hostile_values import (
    BIG,
    COMPVIS_YAML_CHANGES,
    ENVIRONMENT_CHANGES,
    EVALUATION_CHANGES,
    FIT_CHANGES,
    FLAGS_CHANGES,
    INDEX_CHANGES,
    MANIFEST_CHANGES,
    PROOF_CHANGES,
    RUN_YAML_CHANGES,
    SCHEDULER_CHANGES,
    STATE_CHANGES,
    UNET_CHANGES,
)
from subjects import LOOP, TINY, command

TRAIN = ["train", *TINY, "--max_train_steps", "1", "--output_dir", "new", "--no_use_ema"]
RESUME = ["train", "--config", "run/config.yaml", "--output_dir", "run"]
SAMPLE = ["sample", "run", "--num_images", "2", "--num_inference_steps", "2", "--out", "out.png"]
EVALUATE = ["evaluate", "run", "--num_timesteps", "2", "--max_images", "2", "--out", "out"]
FIT = ["fit-variance", "run", "--draws", "2", "--max_steps", "3"]
REPORT, PLOT = ["report", "run", "--out", "page.html"], ["plot", "run", "--out", "plots"]
VERIFY, DOCTOR = ["verify", "run"], ["doctor", "run", "--offline"]
TO_COMPVIS = ["convert", "--to", "compvis", "compvis/converted", "--out", "back.ckpt", "--config_out", "back.yaml"]
FROM_COMPVIS = ["convert", "--from", "compvis", "--checkpoint", "compvis/model.ckpt", "--config", "compvis/model.yaml"]
FROM_COMPVIS += ["--out", "out", "--quiet"]
FROM_OPENAI = ["convert", "--from", "openai", "--checkpoint", "openai/model.pt", "--model_flags", "openai/flags.json"]
FROM_OPENAI += ["--out", "out", "--quiet"]
CHECK = ["convert", "--check", "compvis/converted", *FROM_COMPVIS[3:7]]
START = [
    "train",
    "--train_data_dir",
    "images",
    *LOOP,
    "--resolution",
    "8",
    "--block_out_channels",
    "32",
    "--layers_per_block",
]
START += ["1", "--attention_levels", "none", "--max_train_steps", "1", "--output_dir", "new", "--ckpt_path"]
"""A run that starts from the weights of ``compvis/model.ckpt``."""
IMAGES = [*TRAIN, "--train_data_dir", "images"]
TABLE = [*TRAIN, "--train_data_dir", "table"]


@dataclass(frozen=True)
class Slot:
    """A place for hostile files, and who reads it.

    Attributes:
        kind: of the files, for the summary.
        subjects: copied into the working folder.
        path: of the file, below the working folder.
        files: name -> what writes it.
        readers: command lines (lists), or names of `READERS`.
        prepare: run after the file is in place; seals it, or removes what would keep it from being read.
        intact: the subject's file that belongs there, if it is not there already.
    """

    kind: str
    subjects: tuple[str, ...]
    path: str
    files: Callable[[Path], dict[str, Write]]
    readers: tuple[list[str] | str, ...]
    prepare: Callable[[Path], None] = lambda work: None
    intact: str | None = None


@dataclass(frozen=True)
class Case:
    """One hostile file and one reader."""

    slot: Slot
    file: str
    write: Write
    reader: list[str] | str

    @property
    def name(self) -> str:
        """For a person: reader, place, file."""
        return f"{reader_name(self.reader)} <- {self.slot.path}: {self.file}"

    def work(self) -> Callable[[], int]:
        """What the child runs."""
        return command(self.reader) if isinstance(self.reader, list) else READERS[self.reader]


def reader_name(reader: list[str] | str) -> str:
    """The command (with what tells it from others), or the reader's name."""
    if isinstance(reader, str):
        return reader
    telling = (
        "--config",
        "--dry_run",
        "--skip_bad_images",
        "--variant",
        "--undo",
        "--ckpt_path",
        "--source",
        "--base",
    )
    flags = [word for word in reader[1:] if word in telling or word.endswith("_column") or word.startswith("--resume")]
    flags += [f"{word} {reader[index + 1]}" for index, word in enumerate(reader) if word in ("--from", "--to")]
    return " ".join([reader[0], *flags])


def _reader(read: Callable[[], object]) -> Callable[[], int]:
    """A library call as a command: its ValueError is the error line (an OSError is one that Diffusers documents)."""

    def work() -> int:
        try:
            read()
        except (ValueError, OSError) as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            return 2
        return 0

    return work


def _load() -> object:
    from diffusers_ddpm_ext import DDPMExtPipeline

    return DDPMExtPipeline.from_pretrained("run")


def _load_scheduler() -> object:
    from diffusers_ddpm_ext import DDPMExtScheduler

    return DDPMExtScheduler.from_pretrained("run", subfolder="scheduler")


def _card() -> object:
    from diffusers_ddpm_ext.hub.card import make_card

    return make_card(Path("run"), "me/run")


def _load_compvis() -> object:
    from diffusers_ddpm_ext.compvis import load_compvis

    return load_compvis("compvis/model.ckpt", "compvis/model.yaml")


READERS: dict[str, Callable[[], int]] = {
    "from_pretrained": _reader(_load),
    "scheduler.from_pretrained": _reader(_load_scheduler),
    "make_card": _reader(_card),
    "load_compvis": _reader(_load_compvis),
}


def seal(work: Path) -> None:
    """Write a manifest that fits a checkpoint's files, as someone who forges one would."""
    folder = work / "run" / "checkpoint-4"
    (work / "run" / "finished.json").unlink(missing_ok=True)
    raw = (folder / "manifest.json").read_bytes()
    content = json.loads(raw)
    for name, entry in content["files"].items():
        path = folder / name
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content.pop("sha256")
    seal_json(folder / "manifest.json", content)


def seal_json(path: Path, content: dict[str, object]) -> None:
    """A checkpoint's manifest with the checksum line of `manifest.add_checksum`."""
    from diffusers_ddpm_ext.training.checkpoints.manifest import add_checksum

    path.write_bytes(add_checksum(json.dumps(content, indent=1).encode()))


def seal_manifest(work: Path) -> None:
    """Give a manifest that is a JSON object its checksum line."""
    (work / "run" / "finished.json").unlink(missing_ok=True)
    path = work / "run" / "checkpoint-4" / "manifest.json"
    if path.is_file() and not path.is_symlink():
        body = path.read_bytes().lstrip().removeprefix(b"{")
        body = re.sub(rb'\A\s*"sha256":\s*"[0-9a-f]*",\s*', b"", body)  # the former one
        digest = hashlib.sha256(body).hexdigest().encode()
        path.write_bytes(b'{\n"sha256": "' + digest + b'",\n' + body)


def seal_proof(work: Path) -> None:
    """Give a proof that is a JSON object its checksum."""
    path = work / "run" / "proof.json"
    if not path.is_file() or path.is_symlink():
        return
    try:
        proof = json.loads(path.read_bytes().decode())  # UTF-8 alone
        proof.pop("sha256")
        text = json.dumps(proof, indent=1, sort_keys=True) + "\n"
        proof["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(proof, indent=1, sort_keys=True) + "\n")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass


def reprove(work: Path) -> None:
    """Write a proof that fits the card's images."""
    path, file = work / "run" / "proof.json", work / "run" / "card" / "samples.npz"
    if file.is_file() and not file.is_symlink():
        proof = json.loads(path.read_bytes())
        data = file.read_bytes()
        proof["files"]["card/samples.npz"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_text(json.dumps(proof))
        seal_proof(work)


def unfinish(work: Path) -> None:
    """Let a resumed run go on."""
    (work / "run" / "finished.json").unlink(missing_ok=True)


INTACT = "intact"


def _safe_yaml(text: str, changes: dict[str, str]) -> dict[str, Write]:
    """YAML text with one line replaced, by its key."""
    result: dict[str, Write] = {}
    for name, value in changes.items():
        key = name.split(" = ")[0]
        lines = text.split("\n")
        place = next(index for index, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
        lines[place] = lines[place].split(":")[0] + f": {value}"
        result[name] = content("\n".join(lines))
    return result


def _images(work: Path) -> dict[str, Write]:
    """Image files with their suffix: the slot's path has none."""

    def under(suffix: str, write: Write) -> Write:
        return lambda path: write(
            path.with_name(f"{path.name}{'' if suffix[0] in chr(27) + chr(10) else '.'}{suffix}")
        )

    return {name: under(suffix, write) for name, (suffix, write) in files.image_files().items()}


def _of(path: str, make: Callable[[bytes], dict[str, Write]]) -> Callable[[Path], dict[str, Write]]:
    return lambda subjects: make((subjects / path).read_bytes())


def _json(path: str, changes: dict[str, object] | None = None) -> Callable[[Path], dict[str, Write]]:
    return _of(path, lambda valid: files.json_files(valid) | changed_json(valid, changes or {}))


def _metadata_lines(valid: bytes) -> dict[str, Write]:
    rows = [line.split(",") for line in valid.decode().splitlines()]
    lines = [json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:]]
    values = [
        "null",
        "[]",
        "[1, 2]",
        "{}",
        "true",
        "NaN",
        "1e400",
        "9" * 4000,
        "10000000000",
        "-1",
        "1.5",
        '"\\ud800"',
        '"\\u001b[31m"',
        "[" * 5000 + "]" * 5000,
        '["a"]',
        "[1, null]",
        "[1e300]",
        '""',
        "0.1",
    ]
    texts = {f"class {v[:20]}": "\n".join(lines).replace('"class": "0"', f'"class": {v}', 1) for v in values}
    texts |= {f"name {v[:20]}": "\n".join(lines).replace('"01.png"', v, 1) for v in values}
    texts |= {
        "a list": "\n".join([*lines, "[]"]),
        "a number": "\n".join([*lines, "3"]),
        "null": "\n".join([*lines, "null"]),
        "no name": "\n".join([*lines, "{}"]),
        "a row twice": "\n".join([*lines, lines[0]]),
        "blank lines": "\n\n\n".join(lines),
        "100,000 rows": "\n".join(["{}"] * 100_000),
        "25,000 other names": "\n".join(f'{{"file_name": "{n}.png"}}' for n in range(25_000)),
        "a row of 900 kB": "\n".join([*lines, json.dumps({"file_name": "x" * 900_000})]),
        "a row of 60,000 keys": "\n".join([*lines, json.dumps({f"k{n}": 0 for n in range(60_000)})]),
    }
    return {name: content(text) for name, text in texts.items()} | files.damaged_text("\n".join(lines).encode())


def _metric_rows(valid: bytes) -> dict[str, Write]:
    lines = valid.decode().splitlines()
    rows = [
        "null",
        "[]",
        "3",
        '"x"',
        "{}",
        '{"step": null}',
        '{"step": "x"}',
        '{"step": NaN}',
        '{"step": 1e400}',
        '{"step": -5}',
        '{"step": 10000000000000000000000}',
        '{"step": 2.5}',
        '{"step": [1]}',
        '{"step": true}',
        '{"step": 9, "train/loss": null}',
        '{"step": 9, "train/loss": "x"}',
        '{"step": 9, "train/loss": NaN}',
        '{"step": 9, "train/loss": [1]}',
        '{"step": 9, "train/loss": Infinity}',
        '{"step": 9, "train/loss": 1e308}',
        '{"step": 9, "val/loss_simple_ema": null}',
        '{"step": 9, "val/loss_simple_ema": "x"}',
        '{"step": 9, "val/bpd": {}}',
        '{"step": 9, "\\u001b[31m": 1}',
        '{"step": 9, "\\ud800": 1}',
        '{"step": ' + "9" * 5000 + "}",
        '{"step": 9, "train/loss_simple": ' + "9" * 4000 + "}",
        "[" * 60_000,
        '{"step": 3, "train/loss": -1.0}',
        '{"train/loss": 1.0}',
    ]
    texts = {f"row {row[:40]}": "\n".join([*lines, row]) + "\n" for row in rows}
    texts |= {f"only row {row[:40]}": row + "\n" for row in rows[:14]}
    texts |= {
        "60,000 rows": "".join(f'{{"step":{n},"a":1}}\n' for n in range(45_000)),
        "200,000 rows": "{}\n" * 200_000,
        "30,000 losses": "".join(f'{{"step":{n},"train/loss":1.5}}\n' for n in range(28_000)),
        "steps of 10^15": "".join(f'{{"step":{n}{"0" * 15},"train/loss":1.5}}\n' for n in range(1, 9)),
        "20,000 metrics": json.dumps({f"train/m{n}": 1.0 for n in range(30_000)}) + "\n",
        "steps backward": "\n".join(reversed(lines)) + "\n",
        "half a row": valid.decode()[:-30],
    }
    return {name: content(text) for name, text in texts.items()} | files.damaged_text(valid)


def _step_table(valid: bytes) -> dict[str, Write]:
    rows = [
        "",
        ",,,",
        "x,y,z,w",
        "nan,nan,nan,nan",
        "-1,1,1,1",
        "99999999999999999999,1,1,1",
        "3,inf,0,1",
        "3,1",
        "3,1,1,1,1,1",
        "3.5,1,1,1",
        "3,1e400,1,1",
        "3,1,-1,1",
        "3,\x1b[31m,1,1",
        "3," + "9" * 5000 + ",1,1",
    ]
    texts = {f"row {row[:30]!r}": valid + row.encode() + b"\n" for row in rows}
    texts["60,000 rows"] = valid.split(b"\n")[0] + b"\n" + b"3,1,1,1\n" * 60_000
    texts["only a header"] = valid.split(b"\n")[0] + b"\n"
    texts["other header"] = b"a,b,c,d\n" + valid.split(b"\n", 1)[1]
    return {name: content(text) for name, text in texts.items()} | files.damaged_text(valid)


def slots() -> Iterator[Slot]:
    """All slots."""
    run = ("run", "images")
    resume = [*RESUME, "--resume_from_checkpoint"]
    yield Slot(
        "pipeline JSON",
        run,
        "run/model_index.json",
        _json("run/model_index.json", INDEX_CHANGES),
        (SAMPLE, "from_pretrained", REPORT, VERIFY, DOCTOR, EVALUATE),
    )
    yield Slot(
        "pipeline JSON",
        run,
        "run/unet/config.json",
        _json("run/unet/config.json", UNET_CHANGES),
        (SAMPLE, "from_pretrained", EVALUATE, DOCTOR),
    )
    yield Slot(
        "pipeline JSON",
        run,
        "run/scheduler/scheduler_config.json",
        _json("run/scheduler/scheduler_config.json", SCHEDULER_CHANGES),
        (SAMPLE, PLOT, "scheduler.from_pretrained", EVALUATE, FIT, REPORT),
    )
    yield Slot(
        "pipeline JSON",
        run,
        "run/logvar/config.json",
        _json(
            "run/logvar/config.json",
            {
                "num_train_timesteps = 10^9": BIG,
                "num_train_timesteps = -1": -1,
                "num_train_timesteps = text": "x",
                "format = 2": 2,
                "kind = x": "x",
                "kind = continuous": "continuous",
                "kind = 3": 3,
            },
        ),
        ("from_pretrained", SAMPLE, PLOT, [*FIT, "--source", "logvar"]),
    )
    yield Slot(
        "pipeline JSON",
        ("compvis", "images"),
        "compvis/converted/ema.json",
        _json(
            "compvis/converted/ema.json",
            {
                "decay = 2": 2,
                "decay = text": "x",
                "decay = null": None,
                "decay = -1": -1,
                "num_updates = 10^30": 10**30,
                "num_updates = text": "x",
                "num_updates = -4": -4,
                "num_updates = 2.5": 2.5,
                "format = 9": 9,
                "format = x": "x",
            },
        ),
        ([*START, "compvis/converted"], TO_COMPVIS, CHECK),
    )
    yield Slot(
        "pipeline JSON",
        ("compvis",),
        "compvis/converted/scheduler/scheduler_config.json",
        _json("compvis/converted/scheduler/scheduler_config.json", SCHEDULER_CHANGES),
        (TO_COMPVIS, CHECK),
    )
    yield Slot(
        "pipeline JSON",
        ("compvis",),
        "compvis/converted/unet/config.json",
        _json("compvis/converted/unet/config.json", UNET_CHANGES),
        (TO_COMPVIS, CHECK),
    )
    yield Slot(
        "pipeline JSON",
        run,
        "run/unet/diffusion_pytorch_model.safetensors.index.json",
        lambda subjects: files.json_files(b'{"metadata": {}, "weight_map": {}}'),
        (SAMPLE, "from_pretrained", VERIFY),
    )
    yield Slot(
        "run JSON",
        run,
        "run/variance_fit.json",
        _json("run/variance_fit.json", FIT_CHANGES),
        (PLOT, REPORT, [*FIT[:2], "--undo"], FIT, "make_card"),
    )
    yield Slot(
        "run JSON",
        run,
        "run/evaluation/evaluation.json",
        _json("run/evaluation/evaluation.json", EVALUATION_CHANGES),
        (REPORT, "make_card", PLOT, [*EVALUATE[:-2]]),
    )
    yield Slot(
        "run JSON",
        run,
        "run/environment.json",
        _json("run/environment.json", ENVIRONMENT_CHANGES),
        (REPORT, "make_card"),
    )
    yield Slot(
        "run JSON",
        run,
        "run/finished.json",
        _json("run/finished.json", {"format = 2": 2, "step = x": "x"}),
        ([*resume, "auto"], REPORT),
    )
    yield Slot(
        "run JSON",
        run,
        "run/best/monitor.json",
        _json(
            "run/best/monitor.json",
            {
                "step = text": "x",
                "step = 10^30": 10**30,
                "value = null": None,
                "value = text": "x",
                "mode = 3": 3,
                "format = 3": 3,
                "monitor = []": [],
            },
        ),
        ([*resume, "best"], REPORT, "make_card"),
        unfinish,
    )
    yield Slot("proof", run, "run/proof.json", _json("run/proof.json", PROOF_CHANGES), (VERIFY, DOCTOR), seal_proof)
    yield Slot(
        "proof",
        run,
        "run/.hub.json",
        lambda subjects: files.json_files(b'{"repo_id": "me/run", "commit": "0"}'),
        (DOCTOR, "make_card"),
    )
    yield Slot(
        "npz",
        run,
        "run/card/samples.npz",
        lambda subjects: files.archive_files("images", (2, 8, 8, 3)),
        (VERIFY,),
        reprove,
    )
    yield Slot(
        "metrics",
        run,
        "run/metrics.jsonl",
        _of("run/metrics.jsonl", _metric_rows),
        (REPORT, [*resume, "latest"], "make_card"),
        unfinish,
    )
    yield Slot(
        "metrics",
        run,
        "run/timing.jsonl",
        _of("run/timing.jsonl", _metric_rows),
        ([*resume, "latest"], REPORT),
        unfinish,
    )
    yield Slot(
        "metrics", run, "run/evaluation/steps.csv", _of("run/evaluation/steps.csv", _step_table), (PLOT, REPORT)
    )
    yield Slot(
        "checkpoint",
        run,
        "run/checkpoint-4/state.json",
        _json("run/checkpoint-4/state.json", STATE_CHANGES),
        ([*resume, "latest"], [*resume, "run/checkpoint-4"]),
        seal,
    )
    yield Slot(
        "checkpoint",
        run,
        "run/checkpoint-4/manifest.json",
        _json("run/checkpoint-4/manifest.json", MANIFEST_CHANGES),
        ([*resume, "latest"], [*resume, "run/checkpoint-4"], DOCTOR),
        seal_manifest,
    )
    for name in ("model", "ema", "optimizer"):
        yield Slot(
            "checkpoint",
            run,
            f"run/checkpoint-4/{name}.safetensors",
            lambda subjects: files.tensor_files("denoiser.conv_in.bias", (8,)),
            ([*resume, "latest"],),
            seal,
        )
    yield from _yaml_slots(run)
    yield from _data_slots(run)
    yield from _original_slots()


def _yaml_slots(run: tuple[str, ...]) -> Iterator[Slot]:
    def run_yaml(valid: bytes) -> dict[str, Write]:
        return files.yaml_files(valid) | _safe_yaml(valid.decode(), RUN_YAML_CHANGES)

    def compvis_yaml(valid: bytes) -> dict[str, Write]:
        return files.yaml_files(valid) | _safe_yaml(valid.decode(), COMPVIS_YAML_CHANGES)

    yield Slot(
        "YAML", run, "run/config.yaml", _of("run/config.yaml", run_yaml), (EVALUATE, REPORT, FIT, "make_card", PLOT)
    )
    yield Slot(
        "YAML",
        ("images",),
        "options.yaml",
        _of("run/config.yaml", run_yaml),
        (["train", "--config", "options.yaml", "--output_dir", "new", "--dry_run"],),
        intact="run/config.yaml",
    )
    yield Slot(
        "YAML",
        ("compvis",),
        "compvis/model.yaml",
        _of("compvis/model.yaml", compvis_yaml),
        (FROM_COMPVIS, ["convert-config", "compvis/model.yaml", "--out", "run.yaml"], "load_compvis"),
    )
    yield Slot(
        "YAML",
        ("compvis", "images"),
        "compvis/model.yaml",
        _of("compvis/model.yaml", compvis_yaml),
        ([*START, "compvis/model.ckpt", "--ckpt_config", "compvis/model.yaml"],),
    )


def _network_files(subjects: Path) -> dict[str, Write]:
    valid = (subjects / "compvis/converted/unet/config.json").read_bytes()
    made = files.json_files(valid) | changed_json(valid, UNET_CHANGES)
    del made["empty object"]  # the default network of 274 million weights, which is what it asks for
    return made


def _data_slots(run: tuple[str, ...]) -> Iterator[Slot]:
    classes = [*TABLE, "--conditioning_key", "adm", "--class_column", "class"]
    hints = [*TABLE, "--conditioning_key", "concat", "--concat_column", "hint"]
    tokens = [*TABLE, "--conditioning_key", "crossattn", "--context_column", "embedding"]
    yield Slot(
        "metadata",
        ("table", "hints"),
        "table/metadata.csv",
        _of("table/metadata.csv", files.csv_files),
        (classes, hints, tokens),
    )
    yield Slot(
        "metadata",
        ("table", "hints"),
        "table/metadata.jsonl",
        _of("table/metadata.csv", _metadata_lines),
        (classes, hints),
        lambda work: (work / "table" / "metadata.csv").unlink(),
        "options/metadata.jsonl",
    )
    yield Slot(
        "images",
        ("images",),
        "images/cats/bad",
        _images,
        (IMAGES, [*IMAGES, "--skip_bad_images"], [*IMAGES, "--dry_run"]),
    )
    yield Slot("images", run, "images/dogs/bad", _images, (EVALUATE,))
    yield Slot(
        "images",
        ("table", "hints"),
        "hints/00.png",
        lambda subjects: {name: write for name, (_, write) in files.image_files().items()},
        (hints,),
    )
    yield Slot(
        "images",
        run,
        "run/samples.png",
        lambda subjects: {n: w for n, (_, w) in files.image_files().items()},
        (REPORT, "make_card"),
    )
    yield Slot(
        "npy", ("table", "hints"), "table/embeddings/00.npy", lambda subjects: files.array_files((2, 6)), (tokens,)
    )
    yield Slot(
        "safetensors",
        ("table", "hints"),
        "table/embeddings/00.safetensors",
        lambda subjects: files.tensor_files("x", (2, 6)),
        (tokens,),
        lambda work: (work / "table" / "metadata.csv").write_text(
            (work / "table" / "metadata.csv").read_text().replace("00.npy", "00.safetensors")
        ),
        "options/00.safetensors",
    )
    yield Slot(
        "npy",
        ("tokens",),
        "states.npy",
        lambda subjects: files.array_files((1, 2, 6)),
        (["sample", "tokens", *SAMPLE[2:], "--encoder_hidden_states", "states.npy"],),
        intact="options/states.npy",
    )
    yield Slot(
        "npy",
        ("joined",),
        "inputs.npy",
        lambda subjects: files.array_files((1, 3, 8, 8)),
        (["sample", "joined", *SAMPLE[2:], "--concat_inputs", "inputs.npy"],),
        intact="options/inputs.npy",
    )
    yield Slot(
        "npy",
        ("images",),
        "betas.npy",
        lambda subjects: files.array_files((20,)),
        ([*IMAGES, "--trained_betas", "betas.npy"],),
        intact="options/betas.npy",
    )
    yield Slot(
        "option JSON",
        ("images",),
        "betas.json",
        lambda subjects: (
            files.json_files(b'{"a": 1}')
            | {
                f"list {text[:20]}": content(text)
                for text in (
                    "[0.1]",
                    "[" + "0.01," * 150_000 + "0.1]",
                    "[NaN]",
                    "[[0.1]]",
                    '["0.1"]',
                    "[null]",
                    "[true]",
                    "[1e400]",
                    "[" + "9" * 4000 + "]",
                    "[-0.1]",
                    "[0]",
                    "[1]",
                    "[2]",
                    "[0.5" + ", 0.5" * 19 + "]",
                )
            }
        ),
        ([*IMAGES, "--trained_betas", "betas.json"],),
        intact="options/betas.json",
    )
    yield Slot(
        "option JSON",
        ("images",),
        "network.json",
        _network_files,
        (
            [
                "train",
                "--train_data_dir",
                "images",
                "--resolution",
                "8",
                *LOOP,
                "--num_train_timesteps",
                "20",
                "--max_train_steps",
                "1",
                "--output_dir",
                "new",
                "--model_config_name_or_path",
                "network.json",
            ],
        ),
        intact="compvis/converted/unet/config.json",
    )
    for path in ("unet/diffusion_pytorch_model.safetensors", "logvar/diffusion_pytorch_model.safetensors"):
        key, shape = ("conv_in.bias", (8,)) if "unet" in path else ("logvar", (20,))
        yield Slot(
            "safetensors",
            run,
            f"run/{path}",
            lambda subjects, key=key, shape=shape: files.tensor_files(key, shape),
            (SAMPLE, "from_pretrained", PLOT),
        )
    yield Slot(
        "safetensors",
        run,
        "run/unet/diffusion_pytorch_model.raw.safetensors",
        lambda subjects: files.tensor_files("conv_in.bias", (8,)),
        ([*SAMPLE, "--variant", "raw"],),
    )


def _original_slots() -> Iterator[Slot]:
    yield Slot(
        "checkpoint file",
        ("compvis",),
        "compvis/model.ckpt",
        lambda subjects: files.checkpoint_files(),
        (
            FROM_COMPVIS,
            "load_compvis",
            CHECK,
            ["convert", "--to", "compvis", "compvis/converted", "--out", "back.ckpt", "--base", "compvis/model.ckpt"],
        ),
    )
    yield Slot(
        "checkpoint file",
        ("images",),
        "start.ckpt",
        lambda subjects: files.checkpoint_files(),
        ([*START, "start.ckpt"],),
        intact="compvis/model.ckpt",
    )
    yield Slot(
        "checkpoint file",
        ("images",),
        "start.safetensors",
        lambda subjects: files.tensor_files("conv_in.bias", (8,)),
        ([*START, "start.safetensors"],),
        intact="options/start.safetensors",
    )
    yield Slot(
        "checkpoint file", ("openai",), "openai/model.pt", lambda subjects: files.checkpoint_files(), (FROM_OPENAI,)
    )
    yield Slot(
        "option JSON", ("openai",), "openai/flags.json", _json("openai/flags.json", FLAGS_CHANGES), (FROM_OPENAI,)
    )
    yield Slot(
        "run JSON",
        ("compvis",),
        "compvis/converted/conversion.json",
        _json(
            "compvis/converted/conversion.json",
            {
                "format = 2": 2,
                "tensors = null": None,
                "tensors = list": [],
                "tensors.ema = text": "x",
                "tensors.ema.0 = null": None,
                "tensors.ema.0.source = 3": 3,
                "tensors.ema.0.shape = 10^9": [BIG],
                "default = other": "other",
                "default = 3": 3,
                "facts = list": [],
                "facts.ema_decay = text": "x",
                "configuration = null": None,
                "raw_variant = text": "x",
                "from = openai": "openai",
            },
        ),
        (["convert", "--to", "compvis", "compvis/converted", "--out", "back.ckpt", "--config_out", "b.yaml"], CHECK),
    )


def _intact(subjects: Path, slot: Slot) -> Write:
    if slot.intact is None:
        return lambda path: None
    source = subjects / slot.intact
    return lambda path: shutil.copy(source, path)


def cases(
    subjects: Path, everything: bool = False, places: Sequence[str] = (), intact: bool = False
) -> Iterator[Case]:
    """All cases: every file in its slot with the next reader in turn, or with all readers.

    Args:
        subjects: from `subjects.build`.
        everything: all readers.
        places: text of the kind or path of the slots; all by default.
        intact: no hostile files; every reader must succeed.
    """
    for slot in slots():
        if places and not any(place in f"{slot.kind}: {slot.path}" for place in places):
            continue
        if intact:
            yield from (Case(slot, INTACT, _intact(subjects, slot), reader) for reader in slot.readers)
            continue
        for number, (name, write) in enumerate(slot.files(subjects).items()):
            chosen = slot.readers if everything else (slot.readers[number % len(slot.readers)],)
            for reader in chosen:
                yield Case(slot, name, write, reader)
