"""A run captured, written, read and restored is bit-identical, also after further steps."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from helpers.state_cases import advance, assert_same, bits, draws, small_run, small_task, through_files
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_ddpm_ext.models.ema import LitEMA
from diffusers_ddpm_ext.training.checkpoints.restore import restore_snapshot
from diffusers_ddpm_ext.training.checkpoints.snapshot import Progress, library_versions, read_snapshot, write_snapshot
from diffusers_ddpm_ext.training.checkpoints.state import TrainingObjects, capture_snapshot
from diffusers_ddpm_ext.training.factory.optimizer import adamw, lr_schedule

PROGRESS = Progress(3, 1, 48, 7, 1, {"seed": 7}, "abc", {"metrics_size": 3}, {"best": [0.5, float("inf")]})


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("learn_logvar", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_resumed_run_equals_the_uninterrupted_run(accumulation, learn_logvar, prediction_type, tmp_path):
    def fresh():
        return small_run(small_task(prediction_type, learn_logvar))

    straight, saved, resumed = fresh(), fresh(), fresh()
    advance(straight, 6, accumulation)
    advance(saved, 3, accumulation)
    snapshot = through_files(capture_snapshot(saved.objects, saved.progress), tmp_path)
    advance(resumed, 1, accumulation)  # restoring must also replace an existing state
    progress = restore_snapshot(snapshot, resumed.objects)
    assert progress == saved.progress
    resumed.step = progress.step
    assert resumed.objects.lr_scheduler.get_last_lr() == saved.objects.lr_scheduler.get_last_lr()
    for run in (saved, resumed):
        advance(run, 3, accumulation)
    end = capture_snapshot(straight.objects, straight.progress)
    assert_same(end, capture_snapshot(saved.objects, saved.progress))
    assert_same(end, capture_snapshot(resumed.objects, resumed.progress))
    assert resumed.objects.lr_scheduler.get_last_lr() == straight.objects.lr_scheduler.get_last_lr()
    assert resumed.objects.ema.num_updates == 6


@pytest.mark.parametrize("schedule", ["constant", "cosine", "constant_with_warmup", "LambdaLinearScheduler"])
def test_before_the_first_step(schedule, tmp_path):
    """torch creates an optimizer's missing state by a step with zero gradients; capturing must not do that."""
    straight, saved, resumed = (small_run(small_task(), schedule=schedule) for _ in range(3))
    with torch.no_grad():
        saved.task.denoiser.conv_in.bias.fill_(-0.0)
        straight.task.denoiser.conv_in.bias.fill_(-0.0)
    snapshot = through_files(capture_snapshot(saved.objects, saved.progress), tmp_path)
    assert not saved.objects.optimizer.state
    assert snapshot.optimizer == {}
    advance(resumed, 2)
    resumed.step = restore_snapshot(snapshot, resumed.objects).step
    assert not resumed.objects.optimizer.state
    assert bits(resumed.task.denoiser.conv_in.bias).tolist() == bits(torch.full((8,), -0.0)).tolist()
    for run in (straight, saved, resumed):
        advance(run, 2)
    end = capture_snapshot(straight.objects, straight.progress)
    assert_same(end, capture_snapshot(saved.objects, saved.progress))
    assert_same(end, capture_snapshot(resumed.objects, resumed.progress))
    assert {int(v) for k, v in end.optimizer.items() if k.endswith(".step")} == {2}


def test_snapshot_shares_no_memory():
    run, other = small_run(small_task()), small_run(small_task())
    advance(run, 2)
    snapshot, second = capture_snapshot(run.objects, run.progress), capture_snapshot(run.objects, run.progress)
    kept = copy.deepcopy(snapshot)
    pointers = [t.untyped_storage().data_ptr() for file in snapshot.files.values() for t in file.values()]
    assert len(set(pointers)) == len(pointers)
    restore_snapshot(snapshot, other.objects)
    other.step = 2
    for trained in (run, other):
        advance(trained, 2)
    assert_same(snapshot, kept)
    assert_same(second, kept)


def test_snapshot_that_shares_memory_is_the_same_in_files(tmp_path):
    objects = unusual_objects(0)
    train_unusual(objects, range(2))
    shared = capture_snapshot(objects, PROGRESS, share_memory=True)
    assert shared.model["first.bias"].data_ptr() == objects.task.first.bias.data_ptr()
    assert_same(through_files(shared, tmp_path), capture_snapshot(objects, PROGRESS))


