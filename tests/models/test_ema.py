"""LitEMA against recorded LitEma runs, the closed form of its recursion, and the traps of the original."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN
from torch import nn

from diffusers_ddpm_ext.models.ema import LitEMA

CASES = json.loads((GOLDEN / "e_litema.json").read_text())["cases"]
ARRAYS = np.load(GOLDEN / "e_litema.npz")


class Recorded(nn.Module):
    """The layout of the recorded runs: p (5), sub.weight (2), sub.bias (1), and a frozen fz."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(5))
        self.sub = nn.Linear(2, 1)
        self.fz = nn.Parameter(torch.zeros(2), requires_grad=False)

    @torch.no_grad()
    def set(self, values: np.ndarray) -> None:
        values = torch.tensor(values)
        self.p.copy_(values[:5])
        self.sub.weight.copy_(values[5:7][None])
        self.sub.bias.copy_(values[7:])


def flat(shadow: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([shadow[name].flatten() for name in ("p", "sub.weight", "sub.bias")]).numpy()


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_recorded_runs(case):
    params, shadows = ARRAYS[f"{case['id']}/params"], ARRAYS[f"{case['id']}/shadow"]
    module = Recorded()
    module.set(params[0])
    ema = LitEMA(module, case["decay"], case["use_num_updates"])
    for k, (values, expected) in enumerate(zip(params, shadows, strict=True)):
        if k:
            module.set(values)
            ema.step(module)
        np.testing.assert_allclose(flat(ema.shadow), expected, rtol=2e-6, atol=2e-6)
        assert ema.num_updates == case["num_updates"][k]


def linear(value: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    set_all(module, value)
    return module


def set_all(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def values(module: nn.Module) -> set[float]:
    return {value for parameter in module.parameters() for value in parameter.flatten().tolist()}


def test_closed_form_of_a_constant_network():
    """Shadows start at 0, parameters stay at 1: after n updates 1 - shadow is the product of the decays."""
    ema, remaining = LitEMA(linear(0.0), decay=0.5), 1.0
    module = linear(1.0)
    for k in range(1, 30):
        ema.step(module)
        remaining *= min(0.5, (1 + k) / (10 + k))
        assert float(ema.shadow["0.bias"][0]) == pytest.approx(1 - remaining, rel=1e-5)
        assert ema.num_updates == k


def test_decay_is_a_float32_number():
    """1 - float32(0.9999) is 1.0001659e-4; a float64 decay would be off by 1.7e-4 relative."""
    ema = LitEMA(linear(0.0, torch.float64), decay=0.9999, use_num_updates=False)
    ema.step(linear(1.0, torch.float64))
    assert float(ema.shadow["0.bias"][0]) == float(np.float32(1) - np.float32(0.9999))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_both_ends_of_the_decay(decay):
    ema = LitEMA(linear(1.0), decay=decay, use_num_updates=False)
    ema.step(linear(3.0))
    assert float(ema.shadow["0.bias"][0]) == (3.0 if decay == 0 else 1.0)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), "0.9", None, True])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="decay"):
        LitEMA(linear(), decay=decay)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moves_after_the_module_became_half(dtype):
    """In the original the update went into a copy, and the average never moved."""
    module = linear(0.0)
    ema = LitEMA(module, decay=0.5, use_num_updates=False)
    module.to(dtype)
    set_all(module, 1.0)
    ema.step(module)
    assert ema.shadow["0.weight"].dtype == torch.float32
    assert float(ema.shadow["0.weight"][0, 0]) == 0.5
    ema.copy_to(module)
    assert values(module) == {0.5}
    assert module[0].weight.dtype == dtype


def test_half_module_has_float32_shadows_that_see_small_steps():
    module = linear(1.0, torch.bfloat16)
    ema = LitEMA(module, decay=0.9999, use_num_updates=False)
    set_all(module, 2.0)
    ema.step(module)
    assert 1.0 < float(ema.shadow["0.weight"][0, 0]) < 1.001


