"""Faults of gradients: exactly the change that is said, at its steps, and healthy bits as the control."""

import math

import pytest
import torch

from foreshock.faults.base import Sites
from foreshock.faults.gradient_bf16_accumulation import GradientBF16Accumulation
from foreshock.faults.gradient_bitflip import GradientBitflip
from foreshock.faults.gradient_divisor import GradientDivisor
from foreshock.faults.gradient_noise import GradientNoise
from foreshock.faults.gradient_stale import GradientStale
from foreshock.faults.operation import Moment
from foreshock.faults.points import corrupt_tensors
from foreshock.faults.wrong_clip import WrongClip
from foreshock.models.transformer import parameter_group
from tests.faults.engine_steps import differing, points_logged, stepped, whole_and_resumed

HEALTHY = Sites(batch_size=8)
NAME = "blocks.0.attention.q.weight"
ONSET = 2
FAULTS = {
    "gradient_divisor": [],
    "gradient_bitflip": [],
    "gradient_noise": [],
    "gradient_stale": [],
    "gradient_bf16_accumulation": ["train.micro_batch=2"],
    "clip_off": ["train.clip=0.01"],
    "clip_scope": ["train.clip=0.01"],
}
CONTROLS = {
    "gradient_divisor": ["fault.factor=1.0"],
    "gradient_bitflip": ["fault.bit=0"],
    "gradient_noise": ["fault.share=0.0"],
    "gradient_stale": ["fault.lag=0"],
    "gradient_bf16_accumulation": ["fault.format=fp32"],
    "clip_off": ["fault.factor=1.0"],
    "clip_scope": ["fault.scope=model"],
}


def run_of(make_run, name: str, *overrides: str):
    return make_run(f"fault={name}", *FAULTS[name], *overrides)


@pytest.mark.parametrize("name", FAULTS)
def test_it_changes_the_gradients_from_its_onset_on_and_in_no_bit_before(make_run, name):
    faulty, weights, _ = stepped(run_of(make_run, name, f"fault.onset={ONSET}"), ONSET + 1)
    _, healthy, _ = stepped(make_run(*FAULTS[name]), ONSET + 1)
    assert [bool(differing(*pair)) for pair in zip(weights, healthy, strict=True)] == [False] * ONSET + [True]
    (point,) = {injection.where["point"] for injection in run_of(make_run, name).fault.describe().injections}
    assert set(points_logged(faulty)) == {point} and points_logged(faulty)[point] > 0


@pytest.mark.parametrize("name", CONTROLS)
def test_its_control_is_healthy_bit_for_bit(make_run, name):
    run = run_of(make_run, name, *CONTROLS[name])
    assert run.fault.describe().control
    engine, control, _ = stepped(run, 3)
    _, healthy, _ = stepped(make_run(*FAULTS[name]), 3)
    assert not any(differing(*pair) for pair in zip(control, healthy, strict=True))
    assert engine.logs[0].entries() == []


def test_a_wrong_divisor_multiplies_every_gradient(make_run):
    _, _, wrong = stepped(make_run("fault=gradient_divisor", "fault.factor=4.0", "train.clip=null"), 1)
    _, _, right = stepped(make_run("train.clip=null"), 1)
    assert all(torch.equal(wrong[0][name], 4 * right[0][name]) for name in right[0])


def test_a_flipped_bit_is_one_element_of_one_gradient(make_run):
    _, _, wrong = stepped(make_run("fault=gradient_bitflip", "fault.bit=20", "train.clip=null"), 1)
    _, _, right = stepped(make_run("train.clip=null"), 1)
    assert differing(wrong[0], right[0]) == {NAME}
    bits = wrong[0][NAME].view(torch.int32) ^ right[0][NAME].view(torch.int32)
    assert bits.count_nonzero() == 1 and bits.max() == 1 << 19


def test_noise_has_the_share_of_each_norm_and_is_a_function_of_seed_step_and_tensor():
    def noise(seed: int = 0, step: int = 0) -> dict[str, torch.Tensor]:
        tensors = {name: torch.ones(100, 100) for name in (NAME, "final_norm.weight")}
        corrupt_tensors("gradients", tensors, GradientNoise(0.5).sites(0, HEALTHY).gradients, Moment(seed, step, 11))
        return {name: x - 1 for name, x in tensors.items()}

    first = noise()
    for x in first.values():  # the squares' mean of n normal numbers has a standard deviation of sqrt(2 / n)
        assert float(x.square().mean()) == pytest.approx(0.25, rel=6 * math.sqrt(2 / 10_000))
    assert not differing(first, noise()) and not torch.equal(first[NAME], first["final_norm.weight"])
    assert all(differing(first, noise(*other)) == set(first) for other in ((1, 0), (0, 1)))


def test_noise_reaches_its_group_alone(make_run):
    _, _, wrong = stepped(make_run("fault=gradient_noise", "fault.group=mlp", "train.clip=null"), 1)
    _, _, right = stepped(make_run("train.clip=null"), 1)
    assert differing(wrong[0], right[0]) == {name for name in right[0] if parameter_group(name) == "mlp"}


