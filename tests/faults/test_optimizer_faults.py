"""Faults of the optimizer and of what it stores: exactly the change that is said, and healthy bits as the control."""

import math

import pytest
import torch

from foreshock.faults.adam_state import MOMENTS
from foreshock.faults.adam_state_bitflip import AdamStateBitflip
from foreshock.faults.adam_state_format import AdamStateFormat
from foreshock.faults.adam_state_reset import AdamStateReset
from foreshock.faults.adam_state_stale import AdamStateStale
from foreshock.faults.adam_step_stuck import AdamStepStuck
from foreshock.faults.base import Sites
from foreshock.faults.decay_wrong import DecayWrong
from foreshock.faults.double_update import DoubleUpdate
from foreshock.faults.no_master_weights import NoMasterWeights
from foreshock.faults.operation import Moment
from foreshock.faults.optimizer_update import Update, corrupted_optimizer
from foreshock.faults.rounding import nearest, stochastic_bf16
from tests.faults.engine_steps import assert_control_is_healthy, differing, points_logged, stepped

HEALTHY = Sites(batch_size=8)
NAMES = ("blocks.0.attention.q.weight", "blocks.0.mlp.input.weight", "final_norm.weight")
ONSET = 2
FAULTS = (
    "adam_step_stuck",
    "adam_state_reset",
    "adam_state_stale",
    "adam_state_format",
    "adam_state_bitflip",
    "double_update",
    "decay_wrong",
    "no_master_weights",
)
CONTROLS = {
    "adam_state_format": ["fault.format=fp32"],
    "adam_state_bitflip": ["fault.bit=0", "fault.onset=1"],
    "decay_wrong": ["fault.vectors=false"],
    "no_master_weights": ["fault.rounding=none"],
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_changes_training_from_its_onset_on_and_in_no_bit_before(make_run, name):
    run = make_run(f"fault={name}", f"fault.onset={ONSET}")
    engine, weights, _ = stepped(run, ONSET + 2)
    _, healthy, _ = stepped(make_run(), ONSET + 2)
    changed = [bool(differing(*pair)) for pair in zip(weights, healthy, strict=True)]
    assert changed[:ONSET] == [False] * ONSET and changed[-1]
    (point,) = {injection.where["point"] for injection in run.fault.describe().injections}
    assert set(points_logged(engine)) == {point} and points_logged(engine)[point] > 0


@pytest.mark.parametrize("name", CONTROLS)
def test_its_control_is_healthy_bit_for_bit(make_run, name):
    assert_control_is_healthy(make_run, f"fault={name}", *CONTROLS[name])


class Small:
    """Three named weights with their AdamW, whose gradients are a function of weight and step."""

    def __init__(self, decay: float = 0.1) -> None:
        shapes = ((3, 4), (3, 4), (4,))
        self.weights = {
            name: torch.nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape))
            for name, shape in zip(NAMES, shapes, strict=True)
        }
        groups = zip(self.weights.values(), ("attention", "mlp", "norm"), (decay, decay, 0.0), strict=True)
        self.optimizer = torch.optim.AdamW(
            [{"params": [weight], "name": name, "weight_decay": own} for weight, name, own in groups],
            lr=0.01,
            betas=(0.9, 0.95),
            fused=True,
        )

    def gradients(self, step: int) -> dict[str, torch.Tensor]:
        return {name: torch.sin(weight.detach() * (step + 1)) + 0.1 for name, weight in self.weights.items()}

    def step(self, step: int, fault=None) -> None:
        for name, gradient in self.gradients(step).items():
            self.weights[name].grad = gradient
        operations = () if fault is None else fault.sites(step, HEALTHY).optimizer
        with corrupted_optimizer(Update(self.optimizer, self.weights, Moment(0, step, 11)), operations):
            self.optimizer.step()

    def state(self, name: str, key: str) -> torch.Tensor:
        return self.optimizer.state[self.weights[name]][key]


def after(steps: int, fault=None) -> Small:
    small = Small()
    for step in range(steps):
        small.step(step, fault)
    return small


def same(one: Small, other: Small, name: str) -> bool:
    tensors = [(one.weights[name], other.weights[name])]
    tensors += [(one.state(name, key), other.state(name, key)) for key in (*MOMENTS, "step")]
    return all(torch.equal(*pair) for pair in tensors)