def test_mixed_dtypes_in_one_module():
    module = nn.ModuleDict({"a": nn.Linear(2, 2).double(), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2).half()})
    set_all(module, 0.0)
    ema = LitEMA(module, decay=0.5, use_num_updates=False)
    set_all(module, 1.0)
    ema.step(module)
    assert {shadow.dtype for shadow in ema.shadow.values()} == {torch.float64, torch.float32}
    assert all((shadow == 0.5).all() for shadow in ema.shadow.values())


def test_shadows_own_their_memory_and_need_no_gradient():
    module = linear(1.0)
    ema = LitEMA(module)
    set_all(module, 2.0)
    assert all((shadow == 1.0).all() and not shadow.requires_grad for shadow in ema.shadow.values())


def test_tracks_trainable_parameters_only():
    module = linear()
    module[0].bias.requires_grad_(False)
    assert set(LitEMA(module).shadow) == {"0.weight", "1.weight", "1.bias"}
    with pytest.raises(ValueError, match="nothing to average"):
        LitEMA(linear().requires_grad_(False))


@pytest.mark.parametrize("at_first", [True, False])
def test_freezing_or_unfreezing_later_is_named(at_first):
    module = linear()
    module[0].bias.requires_grad_(at_first)
    ema = LitEMA(module)
    before = copy.deepcopy(ema.state_dict())
    module[0].bias.requires_grad_(not at_first)
    with pytest.raises(ValueError, match=r"0\.bias.*Make a new LitEMA"):
        ema.step(module)
    assert ema.num_updates == before["num_updates"]


def test_copy_to_reaches_a_frozen_copy():
    ema = LitEMA(linear(1.0))
    target = linear(0.0).requires_grad_(False)
    ema.copy_to(target)
    assert values(target) == {1.0}


def test_copy_to_another_architecture_writes_nothing():
    ema = LitEMA(linear(1.0))
    for target in (nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))):
        set_all(target, 0.0)
        with pytest.raises(ValueError, match="parameter"):
            ema.copy_to(target)
        assert values(target) == {0.0}


def test_scope_and_back():
    module = linear(1.0)
    ema = LitEMA(module)
    set_all(module, 7.0)
    with ema.scope(module) as inside:
        assert inside is module
        assert values(module) == {1.0}
    assert values(module) == {7.0}


def test_scope_gives_the_raw_weights_back_after_an_exception():
    module = linear(1.0)
    ema = LitEMA(module)
    set_all(module, 7.0)
    with pytest.raises(KeyboardInterrupt), ema.scope(module):
        raise KeyboardInterrupt
    assert values(module) == {7.0}
    with ema.scope(module):
        assert values(module) == {1.0}


def test_nested_scope_is_refused_and_nothing_is_lost():
    """In the original the inner scope stored the EMA weights as raw ones: raw 7 became 0."""
    module = linear(1.0)
    ema = LitEMA(module)
    set_all(module, 7.0)
    with ema.scope(module):
        with pytest.raises(ValueError, match="cannot be nested"), ema.scope(module):
            pass
        assert values(module) == {1.0}
        with pytest.raises(ValueError, match="cannot be nested"), ema.scope(module):
            pass
    assert values(module) == {7.0}
    ema.step(module)
    with ema.scope(module):
        pass
    assert values(module) == {7.0}


def test_error_inside_a_refused_nesting_reaches_the_outer_scope():
    module = linear(1.0)
    ema = LitEMA(module)
    set_all(module, 7.0)
    with pytest.raises(ValueError, match="nested"), ema.scope(module), ema.scope(module):
        pass
    assert values(module) == {7.0}


def test_scope_of_a_module_that_does_not_fit_stays_closed():
    module = linear(1.0)
    ema = LitEMA(module)
    with pytest.raises(ValueError, match="no parameter"), ema.scope(nn.Linear(1, 1)):
        pass
    with ema.scope(module):
        pass


def test_step_inside_scope_is_refused():
    module = linear(1.0)
    ema = LitEMA(module)
    with ema.scope(module), pytest.raises(ValueError, match="inside scope"):
        ema.step(module)
    assert ema.num_updates == 0