@pytest.mark.parametrize("lag", [1, 3])
def test_a_stale_gradient_is_the_one_of_an_earlier_backward_pass(make_run, lag):
    run = make_run("fault=gradient_stale", f"fault.lag={lag}", "fault.onset=3", "fault.duration=1", "train.clip=null")
    _, _, stale = stepped(run, 4)
    assert not differing(stale[3], stale[3 - lag]) and differing(stale[2], stale[3]) == (
        set() if lag == 1 else set(stale[2])
    )


def test_a_stale_gradient_goes_on_after_a_resume_bit_for_bit(make_run):
    run = make_run("fault=gradient_stale", "fault.lag=3", "fault.onset=3", "fault.every=2")
    whole, resumed = whole_and_resumed(run, 5, 10)
    states = [dict(engine.model.named_parameters()) for engine in (whole, resumed)]
    assert not differing(*states)
    assert len(whole.state_of(0)["past"]) <= 2  # of updates 7 and 9, for 10 and 12


def test_a_lag_that_reaches_before_the_run_is_refused(make_run):
    with pytest.raises(ValueError, match=r"fault.onset is too early: at step 1 StaleGradients.* allowed from 2"):
        make_run("fault=gradient_stale", "fault.lag=2", "fault.onset=1")


def test_a_sum_in_bf16_is_rounded_after_each_micro_batch(make_run):
    overrides = ["train.micro_batch=4", "train.clip=null"]
    _, _, rounded = stepped(make_run("fault=gradient_bf16_accumulation", *overrides), 1)
    engine = make_run(*overrides).new_engine()
    parts = engine.micro_batches(0, HEALTHY)
    sums: dict[str, torch.Tensor] = {}
    for part in parts:
        engine.backward((part,), HEALTHY)
        for name, weight in engine.model.named_parameters():
            sums[name] = (sums.get(name, torch.zeros(())) + weight.grad).bfloat16().float()
    assert all(torch.equal(rounded[0][name], sums[name] / 2) for name in sums)


def test_a_sum_of_one_micro_batch_is_refused(make_run):
    with pytest.raises(ValueError, match=r"train.micro_batch=None leaves the 8 sequences of a batch in one"):
        make_run("fault=gradient_bf16_accumulation")


@pytest.mark.parametrize("scope", ["model", "group", "tensor"])
def test_each_part_is_clipped_to_its_own_norm(make_run, scope):
    run = make_run("fault=clip_scope", f"fault.scope={scope}", "fault.factor=2.0", "train.clip=0.01")
    _, _, clipped = stepped(run, 1)
    _, _, whole = stepped(make_run("train.clip=null"), 1)
    part_of = {"model": lambda name: "", "group": parameter_group, "tensor": str}[scope]
    for part in {part_of(name) for name in whole[0]}:
        names = [name for name in whole[0] if part_of(name) == part]
        norm = math.sqrt(sum(float(whole[0][name].double().square().sum()) for name in names))
        factor = min(1.0, 0.02 / (norm + 1e-6))
        for name in names:  # a norm of n squares in FP32, summed in any order, and a product: n + 8 roundings
            bound = (sum(whole[0][n].numel() for n in names) + 8) * 2**-24
            torch.testing.assert_close(clipped[0][name].double(), factor * whole[0][name].double(), rtol=bound, atol=0)


def test_without_a_clip_gradients_keep_their_bits(make_run):
    _, _, off = stepped(make_run("fault=clip_off", "train.clip=0.01"), 1)
    _, _, whole = stepped(make_run("train.clip=null"), 1)
    assert not differing(off[0], whole[0])


def test_a_clip_that_is_never_reached_is_an_error_at_the_end_alone(make_run):
    engine, _, _ = stepped(make_run("fault=clip_off", "train.clip=1e6"), 12)
    engine.logs[0].check(ended=False)
    with pytest.raises(ValueError, match="at 'clip' changed no element in its first 12 steps"):
        engine.logs[0].check(ended=True)


def test_a_run_without_a_clip_has_none_to_break(make_run):
    with pytest.raises(ValueError, match=r"a wrong clip needs a clip, and the run has train\.clip=null"):
        make_run("fault=clip_off", "train.clip=null")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDivisor(0.0), "fault.factor=0.0 is not allowed: above 0, finite"),
        (lambda: GradientBitflip(NAME, 33), "fault.bit=33 is not allowed"),
        (lambda: GradientNoise(-0.1), "fault.share=-0.1 is not allowed"),
        (lambda: GradientNoise(0.1, "heads"), "fault.group='heads' is not allowed: one of embedding"),
        (lambda: GradientStale(-1), "fault.lag=-1 is not allowed"),
        (lambda: GradientBF16Accumulation("fp7"), "fault.format='fp7' is not allowed: one of bf16"),
        (lambda: WrongClip(0.0), "fault.factor=0.0 is not allowed: above 0, finite, or null for no clip"),
        (lambda: WrongClip(1.0, "shard"), "fault.scope='shard' is not allowed: one of model, group, tensor"),
    ],
)
def test_an_impossible_fault_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
