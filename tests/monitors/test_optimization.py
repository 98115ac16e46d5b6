"""Loss, gradient norm and update size against their definitions."""

import math

import pytest
import torch

from foreshock.monitors.optimization import GradientNorm, Loss, UpdateToWeight
from tests.rounding_bounds import FP32, gamma

pytestmark = pytest.mark.numeric


def series(monitor, run, losses):
    return [{name: r.item() for name, r in monitor.observe(run.view(loss=loss)).items()} for loss in losses]


def test_loss_ema_is_its_recursion_from_the_first_loss(tiny_run):
    losses, beta = [3.0, 1.0, 2.5, 0.5], 0.75
    got = series(Loss(1, beta), tiny_run(), losses)
    ema = [3.0]
    for loss in losses[1:]:
        ema.append(beta * ema[-1] + (1 - beta) * loss)
    assert [reading["train_loss_raw"] for reading in got] == losses
    assert [reading["train_loss_ema"] for reading in got] == ema  # exact in FP32: beta is a power of 2 away


def test_loss_keeps_its_memory_through_a_checkpoint(tiny_run):
    run, one, resumed = tiny_run(), Loss(1, 0.9), Loss(1, 0.9)
    series(one, run, [3.0, 1.0])
    resumed.load_state_dict(one.state_dict())
    assert series(resumed, run, [2.0, 0.5]) == series(one, run, [2.0, 0.5])


def test_loss_state_before_the_first_step_is_a_fresh_one(tiny_run):
    fresh = Loss(1, 0.9)
    fresh.load_state_dict(Loss(1, 0.9).state_dict())
    assert series(fresh, tiny_run(), [3.0]) == [{"train_loss_raw": 3.0, "train_loss_ema": 3.0}]


def test_earlier_loss_readings_are_not_written_again(tiny_run):
    run, monitor = tiny_run(), Loss(1, 0.5)
    first = monitor.observe(run.view(loss=4.0))
    monitor.observe(run.view(loss=2.0))
    assert first["train_loss_ema"].item() == first["train_loss_raw"].item() == 4.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stays_in_the_ema(tiny_run, value):
    got = series(Loss(1, 0.9), tiny_run(), [1.0, value, 1.0])
    assert [math.isfinite(reading["train_loss_ema"]) for reading in got] == [True, False, False]
    assert math.isfinite(got[2]["train_loss_raw"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0.0), "monitor.loss.beta=0.0 "),
        ((1, 1.0), "monitor.loss.beta=1.0 "),
        ((1, math.nan), "monitor.loss.beta=nan "),
        ((2, 0.9), "monitor.loss.every_steps=2 "),
        ((0, 0.9), "monitor.loss.every_steps=0 "),
    ],
)
def test_an_impossible_loss_monitor_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Loss(*arguments)


def test_gradient_norm_is_the_loop_s(tiny_run):
    monitor = GradientNorm(7)
    assert monitor.observe(tiny_run().view(grad_norm=2.25))["grad_global_norm"].item() == 2.25
    assert [signal.every_steps for signal in monitor.signals] == [7]


def test_update_to_weight_is_the_ratio_of_norms_of_each_block(tiny_run):
    monitor = UpdateToWeight(3)
    run = tiny_run(monitor)
    for step in range(1, 7):
        view = run.advance()
        if step % 3:
            continue
        got = monitor.observe(view)["update_to_weight"]
        for layer in range(2):
            names = [name for name in run.past[0] if name.startswith(f"blocks.{layer}.")]
            update, before = (
                torch.cat([x.flatten() for x in tensors]).norm()
                for tensors in ((run.delta(name, 1) for name in names), (run.past[-2][name] for name in names))
            )
            assert got.value[layer].item() == pytest.approx((update / before).item(), rel=2 * gamma(1200, FP32))
        assert not got.undefined.any()


def test_update_to_weight_sees_only_its_own_block(tiny_run):
    monitor = UpdateToWeight(1)
    run = tiny_run(monitor)
    got = monitor.observe(run.advance(lambda name, weight: weight * 1.5 if not name.startswith("blocks.0.") else None))
    assert got["update_to_weight"].value.tolist() == [0.0, 0.5]


def test_update_to_weight_of_a_zero_block_is_undefined(tiny_run):
    monitor = UpdateToWeight(1)
    run = tiny_run(monitor)
    run.advance(lambda name, weight: weight * 0 if name.startswith("blocks.1.") else None)
    got = monitor.observe(run.advance())["update_to_weight"]
    assert got.undefined.tolist() == [False, True] and got.value[0].isfinite()


@pytest.mark.parametrize("monitor", [Loss(1, 0.9), GradientNorm(1), UpdateToWeight(1)])
def test_the_readings_are_the_signals_and_observing_changes_nothing(tiny_run, monitor):
    run = tiny_run(monitor)
    view = run.advance()
    got = monitor.observe(view)
    assert set(got) == {signal.name for signal in monitor.signals}
    assert {signal.bad for signal in monitor.signals} == ({"both"} if isinstance(monitor, UpdateToWeight) else {"up"})
    assert view.loss.item() == 1.0 and view.grad_norm.item() == 2.0
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.detach().double(), run.past[-1][name]) and parameter.grad is None


@pytest.mark.parametrize("make", [GradientNorm, UpdateToWeight])
def test_an_impossible_cadence_is_refused(make):
    with pytest.raises(ValueError, match=r"monitor\.every_steps=0 "):
        make(0)
