"""The loss scale, skipped updates and their share of a window, by hand; tokens of an update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foreshock.monitors.base import LossScaling
from foreshock.monitors.loss_scale import LossScale
from foreshock.monitors.tokens import Tokens
from foreshock.monitors.unreadable import Unreadable


def read(monitor, view, step: int, scale: float, skipped: int) -> dict[str, float]:
    readings = monitor.observe(replace(view, step=step, scaling=LossScaling(scale, skipped)))
    assert all(reading.shape == () and reading.dtype is torch.float64 for reading in readings.values())
    return {name: reading.item() for name, reading in readings.items()}


def test_the_scale_and_the_skipped_updates_are_those_of_the_scaler(tiny_run):
    monitor, view = LossScale(1, 10), tiny_run().view()
    assert read(monitor, view, 1, 65536.0, 0) == {"loss_scale": 65536.0, "skipped_updates": 0, "overflow_rate": 0}
    assert read(monitor, view, 4, 16384.0, 2) == {"loss_scale": 16384.0, "skipped_updates": 2, "overflow_rate": 50}


def test_a_rate_is_that_of_a_count_over_the_last_steps(tiny_run):
    """Against the definition, over every start and length of runs of skipped updates."""
    skips = [bool(bit) for bit in torch.randint(2, (200,), generator=torch.Generator().manual_seed(0))]
    monitor, view, window = LossScale(1, 7), tiny_run().view(), 7
    for step in range(1, 201):
        if not skips[step - 1]:
            last = skips[max(0, step - window) : step]
            rate = read(monitor, view, step, 1.0, sum(skips[:step]))["overflow_rate"]
            assert rate == pytest.approx(100 * sum(last) / len(last), rel=1e-12)


def test_skipped_updates_with_a_reading_of_their_own_count_alike(tiny_run):
    monitor, view = LossScale(1, 4), tiny_run().view()
    skipped = [0, 1, 2, 2, 2, 2, 3, 3]
    rates = [read(monitor, view, step, 1.0, count)["overflow_rate"] for step, count in enumerate(skipped, 1)]
    assert rates == [0, 50, pytest.approx(200 / 3), 50, 50, 25, 25, 25]


def test_what_it_remembers_goes_through_a_checkpoint(tiny_run):
    view, whole, before, after = tiny_run().view(), LossScale(1, 3), LossScale(1, 3), LossScale(1, 3)
    for monitor in (whole, before):
        read(monitor, view, 1, 8.0, 0)
        read(monitor, view, 4, 2.0, 2)
    after.load_state_dict(before.state_dict())
    assert read(after, view, 5, 2.0, 2) == read(whole, view, 5, 2.0, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [((2, 10), r"^monitor\.loss_scale\.every_steps=2 is not"), ((1, 0), r"^monitor\.loss_scale\.window=0 is not")],
)
def test_what_is_not_allowed_is_named(given, said):
    with pytest.raises(ValueError, match=said):
        LossScale(*given)


def test_a_step_without_a_scaler_is_named(tiny_run):
    with pytest.raises(ValueError, match="the GradScaler's scale"):
        LossScale(1, 10).observe(tiny_run().view())


def test_tokens_are_those_of_the_update_and_unknown_ones_leave_the_step_out(tiny_run):
    monitor, view = Tokens(1), tiny_run().view()
    assert monitor.observe(replace(view, update_tokens=2**25 + 1))["tokens_per_update"].item() == 2**25 + 1
    with pytest.raises(Unreadable, match="no token ids"):
        monitor.observe(view)