class UnusualTask(nn.Module):
    """Tied weights, a scalar, a layer that is never used, a frozen one, channels last, half precision, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.never = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("bf16", torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, x, image):
        return self.norm(self.tied(self.first(x)) * self.scale).square().mean() + self.conv(image).square().mean()


def unusual_objects(seed: int) -> TrainingObjects:
    torch.manual_seed(seed)
    module = UnusualTask()
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = adamw([{"name": "all", "params": trainable}], 1e-2, (0.9, 0.99), 1e-8)
    return TrainingObjects(module, optimizer, lr_schedule("linear", optimizer, 10, 2), LitEMA(module))


def train_unusual(objects: TrainingObjects, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, generator=generator)
        objects.task(x, torch.randn(1, 4, 5, 5, generator=generator)).backward()
        objects.optimizer.step()
        objects.optimizer.zero_grad()
        objects.lr_scheduler.step()
        objects.ema.step(objects.task)


def test_unusual_tensors_survive_a_round_trip(tmp_path):
    saved, resumed, straight = unusual_objects(0), unusual_objects(1), unusual_objects(0)
    train_unusual(straight, range(6))
    train_unusual(saved, range(3))
    snapshot = through_files(capture_snapshot(saved, PROGRESS), tmp_path)
    assert_same(snapshot, capture_snapshot(saved, PROGRESS))
    assert not [key for key in snapshot.optimizer if "never" in key or "frozen" in key or "tied" in key]
    assert snapshot.model["scale"].shape == ()
    assert "passing" not in snapshot.model
    assert restore_snapshot(snapshot, resumed) == PROGRESS
    task, state = resumed.task, resumed.optimizer.state
    assert task.tied.weight is task.first.weight
    assert task.never.weight not in state
    # A fused step reads memory in order: moments need the strides of their weights.
    assert state[task.conv.weight]["exp_avg"].stride() == task.conv.weight.stride() != (36, 9, 3, 1)
    train_unusual(resumed, range(3, 6))
    assert_same(capture_snapshot(straight, PROGRESS), capture_snapshot(resumed, PROGRESS))


def test_a_parameter_first_used_after_restoring_starts_its_own_count():
    """It has no state in the snapshot and must count from its first gradient."""
    saved, resumed = unusual_objects(0), unusual_objects(1)
    train_unusual(saved, range(2))
    train_unusual(resumed, range(1))
    restore_snapshot(capture_snapshot(saved, PROGRESS), resumed)
    for objects in (saved, resumed):
        objects.task.never(torch.ones(1, 2)).sum().backward()
        objects.optimizer.step()
    assert int(resumed.optimizer.state[resumed.task.never.weight]["step"]) == 1
    assert_same(capture_snapshot(saved, PROGRESS), capture_snapshot(resumed, PROGRESS))


def test_snapshots_do_not_depend_on_wrappers(tmp_path):
    """`torch.compile` around the task or inside it, and Accelerate's optimizer: same names, same values."""
    plain, wrapped, inside = (small_run(small_task()) for _ in range(3))
    for run in (plain, wrapped, inside):
        advance(run, 2)
    expected = capture_snapshot(plain.objects, plain.progress)
    from accelerate import Accelerator

    optimizer = Accelerator(cpu=True).prepare(wrapped.objects.optimizer)
    assert isinstance(optimizer, AcceleratedOptimizer)
    objects = replace(wrapped.objects, task=torch.compile(wrapped.task, backend="eager"), optimizer=optimizer)
    assert_same(capture_snapshot(objects, plain.progress), expected)
    inside.task.denoiser = torch.compile(inside.task.denoiser, backend="eager")
    assert_same(capture_snapshot(inside.objects, plain.progress), expected)
    fresh = small_run(small_task())
    advance(fresh, 1)
    fresh.task.denoiser = torch.compile(fresh.task.denoiser, backend="eager")
    restore_snapshot(expected, replace(fresh.objects, task=torch.compile(fresh.task, backend="eager")))
    assert_same(capture_snapshot(fresh.objects, plain.progress), expected)


def test_network_and_logvar_can_be_loaded_alone():
    run = small_run(small_task())
    model = capture_snapshot(run.objects, run.progress).model
    network = {name.removeprefix("denoiser."): t for name, t in model.items() if name.startswith("denoiser.")}
    small_task().denoiser.load_state_dict(network)
    assert torch.equal(model["objective.logvar"], run.task.objective.logvar)


def test_scaler_is_restored():
    run = small_run(small_task())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler._scale.fill_(64.0)
    objects = replace(run.objects, scaler=scaler)
    fresh = torch.amp.GradScaler("cpu", init_scale=2.0)
    restore_snapshot(capture_snapshot(objects, run.progress), replace(run.objects, scaler=fresh))
    fresh.scale(torch.ones(()))
    assert fresh.get_scale() == 64.0


