"""Another order of the same data, a benign control."""

import numpy as np
import pytest
import torch

from foreshock.faults.base import Sites
from foreshock.faults.data_order import DataOrder
from foreshock.faults.operation import Moment
from foreshock.faults.points import corrupt_starts
from tests.faults.engine_steps import differing, stepped

SIZE = 64
HEALTHY = Sites(batch_size=SIZE)


def drawn(fault: DataOrder, corpus, step: int, seed: int = 0) -> np.ndarray:
    starts, moment = corpus.starts(seed, step, SIZE), Moment(seed, step, corpus.vocab_size)
    return corrupt_starts(starts, fault.sites(step, HEALTHY).sampling, corpus.places, moment, None)


def test_each_order_seed_and_step_has_draws_of_its_own(make_run):
    corpus = make_run().corpus
    orders = [corpus.starts(0, 3, SIZE), corpus.starts(1, 3, SIZE)]
    orders += [
        drawn(DataOrder(draw), corpus, step, seed) for draw, step, seed in ((1, 3, 0), (2, 3, 0), (1, 4, 0), (1, 3, 1))
    ]
    for i, order in enumerate(orders):
        assert order.min() >= 0 and order.max() < corpus.places.count
        assert not any(np.array_equal(order, other) for other in orders[:i])
    assert np.array_equal(drawn(DataOrder(1), corpus, 3), orders[2])


def test_starts_are_uniform_over_all_places(make_run):
    """The mean of n uniform draws over N places errs by N / sqrt(12 n); six of those is no accident."""
    corpus = make_run().corpus
    draws = np.concatenate([drawn(DataOrder(), corpus, step) for step in range(40)])
    error = corpus.places.count / np.sqrt(12 * len(draws))
    assert abs(draws.mean() - (corpus.places.count - 1) / 2) < 6 * error


def test_draw_0_is_the_runs_own_order_and_minus_1_is_refused(make_run):
    own = make_run("fault=benign_order", "fault.draw=0", "fault.onset=1")
    assert own.fault.describe().control
    _, control, _ = stepped(own, 3)
    _, healthy, _ = stepped(make_run(), 3)
    assert not any(differing(one, other) for one, other in zip(control, healthy, strict=True))
    with pytest.raises(ValueError, match=r"fault\.draw=-1 is not allowed: 0"):
        DataOrder(-1)


def test_weights_part_from_the_onset_on(make_run):
    _, changed, _ = stepped(make_run("fault=benign_order", "fault.onset=2"), 3)
    engine, healthy, _ = stepped(make_run(), 3)
    assert [bool(differing(one, other)) for one, other in zip(changed, healthy, strict=True)] == [False, False, True]
    assert all(torch.isfinite(weight).all() for weight in engine.model.parameters())
