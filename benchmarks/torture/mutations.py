"""Is any changed file misread silently?

    python benchmarks/torture/mutations.py [--count 2000] [--seed 0] [--only TEXT]

Every file that the project writes or reads is changed as someone who knows its structure would (`mutate.py`), sealed
again where it has a seal, and given to a command that reads it. Every command must end as `forked.findings` demands.
What it computes is compared with what it computes from the intact files:

| the command | the change is invalid | the change is open |
|---|---|---|
| refuses | right | right |
| computes the same | **silent**, if it reads the changed key at all | right |
| computes something else | **silent** | right: the new value has its meaning |

A key is read if some change of it, other than one that makes the whole file unreadable, was refused or changed the
result. Commands that only show what files say (report, card, doctor) are not compared. `verify` must refuse every
change of a proven file. A resumed run mends a damaged checkpoint or table of metrics: it computes the same, and warns.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mutate
import subjects
from forked import Outcome, findings, run_forked
from hostile_cases import (
    CHECK,
    DOCTOR,
    EVALUATE,
    FIT,
    FROM_COMPVIS,
    FROM_OPENAI,
    IMAGES,
    PLOT,
    READERS,
    REPORT,
    RESUME,
    SAMPLE,
    TABLE,
    TO_COMPVIS,
    TRAIN,
    VERIFY,
    reader_name,
    reprove,
    seal,
    seal_manifest,
    seal_proof,
    unfinish,
)
from mutate import Mutation
from subjects import LATENTS, SIZE, command

Mutate = Callable[[bytes, random.Random], Mutation]
Oracle = Literal["computes", "shows", "proves", "mends"]
OUT = [*SAMPLE[:-1], "out.npy"]
CLASSES = [*TABLE, "--conditioning_key", "adm", "--class_column", "class"]
TOKENS = [*TABLE, "--conditioning_key", "crossattn", "--context_column", "embedding"]
STATES = ["sample", "tokens", *OUT[2:], "--encoder_hidden_states", "states.npy"]
INPUTS = ["sample", "joined", *OUT[2:], "--concat_inputs", "inputs.npy"]
SMALL = ["train", "--config", "options.yaml", *SIZE, "--max_train_steps", "2", "--output_dir", "new"]
"""Small even where the changed file has lost the size."""
CACHED = [*TRAIN, *LATENTS]
DECODED = ["sample", "latent", *OUT[2:]]
TRANSLATE = ["convert-config", "compvis/model.yaml", "--out", "run.yaml"]
LATEST = [*RESUME, "--resume_from_checkpoint", "latest"]
UNREADABLE = ("NaN", "Infinity", "-Infinity", "1e999", "4000 digits", "10^30", "deep", "lone surrogate", "twice")
"""Changes of a value for which a file is refused before anyone looks at the key."""
ALLOWED = (
    ("train --context_column <- table/metadata.csv", "class", ""),  # a column that this run does not read
    ("train --class_column <- table/metadata.csv", "hint", ""),
    ("train --class_column <- table/metadata.csv", "embedding", ""),
    ("plot <- run/evaluation/steps.csv", "standard_error", ""),  # not drawn
    ("plot <- run/evaluation/steps.csv", "draws", ""),
    ("verify <- run/proof.json", "", "twice"),  # sealing it again writes every key once
    ("convert", "", "doubled"),  # a zip archive with bytes before it is that archive, also for torch.load
)
"""Reader, place and mutation (beginnings) that rightly make no difference."""


@dataclass(frozen=True, eq=False)
class Target:
    """A file, how it is changed, who reads it, and which files are the result.

    Attributes:
        path: of the file; a pattern where a part of it is random.
        mutate: from `mutate`.
        reader: a command line, or a name of `hostile_cases.READERS`.
        results: patterns of the files that are the result, below the working folder.
        oracle: what a right outcome is.
        prepare: seals the changed file.
        intact: subject that belongs at the path, if it is not there.
    """

    path: str
    mutate: Mutate
    reader: list[str] | str
    results: tuple[str, ...] = ()
    oracle: Oracle = "computes"
    prepare: Callable[[Path], None] = lambda work: None
    intact: str | None = None

    @property
    def name(self) -> str:
        """Reader and file."""
        return f"{reader_name(self.reader)} <- {self.path}"


def targets() -> list[Target]:
    """Every file with a command that reads it."""
    json_, yaml_, rows, table = mutate.mutate_json, mutate.mutate_yaml, mutate.mutate_rows, mutate.mutate_table
    array, header, any_bytes = mutate.mutate_array, mutate.mutate_header, mutate.mutate_bytes
    index, unet, scheduler = "run/model_index.json", "run/unet/config.json", "run/scheduler/scheduler_config.json"
    weights = ("unet/*.safetensors", "scheduler/*", "model_index.json", "ema.json", "metrics.jsonl")
    run, new, out = (tuple(f"{folder}/{name}" for name in weights) for folder in ("run", "new", "out"))
    compvis = ("back.ckpt", "back.yaml")
    converted = "compvis/converted"
    made = [Target(path, json_, reader, results) for path in (index, unet, scheduler) for reader, results in (
        (OUT, ("out.npy",)), (EVALUATE, ("out/evaluation.json",)))]  # fmt: skip
    made += [
        Target(scheduler, json_, FIT, ("run/scheduler/*", "run/variance_fit.json")),
        Target("run/variance_fit.json", json_, [*FIT[:2], "--undo"], ("run/scheduler/*",)),
        Target("run/config.yaml", yaml_, EVALUATE, ("out/evaluation.json",)),
        Target("run/unet/diffusion_pytorch_model.safetensors", header, OUT, ("out.npy",)),
        Target("run/checkpoint-4/state.json", json_, LATEST, run, prepare=seal),
        Target("run/checkpoint-4/manifest.json", json_, LATEST, run, prepare=seal_manifest),
        Target("run/checkpoint-4/model.safetensors", header, LATEST, run, prepare=seal),
        Target("run/checkpoint-4/optimizer.safetensors", header, LATEST, run, prepare=seal),
        Target("run/checkpoint-4/state.json", any_bytes, LATEST, run, "mends", unfinish),
        Target("run/metrics.jsonl", rows, LATEST, run[:-1], "mends", unfinish),
        Target("options.yaml", yaml_, SMALL, new,
               intact="run/config.yaml"),
        Target("table/metadata.csv", table, CLASSES, new),
        Target("table/metadata.csv", table, TOKENS, new),
        Target("table/metadata.jsonl", rows, CLASSES, new,
               prepare=lambda work: (work / "table/metadata.csv").unlink(), intact="options/metadata.jsonl"),
        Target("table/embeddings/00.npy", array,
               TOKENS, new),
        Target("states.npy", array, STATES, ("out.npy",),
               intact="options/states.npy"),
        Target("inputs.npy", array, INPUTS, ("out.npy",),
               intact="options/inputs.npy"),
        Target("betas.npy", array, [*IMAGES, "--trained_betas", "betas.npy"], new, intact="options/betas.npy"),
        Target("vae/config.json", json_, CACHED, new),
        Target("latent/vqvae/config.json", json_, DECODED, ("out.npy",)),
        Target("latent/vqvae/diffusion_pytorch_model.safetensors", header, DECODED, ("out.npy",)),
        Target("cache/*/manifest.json", json_, CACHED, new, "mends"),
        Target("cache/*/records-*.bin", any_bytes, CACHED, new, "mends"),
        Target("compvis/model.yaml", yaml_, FROM_COMPVIS, out),
        Target("compvis/model.yaml", yaml_, TRANSLATE, ("run.yaml",)),
        Target("compvis/model.ckpt", any_bytes, FROM_COMPVIS, out),
        Target("openai/flags.json", json_, FROM_OPENAI, out),
        Target("openai/model.pt", any_bytes, FROM_OPENAI, out),
        *(Target(f"{converted}/{name}", json_, TO_COMPVIS, compvis) for name in (
            "model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "ema.json", "conversion.json")),
        Target(f"{converted}/ema.json", json_, CHECK),
        Target(f"{converted}/scheduler/scheduler_config.json", json_, CHECK),
        Target("run/proof.json", json_, VERIFY, prepare=seal_proof),
        Target("run/proof.json", any_bytes, VERIFY, oracle="proves"),
        *(Target(f"run/{name}", any_bytes, VERIFY, oracle="proves") for name in (
            "README.md", "config.yaml", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
            "model_index.json", "card/samples.npz", "metrics.jsonl", "evaluation/evaluation.json")),
Target("run/card/samples.npz", any_bytes, VERIFY, oracle="shows", prepare=reprove),  # compares by itself
        Target("run/variance_fit.json", json_, PLOT, ("plots/*.png",)),
        Target("run/evaluation/evaluation.json", json_, PLOT, ("plots/*.png",), "shows"),
        Target("run/evaluation/steps.csv", table, PLOT, ("plots/*.png",)),
        *(Target(f"run/{name}", how, reader, oracle="shows") for name, how in (
            ("environment.json", json_), ("evaluation/evaluation.json", json_), ("metrics.jsonl", rows),
            ("config.yaml", yaml_), ("variance_fit.json", json_), ("best/monitor.json", json_)) for reader in (
            REPORT, "make_card")),
        Target("run/finished.json", json_, REPORT, oracle="shows"),
        Target("run/.hub.json", json_, DOCTOR, oracle="shows", intact="options/hub.json"),
        Target("run/logvar/config.json", json_, PLOT, ("plots/*.png",)),
        Target("run/ema.json", json_, "from_pretrained"),
    ]  # fmt: skip
    return made


@dataclass(frozen=True)
class Result:
    """One mutation, what its reader did, and the digest of what it computed."""

    target: Target
    mutation: Mutation
    outcome: Outcome
    digest: str

    @property
    def line(self) -> str:
        """For a person."""
        said = self.outcome.stderr.strip().splitlines()
        place = f"{self.mutation.place}: " if self.mutation.place else ""
        return (
            f"{self.target.name}: {place}{self.mutation.name}: status {self.outcome.status} {(said or [''])[-1][:150]}"
        )


def digest_of(work: Path, target: Target, outcome: Outcome) -> str:
    """A digest of a reader's result files, or of what it printed if it writes none."""
    digest = hashlib.sha256()
    if not target.results:
        digest.update(outcome.stdout.encode())
    for pattern in target.results:
        for path in sorted(work.glob(pattern)):
            digest.update(path.relative_to(work).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def path_of(folder: Path, pattern: str) -> Path:
    """The path in a folder that a pattern means."""
    return next(folder.glob(pattern)) if "*" in pattern else folder / pattern


def run_target(target: Target, mutation: Mutation | None, source: Path, scratch: Path) -> tuple[Outcome, str]:
    """Run a target's reader on a changed file, or (None) on the intact one."""
    shutil.rmtree(scratch, ignore_errors=True)
    work = scratch / "work"
    shutil.copytree(source, work)
    path = path_of(work, target.path)
    if target.intact is not None:
        shutil.copy(source / target.intact, path)
    if mutation is not None:
        path.write_bytes(mutation.data)
    target.prepare(work)
    work_of = command(target.reader) if isinstance(target.reader, list) else READERS[target.reader]
    outcome = run_forked(work_of, work, scratch)
    return outcome, digest_of(work, target, outcome)


def silent(results: list[Result], intact: dict[Target, tuple[Outcome, str]]) -> list[Result]:
    """The results that are silently wrong; see the table at the top."""
    read: set[tuple[Target, str]] = set()
    for each in results:
        unreadable = each.mutation.name.split(": ")[-1].startswith(UNREADABLE)
        if not unreadable and (each.outcome.status or each.digest != intact[each.target][1]):
            read.add((each.target, each.mutation.place))
    return [
        each for each in results if _is_silent(each, *intact[each.target], (each.target, each.mutation.place) in read)
    ]


def _is_silent(result: Result, usual: Outcome, usual_digest: str, is_read: bool) -> bool:
    target, mutation = result.target, result.mutation
    if result.outcome.status or target.oracle == "shows":
        return False
    if any(all(map(str.startswith, (target.name, mutation.place, mutation.name), allowed)) for allowed in ALLOWED):
        return False
    if target.oracle == "mends":
        warned = result.outcome.stderr.count("warning:") > usual.stderr.count("warning:")
        return result.digest != usual_digest or (mutation.invalid and is_read and not warned)
    return target.oracle == "proves" or (mutation.invalid and (is_read or result.digest != usual_digest))


def main() -> int:
    """Run the mutations and print the counts; status 1 if any was misread."""
    parser = argparse.ArgumentParser(description="Structure-aware mutations of every file.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name has this text")
    parser.add_argument("--folder", type=Path, default=None, help="keeps the intact folders here between runs")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        subjects.environment(place / "home")
        subjects.import_everything()
        source = (arguments.folder or place).resolve() / "subjects"
        subjects.build(source)
        chosen = [target for target in targets() if arguments.only in target.name]
        draw, intact, data = random.Random(arguments.seed), {}, {}
        for target in chosen:
            intact[target] = run_target(target, None, source, place / "case")
            if intact[target][0].status:
                raise SystemExit(f"{target.name} fails on intact files: {intact[target][0].stderr[-2000:]}")
            data[target] = path_of(source, target.intact or target.path).read_bytes()
        results, broken = [], []
        with suppress(KeyboardInterrupt):  # what was done until then is summarized
            for number in range(arguments.count):
                target = chosen[number % len(chosen)]
                mutation = target.mutate(data[target], draw)
                if mutation.data == data[target]:
                    continue
                result = Result(target, mutation, *run_target(target, mutation, source, place / "case"))
                results.append(result)
                wrong = findings(result.outcome)
                if wrong:
                    broken.append(result)
                    print(f"BROKEN {result.line}: {'; '.join(wrong)}", flush=True)
        misread = silent(results, intact)
        for result in misread:
            how = "same result" if result.digest == intact[result.target][1] else "other result"
            print(f"SILENT {result.line} ({how})")
    kinds = Counter("refused" if each.outcome.status else "result" for each in results)
    per_kind: dict[str, int] = defaultdict(int)
    for each in results:
        per_kind[each.target.mutate.__name__.removeprefix("mutate_")] += 1
    print(
        f"mutations {len(results)} of {len(chosen)} pairs of file and reader, seed {arguments.seed}: {dict(per_kind)}"
    )
    print(f"refused   {kinds['refused']}, with a result {kinds['result']}")
    print(f"broken    {len(broken)}")
    print(f"silent    {len(misread)}")
    print(f"seconds   {time.perf_counter() - start:.0f}")
    return 1 if broken or misread else 0


if __name__ == "__main__":
    sys.exit(main())