def test_a_stuck_counter_corrects_each_update_as_the_first():
    small, m, v = Small(decay=0.0), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for step in range(6):
        before, gradient = small.weights[NAMES[0]].detach().double(), small.gradients(step)[NAMES[0]].double()
        small.step(step, AdamStepStuck())
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        expected = before - 0.01 * (m / 0.1) / ((v / 0.05).sqrt() + 1e-8)
        # weights of size 1 are rounded once, updates of 0.02 some twenty times; betas are not exact in FP32
        torch.testing.assert_close(small.weights[NAMES[0]].detach().double(), expected, rtol=2**-20, atol=2**-22)
        assert float(small.state(NAMES[0], "step")) == 0


def test_the_increments_of_a_window_stay_lost():
    small = after(5, AdamStepStuck("mlp", onset=1, duration=2))
    assert [float(small.state(name, "step")) for name in NAMES] == [5, 3, 5]
    assert same(small, after(5), NAMES[0]) and same(small, after(5), NAMES[2])


@pytest.mark.parametrize("counters", [True, False])
def test_a_reset_update_is_that_of_an_optimizer_without_a_past(counters):
    small = after(4, AdamStateReset(counters, "attention", onset=3, duration=1))
    other = after(3)
    for key in (*MOMENTS, "step") if counters else MOMENTS:
        other.state(NAMES[0], key).zero_()
    other.step(3)
    assert all(same(small, other, name) for name in NAMES)
    assert float(small.state(NAMES[0], "step")) == (1 if counters else 4) and not same(small, after(4), NAMES[0])


def test_frozen_moments_are_read_and_not_written():
    small, healthy = after(3, AdamStateStale("mlp", onset=2, duration=1)), after(3)
    assert torch.equal(small.weights[NAMES[1]], healthy.weights[NAMES[1]])  # the first frozen update still reads right
    assert all(torch.equal(small.state(NAMES[1], key), after(2).state(NAMES[1], key)) for key in MOMENTS)
    assert float(small.state(NAMES[1], "step")) == 3
    assert same(small, healthy, NAMES[0]) and same(small, healthy, NAMES[2])


@pytest.mark.parametrize("form", ["bf16", "fp16", "fp8_e5m2", "fp8_e4m3"])
@pytest.mark.parametrize("moment", [*MOMENTS, None])
def test_moments_are_rounded_after_the_update(form, moment):
    small, healthy = after(3, AdamStateFormat(form, moment, "attention", onset=2)), after(3)
    for key in MOMENTS:
        right = healthy.state(NAMES[0], key)
        expected = nearest(right, form) if moment in (None, key) else right
        assert torch.equal(small.state(NAMES[0], key), expected)
    assert torch.equal(small.weights[NAMES[0]], healthy.weights[NAMES[0]])
    assert same(small, healthy, NAMES[1]) and same(small, healthy, NAMES[2])


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_flipped_moment_is_one_bit_of_one_element(moment):
    fault = AdamStateBitflip(NAMES[0], 20, moment, onset=3, duration=1)
    small = after(3)
    before = {key: small.state(NAMES[0], key).clone() for key in MOMENTS}
    update = Update(small.optimizer, small.weights, Moment(0, 3, 11))
    with corrupted_optimizer(update, fault.sites(3, HEALTHY).optimizer):
        bits = {key: before[key].view(torch.int32) ^ small.state(NAMES[0], key).view(torch.int32) for key in MOMENTS}
    assert bits[moment].count_nonzero() == 1 and bits[moment].max() == 1 << 19
    assert all(not bits[key].any() for key in MOMENTS if key != moment)


def test_a_double_update_is_two_updates_with_one_gradient():
    small, other = after(3, DoubleUpdate("mlp", onset=2)), after(3)
    for name in (NAMES[0], NAMES[2]):
        other.weights[name].grad = None
    other.optimizer.step()
    assert all(same(small, other, name) for name in NAMES)
    assert [float(small.state(name, "step")) for name in NAMES] == [3, 4, 3]
    assert all(weight.grad is not None for weight in small.weights.values())