def test_scope_keeps_a_half_modules_raw_bits():
    module = linear(1.0).half()
    ema = LitEMA(module)
    set_all(module, 0.1)
    raw = [parameter.clone() for parameter in module.parameters()]
    with ema.scope(module):
        pass
    assert all(torch.equal(a, b) for a, b in zip(raw, module.parameters(), strict=True))


def test_state_goes_through_a_file_and_continues_bit_equal(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2)))
    ema = LitEMA(module, decay=0.7)

    def advance(averages: list[LitEMA], count: int) -> None:
        for _ in range(count):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter))
            for average in averages:
                average.step(module)

    advance([ema], 3)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = LitEMA(module, decay=0.1, use_num_updates=False)
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert other.num_updates == 3
    advance([ema, other], 3)
    assert set(ema.shadow) == {"0.weight", "0.bias", "1.0.weight", "1.0.bias"}
    assert all(torch.equal(other.shadow[name], shadow) for name, shadow in ema.shadow.items())
    assert other.num_updates == 6


def test_state_is_a_snapshot():
    ema = LitEMA(linear(0.0), decay=0.5)
    state = ema.state_dict()
    ema.step(linear(1.0))
    assert all((shadow == 0).all() for shadow in state["shadow"].values())
    ema.load_state_dict(state)
    state["shadow"]["0.bias"].fill_(9)
    assert (ema.shadow["0.bias"] == 0).all()
    assert ema.num_updates == 0


