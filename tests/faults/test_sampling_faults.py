"""Faults of which text is read: the very sequences that they say, and the others untouched."""

import math

import numpy as np
import pytest
import torch

from foreshock.experiments.training.engine import read_batch
from foreshock.experiments.training.stacked_engine import StackedEngine
from foreshock.faults.base import Sites
from foreshock.faults.data_repeat import DataRepeat
from foreshock.faults.domain_shift import DomainShift
from foreshock.faults.log import InjectionLog
from foreshock.faults.near_duplicates import NearDuplicates
from foreshock.faults.operation import Moment
from foreshock.faults.points import corrupt_batch, corrupt_starts
from foreshock.faults.shuffle_off import ShuffleOff

SIZE = 8
HEALTHY = Sites(batch_size=SIZE)


@pytest.fixture
def corpus(make_run):
    return make_run().corpus


def moved(fault, corpus, step: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Where the sequences begin in health, and with the fault."""
    starts, moment = corpus.starts(seed, step, SIZE), Moment(seed, step, corpus.vocab_size)
    return starts, corrupt_starts(starts, fault.sites(step, HEALTHY).sampling, corpus.places, moment, None)


def test_starts_and_sequences_are_the_batch(corpus):
    assert np.array_equal(corpus.sequences(corpus.starts(3, 5, SIZE)), corpus.batch(3, 5, SIZE))


@pytest.mark.parametrize("make", [ShuffleOff, DomainShift, NearDuplicates])
def test_a_share_of_zero_is_a_control_that_moves_nothing(make, corpus):
    healthy, starts = moved(make(0.0), corpus)
    assert make(0.0).describe().control and starts is healthy


@pytest.mark.parametrize("share", [1e-6, 0.3, 1.0])
@pytest.mark.parametrize("make", [ShuffleOff, DomainShift, NearDuplicates])
def test_a_share_of_the_sequences_moves_and_the_starts_given_stay(make, share, corpus):
    before = corpus.starts(0, 1, SIZE)
    healthy, starts = moved(make(share), corpus, step=1)
    assert np.array_equal(healthy, before)
    assert (starts != healthy).sum() == math.ceil(share * SIZE)
    assert starts.min() >= 0 and starts.max() < corpus.places.count


def test_in_order_each_sequence_begins_where_the_one_before_ends(corpus):
    starts = np.concatenate([moved(ShuffleOff(1.0), corpus, step, seed=step)[1] for step in range(3)])
    assert np.array_equal(starts, np.arange(3 * SIZE) * corpus.context_length)


def test_in_order_it_begins_again_at_the_end_of_the_corpus(corpus):
    step = corpus.places.count // (SIZE * corpus.context_length) + 1
    assert moved(ShuffleOff(1.0), corpus, step)[1].max() < corpus.places.count


def test_a_source_is_its_stretch_of_the_corpus_evenly_and_the_sources_are_all_of_it(corpus):
    starts = [np.concatenate([moved(DomainShift(1.0, s, 4), corpus, step)[1] for step in range(50)]) for s in range(4)]
    edges = [corpus.places.count * s // 4 for s in range(5)]
    for stretch, first, end in zip(starts, edges[:-1], edges[1:], strict=True):
        assert first <= stretch.min() and stretch.max() < end
        # the mean of 400 uniform draws, within 5 standard errors of the middle
        assert abs((stretch.mean() - first) / (end - first) - 0.5) < 5 / math.sqrt(12 * 400)


def test_copies_are_of_a_few_originals_that_stay_the_same(corpus):
    starts = np.concatenate([moved(NearDuplicates(1.0, documents=3), corpus, step)[1] for step in range(9)])
    assert len(set(starts)) == 3
    other = moved(NearDuplicates(1.0, documents=3), corpus, seed=1)[1]
    assert not set(other) & set(starts)


def test_edits_are_as_many_as_said_in_the_copies_alone(corpus):
    fault = NearDuplicates(0.5, edits=0.2, documents=1)
    sites, moment = fault.sites(4, HEALTHY), Moment(0, 4, corpus.vocab_size)
    exact = torch.from_numpy(read_batch(corpus, moment, sites))
    inputs, targets = corrupt_batch(exact, sites.batch, moment).unbind(1)
    edited = torch.cat((inputs[:, :1], targets), 1)
    copies = exact != torch.from_numpy(corpus.batch(0, 4, SIZE))
    edits = (edited != exact).sum(1)
    assert sorted(edits.tolist()) == [0] * 4 + [math.ceil(0.2 * 17)] * 4
    assert torch.equal(edits > 0, copies.any(1)) and torch.equal(inputs[:, 1:], targets[:, :-1])


def test_exact_copies_have_no_edit():
    fault = NearDuplicates(0.5, edits=0.0)
    assert fault.sites(0, HEALTHY).batch == () and len(fault.describe().injections) == 1


@pytest.mark.parametrize(
    ("fault", "read"),
    [
        (DataRepeat(onset=3), [None, None, None, 0, 1, 2, 3]),
        (DataRepeat(back=2, onset=3), [None, None, None, 1, 2, 3, 4]),
        (DataRepeat(back=1, cycle=1, onset=3), [None, None, None, 2, 2, 2, 2]),
        (DataRepeat(cycle=2, onset=3, duration=3), [None, None, None, 0, 1, 0, None]),
        (DataRepeat(back=0, onset=3), [None] * 7),
    ],
)
def test_the_loader_reads_the_batches_of_earlier_steps(fault, read):
    assert [fault.sites(step, HEALTHY).data_step for step in range(7)] == read
    assert fault.describe().control == (read == [None] * 7)


@pytest.mark.parametrize("overrides", [["fault=data_repeat", "fault.onset=3"], ["fault=data_repeat", "fault.cycle=1"]])
def test_the_engine_trains_on_the_very_batch_that_is_read(make_run, overrides):
    run = make_run(*overrides)
    step, healthy = run.fault.onset + 2, run.healthy_sites()
    sites = run.fault.sites(step, healthy)
    (repeated,), (earlier,) = (
        run.new_engine().micro_batches(s, at) for s, at in ((step, sites), (sites.data_step, healthy))
    )
    assert np.array_equal(repeated.numpy(), earlier.numpy())


@pytest.mark.parametrize("fault", ["data_repeat", "shuffle_off", "domain_shift"])
def test_in_a_stack_a_run_reads_what_it_reads_alone(make_run, fault):
    runs = [make_run(f"fault={fault}", f"seed={seed}") for seed in (0, 1)]
    step = 12
    engine = StackedEngine([run.new_model() for run in runs], [run.train for run in runs], runs[0].corpus, (0, 1))
    sites = [runs[0].fault.sites(step, runs[0].healthy_sites()), runs[1].healthy_sites()]
    stacked = engine.step(step, sites).batch
    for run, site, batch in zip(runs, sites, stacked, strict=True):
        assert np.array_equal(run.new_engine().micro_batches(step, site)[0].numpy(), batch.numpy())


def test_what_was_moved_is_in_the_log(corpus):
    log = InjectionLog()
    read_batch(corpus, Moment(0, 1, corpus.vocab_size), ShuffleOff(0.5).sites(1, HEALTHY), log)
    (entry,) = log.entries()
    assert (entry["point"], entry["tensor"], entry["elements"]) == ("sampling", "starts", SIZE // 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataRepeat(back=5, onset=3), "fault.back=5 is not allowed: 0 to fault.onset=3, or null"),
        (lambda: DataRepeat(cycle=0, onset=3), "fault.cycle=0 is not allowed: 1 to 10000000 batches"),
        (lambda: DataRepeat(back=0, cycle=2, onset=3), "fault.cycle=2 with fault.back=0 is no control"),
        (lambda: ShuffleOff(2.0), "fault.share=2.0 is not allowed"),
        (lambda: DomainShift(1.0, source=8), "fault.source=8 is not allowed: 0 to 7"),
        (lambda: DomainShift(1.0, sources=1), "fault.sources=1 is not allowed: 2 to 1024"),
        (lambda: NearDuplicates(0.1, edits=-1.0), "fault.edits=-1.0 is not allowed: 0 "),
        (lambda: NearDuplicates(0.1, documents=0), "fault.documents=0 is not allowed: 1 to "),
    ],
)
def test_an_impossible_fault_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