def test_current_options_can_be_kept():
    """The schedule continues at the snapshot's step, with the new peak rate; the EMA with the new decay."""
    saved, other = small_run(small_task()), small_run(small_task())
    advance(saved, 4)
    for group in other.objects.optimizer.param_groups:
        group["initial_lr"] *= 3
    other.objects.lr_scheduler.base_lrs = [3 * rate for rate in other.objects.lr_scheduler.base_lrs]
    other.objects.optimizer.param_groups[0]["weight_decay"] = 0.5
    other.objects.ema.decay = 0.5
    restore_snapshot(capture_snapshot(saved.objects, saved.progress), other.objects, keep_current_options=True)
    expected = [3 * rate for rate in saved.objects.lr_scheduler.get_last_lr()]
    assert other.objects.lr_scheduler.get_last_lr() == pytest.approx(expected, rel=1e-12)
    assert [group["lr"] for group in other.objects.optimizer.param_groups] == pytest.approx(expected, rel=1e-12)
    assert other.objects.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert (other.objects.ema.decay, other.objects.ema.num_updates) == (0.5, 4)


def test_no_snapshot_inside_an_ema_scope():
    run = small_run(small_task())
    with run.objects.ema.scope(run.task.denoiser), pytest.raises(ValueError, match="scope"):
        capture_snapshot(run.objects, run.progress)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    run = small_run(small_task())
    advance(run, 1)
    write_snapshot(capture_snapshot(run.objects, run.progress), folder)
    return folder


def changed_copy(written, tmp_path, name, change):
    """A copy of a snapshot's folder with one file changed."""
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if name == "state.json":
        state = json.loads((tmp_path / name).read_text())
        replacement = change(state)
        (tmp_path / name).write_text(json.dumps(replacement if isinstance(replacement, list) else state))
    else:
        tensors = load_file(tmp_path / name)
        change(tensors)
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / name)
    return tmp_path


