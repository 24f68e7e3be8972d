"""What the files alone say about a resume is said before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forged_checkpoints import forge_state
from helpers.paths import TESTS
from helpers.runs import tiny_flags, tiny_run

from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training.checkpoints.identity import changed_options, check_resume, run_identity
from diffusers_ddpm_ext.training.checkpoints.state_file import Progress, ScalarState, StateFile, encode_state
from diffusers_ddpm_ext.training.checkpoints.writer import write_checkpoint


def make_checkpoint(folder: Path, **options: object) -> Path:
    """A checkpoint at step 2 with the facts of a run, without its tensors."""
    config = tiny_run(folder, **options)
    identity = run_identity(config, 8, config.loop.max_train_steps, None)
    progress = Progress(2, 0, 16, 0, 1, identity, "fingerprint")
    tables: dict = {"model.safetensors": {}, "optimizer.safetensors": {}}
    state = StateFile(progress, ScalarState([], {}, {}, None, None), tables)
    folder.mkdir()
    config.write_resolved(folder / "config.yaml")
    (folder / "metrics.jsonl").touch()
    return write_checkpoint(folder, 2, lambda draft: (draft / "state.json").write_text(encode_state(state)))


CHANGES = {
    "learning rate": ({"learning_rate": 5e-3}, "--learning_rate is 0.005 and was 0.002"),
    "batch": ({"train_batch_size": 16}, "--effective_batch is 16 and was 8"),
    "length": ({"max_train_steps": 9}, "--max_train_steps is 9 and was 6"),
    "network": ({"block_out_channels": [8, 8]}, "--block_out_channels"),
    "size of the images": ({"resolution": 16}, "--resolution"),
    "seed": ({"seed": 7}, "--seed is 7 and was 0"),
    "two at once": ({"seed": 7, "loss_type": "l1"}, "--loss_type is l1 and was l2; --seed"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("requested", ["latest", "auto", "its path"])
def test_changed_options_are_named(case: str, requested: str, tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path / "run")
    source = str(checkpoint) if requested == "its path" else requested
    options, match = CHANGES[case]
    with pytest.raises(ConfigError, match=match):
        check_resume(tiny_run(tmp_path / "run", resume_from_checkpoint=source, **options))
    check_resume(tiny_run(tmp_path / "run", resume_from_checkpoint=source))
    check_resume(tiny_run(tmp_path / "run", resume_from_checkpoint=source, allow_config_change=True, **options))


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="holds no checkpoint; use auto"):
            check_resume(tiny_run(place, resume_from_checkpoint="latest"))
        check_resume(tiny_run(place, resume_from_checkpoint="auto"))


def test_what_cannot_be_read_is_left_to_the_start(tmp_path: Path):
    """Damage is reported there, where it is set aside, too."""
    checkpoint = make_checkpoint(tmp_path / "run")
    forge_state(checkpoint, lambda state: state.pop("progress"))
    check_resume(tiny_run(tmp_path / "run", resume_from_checkpoint="latest", seed=9))
    (checkpoint / "manifest.json").write_text("{")
    check_resume(tiny_run(tmp_path / "run", resume_from_checkpoint="latest", seed=9))


def test_the_length_counts_only_where_both_depend_on_it():
    assert changed_options({"a": 1, "max_train_steps": 3}, {"a": 1}) == []
    assert changed_options({"a": 1}, {"a": 1, "max_train_steps": 3}) == []
    assert len(changed_options({"max_train_steps": 4}, {"max_train_steps": 3})) == 1


def test_a_checkpoint_of_a_version_without_an_option_had_its_default():
    """Defaults are tuples, and what a checkpoint stores are lists; true is not 1."""
    assert changed_options({"random_crop_scale": [0.8, 1.0], "rotate90": False}, {}) == []
    assert len(changed_options({"random_crop_scale": [0.5, 1.0], "rotate90": True}, {})) == 2
    assert len(changed_options({"rotate90": True}, {"rotate90": 1})) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resume_from_checkpoint": "latest", "learning_rate": 1}, "--learning_rate is 1.0 and was 0.002"),
        ({"resume_from_checkpoint": "latest", "output_dir": "empty"}, "holds no checkpoint"),
        ({"overwrite_output_dir": True, "output_dir": "photos"}, "not the folder of a run"),
    ],
)
def test_the_command_line_says_so_without_torch(options: dict[str, object], match: str, tmp_path: Path):
    make_checkpoint(tmp_path / "run")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    script = (
        "import sys; from diffusers_ddpm_ext import cli; status = cli.main(sys.argv[1:]);"
        " assert not {'torch', 'diffusers'} & {*sys.modules}; sys.exit(status)"
    )
    command = [sys.executable, "-c", script, "train", *tiny_flags(**{"output_dir": "run"} | options)]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert match in done.stderr