def broken(state: dict, what: str) -> dict:
    shadow = state["shadow"]
    if what == "missing":
        del shadow["0.bias"]
    elif what == "unknown":
        shadow["2.bias"] = torch.zeros(2)
    elif what == "shape":
        shadow["0.bias"] = torch.zeros(3)
    elif what == "decay":
        state["decay"] = 2.0
    elif what in ("nan", "inf"):
        shadow["0.bias"][1] = float(what)
    elif what == "integers":
        shadow["0.bias"] = torch.zeros(2, dtype=torch.int64)
    elif what == "list":
        shadow["0.bias"] = [0.0, 0.0]
    elif what == "text":
        state["shadow"] = "0.bias"
    elif what == "warm-up":
        state["use_num_updates"] = "no"
    elif isinstance(what, (int, float)):
        state["num_updates"] = what
    else:
        del state["num_updates"]
    return state


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("missing", r"missing \[0\.bias\]"),
        ("unknown", r"unknown \[2\.bias\]"),
        ("shape", r"0\.bias has shape"),
        ("decay", "decay"),
        ("entry", "num_updates missing"),
        ("nan", r"shadow 0\.bias has values that are NaN"),
        ("inf", r"shadow 0\.bias has values that are NaN"),
        ("integers", r"shadow 0\.bias must be a floating tensor, got torch\.int64"),
        ("list", r"shadow 0\.bias must be a floating tensor, got list"),
        ("text", "not the tracked ones"),
        ("warm-up", "use_num_updates='no'"),
        (-1, "num_updates=-1 contradicts use_num_updates=True"),
        (-2, "num_updates=-2"),
        pytest.param(10**400, r"num_updates=2\^1329", id="10^400"),
        (3.5, "num_updates=3.5"),
        (True, "num_updates=True"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(what, match):
    ema = LitEMA(linear(1.0), decay=0.5)
    state = broken(LitEMA(linear(4.0)).state_dict(), what)
    with pytest.raises(ValueError, match=match):
        ema.load_state_dict(state)
    assert all((shadow == 1).all() for shadow in ema.shadow.values())
    assert ema.decay == 0.5


@pytest.mark.parametrize("warms_up", [True, False])
def test_an_update_that_only_the_device_skips_is_no_update(warms_up):
    """Against an average that is not called in the skipped steps; in between, steps that nothing was skipped of."""
    skips, network = [0, 1, 0, None, 1, 1, None, 0, 0], linear(0.0)
    device, host = (LitEMA(network, 0.7, warms_up) for _ in range(2))
    for value, skipped in enumerate(skips, 1):
        set_all(network, float(value))
        device.step(network, None if skipped is None else torch.tensor(float(skipped)))
        if not skipped:
            host.step(network)
        for name, shadow in host.shadow.items():
            assert torch.equal(device.shadow[name], shadow)
    assert device.num_updates == host.num_updates
    assert device.state_dict()["num_updates"] == host.state_dict()["num_updates"]
    device.step(network)
    host.step(network)
    assert all(torch.equal(device.shadow[name], shadow) for name, shadow in host.shadow.items())


def test_num_updates_is_read_only():
    with pytest.raises(AttributeError):
        LitEMA(linear()).num_updates = 3


def test_deepcopy_and_tied_weights():
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    set_all(module, 0.0)
    ema = copy.deepcopy(LitEMA(module, decay=0.5, use_num_updates=False))
    assert list(ema.shadow) == ["a.weight"]
    set_all(module, 1.0)
    ema.step(module)
    assert (ema.shadow["a.weight"] == 0.5).all()


@pytest.mark.gpu
def test_follows_the_module_to_another_device():
    module = linear(0.0)
    ema = LitEMA(module, decay=0.5, use_num_updates=False)
    module.to("cuda")
    with ema.scope(module):
        assert values(module) == {0.0}
    set_all(module, 1.0)
    ema.step(module)
    assert all(shadow.device.type == "cuda" and (shadow == 0.5).all() for shadow in ema.shadow.values())
    state = ema.state_dict()
    module.to("cpu")
    ema.step(module)
    assert all(shadow.device.type == "cpu" and (shadow == 0.75).all() for shadow in ema.shadow.values())
    ema.load_state_dict(state)
    ema.copy_to(module)
    assert values(module) == {0.5}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda module: torch.compile(module),
        lambda module: torch.nn.DataParallel(module),
        lambda module: torch.compile(torch.nn.DataParallel(module)),
        lambda module: torch.optim.swa_utils.AveragedModel(module),
    ],
)
def test_a_wrapped_module_is_the_module_under_it(wrapped):
    module = linear(0.0)
    other = wrapped(module)
    inner = list(other.parameters())
    ema, names = LitEMA(other, decay=0.5, use_num_updates=False), set(LitEMA(module).shadow)
    assert set(ema.shadow) == names
    with torch.no_grad():
        for parameter in inner:
            parameter.fill_(1.0)
    ema.step(other)
    assert {float(shadow.mean()) for shadow in ema.shadow.values()} == {0.5}
    with ema.scope(other):
        assert all((parameter == 0.5).all() for parameter in inner)
    assert all((parameter == 1).all() for parameter in inner)
    ema.copy_to(module)
    assert values(module) == {0.5}


@pytest.mark.parametrize("wrong", [None, "unet", {"0.bias": torch.zeros(2)}, LitEMA(nn.Linear(1, 1)), nn.Linear])
def test_what_is_no_network_is_named(wrong):
    ema = LitEMA(linear())
    for call in (lambda: LitEMA(wrong), lambda: ema.step(wrong), lambda: ema.copy_to(wrong)):
        with pytest.raises(ValueError, match="is not the network"):
            call()
    with pytest.raises(ValueError, match="is not the network"), ema.scope(wrong):
        pass


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (5, 3)])
def test_a_step_with_other_shapes_is_refused(shape, dtype):
    """Shapes that would broadcast, too; nothing is averaged."""
    network = nn.Linear(3, 4)
    ema = LitEMA(network, dtype=dtype)
    before = {name: value.clone() for name, value in ema.shadow.items()}
    other = nn.Linear(3, 4)
    other.weight = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=r"weight has shape .* LitEMA tracks \(4, 3\)"):
        ema.step(other)
    assert all(torch.equal(value, before[name]) for name, value in ema.shadow.items())
    assert ema.num_updates == 0


def test_untracked_is_several_names():
    with pytest.raises(ValueError, match=r"write \['bias'\]"):
        LitEMA(nn.Linear(3, 4), untracked="bias")
