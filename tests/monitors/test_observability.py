"""Non-finite events: one an update, plus those at the fault sites, and never lost in a checkpoint."""

import math

import pytest
import torch

from foreshock.models.numerics import AttentionNumerics, SiteFault
from foreshock.monitors.observability import NonFinite

INF, NAN = math.inf, math.nan


def events(monitor, view):
    reading = monitor.observe(view)["nan_inf_events"]
    assert reading.shape == () and reading.dtype is torch.int64
    return reading.item()


def test_an_update_counts_once_if_its_loss_or_gradient_is_not_finite(tiny_run):
    run, monitor = tiny_run(), NonFinite(1)
    steps = [(1.0, 2.0), (NAN, 2.0), (1.0, INF), (1.0, 2.0), (NAN, NAN), (INF, -INF), (1.0, 2.0)]
    assert [events(monitor, run.view(*step)) for step in steps] == [0, 1, 2, 2, 3, 4, 4]


def test_a_first_update_may_be_the_broken_one(tiny_run):
    assert events(NonFinite(1), tiny_run().view(NAN)) == 1


def test_values_at_fault_sites_of_every_layer_are_added(tiny_run):
    run, monitor = tiny_run(), NonFinite(1)
    run.model.blocks[0].attention.nonfinite += 2
    assert events(monitor, run.view()) == 2
    run.model.blocks[1].attention.nonfinite += 3
    assert events(monitor, run.view(NAN)) == 6
    assert events(monitor, run.view()) == 6


@pytest.mark.parametrize(("bits", "hidden", "count"), [(8, True, 4), (7, False, 4), (0, False, 0)])
@torch.no_grad()
def test_a_value_that_the_fault_hides_is_counted(tiny_run, bits, hidden, count):
    """8 bits turn Inf into a finite number: the loss stays finite, the count misses no token."""
    run, monitor = tiny_run(), NonFinite(1)
    attention = run.model.blocks[1].attention
    attention.v.weight[0, 0] = INF
    attention.o.weight.zero_()
    numerics = AttentionNumerics((SiteFault("v", "forward", "truncate", bits, heads=(0,)),))
    loss = run.model.loss(torch.zeros(4, 2, dtype=torch.int64), numerics)
    assert loss.isfinite().item() is hidden
    assert events(monitor, run.view()) == count


def test_the_count_survives_a_checkpoint(tiny_run):
    run, one, resumed = tiny_run(), NonFinite(1), NonFinite(1)
    events(one, run.view(NAN))
    resumed.load_state_dict(one.state_dict())
    assert events(resumed, run.view(INF)) == events(one, run.view(INF)) == 2
    fresh = NonFinite(1)
    fresh.load_state_dict(NonFinite(1).state_dict())
    assert events(fresh, run.view()) == 0


def test_earlier_readings_are_not_written_again(tiny_run):
    run, monitor = tiny_run(), NonFinite(1)
    first = monitor.observe(run.view(NAN))["nan_inf_events"]
    monitor.observe(run.view(NAN))
    run.model.blocks[0].attention.nonfinite += 5
    assert first.item() == 1


def test_observing_changes_nothing(tiny_run):
    run, monitor = tiny_run(), NonFinite(1)
    run.model.blocks[0].attention.nonfinite += 5
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    view = run.view(NAN)
    events(monitor, view)
    events(monitor, view)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert view.loss.isnan()


def test_it_is_a_counter_that_stays_put_on_a_healthy_run():
    (signal,) = NonFinite(1).signals
    assert signal.kind == "exact" and signal.bad == "up" and signal.name == "nan_inf_events"


@pytest.mark.parametrize("every_steps", [0, 2])
def test_it_counts_every_step_or_is_refused(every_steps):
    with pytest.raises(ValueError, match=f"monitor.non_finite.every_steps={every_steps} "):
        NonFinite(every_steps)