@pytest.mark.parametrize(
    ("fault", "decays"),
    [
        (DecayWrong(3.0), (0.3, 0.3, 0.0)),
        (DecayWrong(0.0, "mlp"), (0.1, 0.0, 0.0)),
        (DecayWrong(1.0, vectors=True), (0.1, 0.1, 0.1)),
        (DecayWrong(2.0, "norm", vectors=True), (0.1, 0.1, 0.2)),
    ],
)
def test_a_wrong_decay_is_that_of_an_optimizer_with_it(fault, decays):
    other = Small()
    for group, decay in zip(other.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = 0.1 * 3.0 if decay == 0.3 else 0.1 * 2.0 if decay == 0.2 else decay
    for step in range(3):
        other.step(step)
    small = after(3, fault)
    assert all(same(small, other, name) for name in NAMES)
    assert [group["weight_decay"] for group in small.optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_a_coupled_decay_enters_the_moments_and_the_gradient_is_seen_without_it():
    small, other = after(1, DecayWrong(coupled=True)), Small(decay=0.0)
    gradients = other.gradients(0)
    for name, weight in other.weights.items():
        decay = 0.0 if name == NAMES[2] else 0.1
        weight.grad = gradients[name].add(weight.detach(), alpha=decay) if decay else gradients[name]
    other.optimizer.step()
    assert all(same(small, other, name) for name in NAMES)
    assert all(torch.equal(small.weights[name].grad, gradients[name]) for name in NAMES)


def test_weights_are_numbers_of_bf16_after_each_update(make_run):
    for rounding in ("nearest", "stochastic"):
        _, weights, _ = stepped(make_run("fault=no_master_weights", f"fault.rounding={rounding}"), 2)
        assert all(torch.equal(x, x.bfloat16().float()) for x in weights[-1].values())


def test_stochastic_rounding_has_no_bias_and_is_a_function_of_seed_step_and_tensor():
    x = torch.full((40_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next BF16 number, 1 + 2^-7
    moment = Moment(0, 0, 11).at("weights", "w")
    up = stochastic_bf16(x, moment) > 1
    assert set(stochastic_bf16(x, moment).tolist()) == {1.0, 1 + 2**-7}
    assert float(up.double().mean()) == pytest.approx(0.25, abs=6 * math.sqrt(0.25 * 0.75 / 40_000))
    assert torch.equal(up, stochastic_bf16(x, moment) > 1)
    others = Moment(1, 0, 11).at("weights", "w"), Moment(0, 1, 11).at("weights", "w"), moment.at("weights", "v")
    assert all(not torch.equal(up, stochastic_bf16(x, other) > 1) for other in others)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -1.5])
    assert torch.equal(stochastic_bf16(special, moment)[[0, 1, 3, 4]], special[[0, 1, 3, 4]])
    assert stochastic_bf16(special, moment)[2].isnan()


def test_fp8_saturates_and_keeps_nan():
    x = torch.tensor([1e6, -1e6, math.nan, 0.0])
    assert nearest(x, "fp8_e4m3")[:2].tolist() == [448, -448] and nearest(x, "fp8_e5m2")[:2].tolist() == [57344, -57344]
    assert nearest(x, "fp8_e4m3")[2].isnan() and nearest(x, "fp8_e4m3")[3] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamStateReset(), "fault.onset=0 is not allowed: the run's first update has no state to lose"),
        (lambda: AdamStateBitflip(NAMES[0], 3), "fault.onset=0 is not allowed: the run's first update has no moments"),
        (lambda: AdamStateBitflip(NAMES[0], 33, onset=1), "fault.bit=33 is not allowed"),
        (lambda: AdamStateFormat("int8"), "fault.format='int8' is not allowed: one of bf16"),
        (lambda: AdamStateFormat("bf16", "m"), "fault.moment='m' is not allowed: one of exp_avg, exp_avg_sq"),
        (lambda: AdamStepStuck("heads"), "fault.group='heads' is not allowed"),
        (lambda: DecayWrong(-1.0), "fault.factor=-1.0 is not allowed: 0 or more, finite"),
        (lambda: NoMasterWeights("up"), "fault.rounding='up' is not allowed: one of nearest, stochastic, none"),
    ],
)
def test_an_impossible_fault_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=decay_wrong", "train.weight_decay=0.0"], "a wrong decay needs a decay"),
        (["fault=decay_wrong", "fault.group=norm", "fault.vectors=false", "fault.factor=2.0"], "has no effect with"),
        (["fault=double_update", "fault.group=router"], "fault.group='router' has no effect"),
    ],
)
def test_what_the_run_lacks_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)
