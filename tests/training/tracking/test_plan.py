"""The printed plan: warnings about runs that cannot work, and the trial of a few steps."""

from __future__ import annotations

import pytest
from helpers.runs import tiny_run

from diffusers_ddpm_ext.cli import main
from diffusers_ddpm_ext.errors import ConfigError
from diffusers_ddpm_ext.training import trainer
from diffusers_ddpm_ext.training.checkpoints.output_dir import check_output_dir
from diffusers_ddpm_ext.training.config.options import OptimOptions, OutputOptions
from diffusers_ddpm_ext.training.loop.setup import build_setup
from diffusers_ddpm_ext.training.loop.trial import run_trial
from diffusers_ddpm_ext.training.tracking.plan import (
    Plan,
    Trial,
    describe_trial,
    epochs_warning,
    format_duration,
    warmup_warning,
)


@pytest.mark.parametrize(
    ("warmup", "steps", "warned"), [(500, 200, True), (10, 10, True), (9, 10, False), (0, 1, False)]
)
def test_a_warm_up_longer_than_the_run(warmup, steps, warned):
    text = warmup_warning(OptimOptions(lr_warmup_steps=warmup), steps)
    assert (text is not None) == warned
    assert text is None or f"--lr_warmup_steps {steps // 10}" in text


@pytest.mark.parametrize(
    ("steps", "images", "remedy"), [(1000, 4, 100), (10_000, 16, 400), (99_999, 16 * 400, None), (1, 10**6, None)]
)
def test_epochs_in_the_thousands(steps, images, remedy):
    """The remedy, steps of 100 epochs, is the number of images x 100 over the batch of 4."""
    text = epochs_warning(Plan(4, 1, 1, steps, images))
    assert (text is None) == (remedy is None)
    assert text is None or f"--max_train_steps {remedy} are 100 epochs" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 seconds"), (119, "119 seconds"), (600, "10 minutes"), (9000, "2.5 hours"), (1e6, "12 days")],
)
def test_durations_have_a_unit_that_fits(seconds, text):
    assert format_duration(seconds) == text


def test_a_trial_names_time_speed_and_a_batch_that_fits():
    plan = Plan(8, 2, 1, 1000, 100)
    text = describe_trial(Trial(0.5, 10**6, 10**8, is_extrapolated=False), plan)
    assert "0.5 s per step, 32 images/s" in text
    assert "8.3 minutes for 1,000 steps" in text
    assert "up to --train_batch_size 64 fits" in text
    assert "8 images do NOT fit" in describe_trial(Trial(0.5, 10**8, 3 * 10**8, is_extrapolated=False), plan)
    full = describe_trial(Trial(None, None, 0, is_extrapolated=False), plan)
    assert "NOT ENOUGH" in full
    assert "--train_batch_size 4 --gradient_accumulation_steps 4" in full


def test_a_trial_measures_the_memory_of_an_image(tmp_path):
    """Activations grow with the area of an image and not with the batch."""

    def image_bytes(**options) -> int:
        trial = run_trial(build_setup(tiny_run(tmp_path / "run", **options)))
        assert trial.seconds > 0
        return trial.image_bytes

    small = image_bytes(train_batch_size=4)
    assert image_bytes(train_batch_size=16) == pytest.approx(small, rel=0.1)
    assert image_bytes(train_batch_size=4, gradient_accumulation_steps=3) == pytest.approx(small, rel=0.1)
    assert image_bytes(resolution=(16, 16)) == pytest.approx(4 * small, rel=0.4)


def test_a_dry_run_takes_steps_and_writes_nothing(tmp_path, capsys):
    assert trainer.train(tiny_run(tmp_path / "run", dry_run=True)) is None
    output = capsys.readouterr().out
    assert "s per step" in output
    assert "fastest of three steps" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/run", "/sys/a/b"])
def test_folders_in_which_nobody_can_write(folder):
    with pytest.raises(ConfigError, match=r"cannot be written|not writable"):
        check_output_dir(OutputOptions(output_dir=folder))


def test_a_dry_run_refuses_what_the_start_would(tmp_path, capsys):
    for options, message in [
        (["--report_to", "swanlab"], "swanlab is not installed"),
        (["--resume_from_checkpoint", "latest"], "no checkpoint"),
        (["--ckpt_path", "nowhere.ckpt"], "does not exist"),
    ]:
        folder = str(tmp_path / "run")
        assert main(["train", "--dry_run", "--output_dir", folder, *options]) == 2
        assert message in capsys.readouterr().err