BIAS = "denoiser.conv_in.bias"
DAMAGE = {
    "missing tensor": ("model.safetensors", lambda t: t.pop(BIAS), rf"model\.safetensors: {BIAS} is missing"),
    "unknown tensor": ("ema.safetensors", lambda t: t.update(x=torch.ones(1)), r"ema\.safetensors: x is unexpected"),
    "shape": (
        "optimizer.safetensors",
        lambda t: t.update({f"{BIAS}.exp_avg": torch.ones(3)}),
        rf"optimizer\.safetensors: {BIAS}\.exp_avg is .*3",
    ),
    "dtype": ("model.safetensors", lambda t: t.update({BIAS: t[BIAS].double()}), rf"{BIAS} is .*float64"),
    "newer": ("state.json", lambda s: s.update(format=2), r"state\.json: format 2 is newer than 1.*update"),
    "no format": ("state.json", lambda s: s.pop("format"), r"must have \"format\": 1"),
    "true is not 1": ("state.json", lambda s: s.update(format=True), "format"),
    "no object": ("state.json", lambda s: ["format"], "format"),
    "missing key": ("state.json", lambda s: s["progress"].pop("seed"), r"state\.json: progress\.seed is missing"),
    "unknown key": ("state.json", lambda s: s["numbers"].update(x=1), r"numbers\.x is unexpected"),
    "wrong type": ("state.json", lambda s: s["progress"].update(step="1"), r"progress\.step is '1'"),
    "no file": ("state.json", lambda s: s["tensors"].pop("model.safetensors"), "tensors names"),
    "no average": ("state.json", lambda s: s["numbers"].update(ema=None), r"numbers\.ema"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_reading_names_file_and_key(written, tmp_path, case):
    name, change, match = DAMAGE[case]
    with pytest.raises(ValueError, match=match):
        read_snapshot(changed_copy(written, tmp_path, name, change))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("content", [None, b"", b"\x80\x04.", b"[" * 100_000])
def test_unreadable_files_are_named(written, tmp_path, name, content):
    changed_copy(written, tmp_path, "state.json", lambda s: s)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_snapshot(tmp_path)


def test_progress_survives_a_round_trip(written, tmp_path):
    snapshot = replace(read_snapshot(written), progress=PROGRESS)
    assert through_files(snapshot, tmp_path).progress == PROGRESS
    assert PROGRESS.versions == library_versions()
    assert {"torch", "diffusers", "python", "diffusers-ddpm-ext"} <= PROGRESS.versions.keys()


def test_only_json_is_written(written, tmp_path):
    snapshot = replace(read_snapshot(written), progress=replace(PROGRESS, config={"folder": tmp_path}))
    with pytest.raises(ValueError, match="JSON"):
        write_snapshot(snapshot, tmp_path)
    assert not list(tmp_path.iterdir())


def without_ema(objects: TrainingObjects) -> TrainingObjects:
    return replace(objects, ema=None)


MISMATCHES = {
    "another network": (lambda: small_run(small_task(channels=3)).objects, r"model\.safetensors.*denoiser\.conv_in"),
    "another optimizer": (
        lambda: small_run(small_task(learn_logvar=False)).objects,
        r"state\.json.*objective\.logvar",
    ),
    "no average": (lambda: without_ema(small_run(small_task()).objects), r"ema\.safetensors.*this run has none"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_mismatched_snapshot_changes_nothing(written, case):
    make, match = MISMATCHES[case]
    objects = make()
    before = capture_snapshot(objects, PROGRESS)
    with pytest.raises(ValueError, match=match):
        restore_snapshot(read_snapshot(written), objects)
    assert_same(before, capture_snapshot(objects, PROGRESS))


def test_a_missing_ema_is_refused(written):
    run = small_run(small_task())
    with pytest.raises(ValueError, match=r"ema\.safetensors is missing"):
        restore_snapshot(capture_snapshot(without_ema(run.objects), PROGRESS), run.objects)
    restore_snapshot(read_snapshot(written), without_ema(run.objects), keep_current_options=True)


def test_optimizer_state_that_cannot_be_stored_is_refused():
    run = small_run(small_task())
    advance(run, 1)
    next(iter(run.objects.optimizer.state.values()))["history"] = [torch.ones(1)]
    with pytest.raises(ValueError, match="'history' is a list"):
        capture_snapshot(run.objects, run.progress)


def test_other_state_of_an_optimizer_survives_a_round_trip(tmp_path):
    """Some optimizers have plain numbers, and tensors of other shapes than their parameters'."""
    run, fresh = small_run(small_task()), small_run(small_task())
    advance(run, 1)
    bias = run.task.denoiser.conv_in.bias
    run.objects.optimizer.state[bias] |= {"count": 3, "table": torch.arange(5)}
    restore_snapshot(through_files(capture_snapshot(run.objects, run.progress), tmp_path), fresh.objects)
    state = fresh.objects.optimizer.state[fresh.task.denoiser.conv_in.bias]
    assert state["count"] == 3
    assert state["table"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("change", [{"groups": [3]}, {"lr_scheduler": {}}, {"slots": {"x": {}}}])
def test_inconsistent_scalars_are_refused(written, change):
    snapshot = read_snapshot(written)
    with pytest.raises(ValueError, match=r"state\.json"):
        restore_snapshot(
            replace(snapshot, scalars=replace(snapshot.scalars, **change)), small_run(small_task()).objects
        )


def test_restoring_without_a_snapshot_is_refused():
    with pytest.raises(ValueError, match="no snapshot"):
        restore_snapshot(None, small_run(small_task()).objects)


def test_draws_depend_on_the_step():
    """These tests would prove nothing if every step were the same."""
    one, other = draws(0, torch.arange(4)), draws(1, torch.arange(4))
    assert not torch.equal(one[1], other[1])


class NestedAdamW(torch.optim.AdamW):
    """Puts a moment into an inner dict, as bitsandbytes does with quantized state."""

    def state_dict(self):
        state = super().state_dict()
        nested = {
            number: {"step": slots["step"], "quant": {"exp_avg": slots["exp_avg"]}, "exp_avg_sq": slots["exp_avg_sq"]}
            for number, slots in state["state"].items()
        }
        return state | {"state": nested}

    def load_state_dict(self, state_dict):
        flat = {
            number: {k: v for k, v in slots.items() if k != "quant"} | slots["quant"]
            for number, slots in state_dict["state"].items()
        }
        super().load_state_dict(dict(state_dict) | {"state": flat})


def test_nested_optimizer_state_survives_a_round_trip(tmp_path):
    runs = [small_run(small_task()) for _ in range(2)]
    for number, run in enumerate(runs):
        optimizer = NestedAdamW(run.objects.optimizer.param_groups, lr=1e-3)
        runs[number].objects = replace(
            run.objects, optimizer=optimizer, lr_scheduler=lr_schedule("constant", optimizer, 9)
        )
    saved, resumed = runs
    advance(saved, 2)
    snapshot = through_files(capture_snapshot(saved.objects, saved.progress), tmp_path)
    assert "denoiser.conv_in.weight.quant/exp_avg" in snapshot.optimizer
    advance(resumed, 1)
    resumed.step = restore_snapshot(snapshot, resumed.objects).step
    for run in runs:
        advance(run, 2)
    assert_same(capture_snapshot(saved.objects, saved.progress), capture_snapshot(resumed.objects, resumed.progress))
