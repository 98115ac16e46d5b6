"""Faults of a batch's tokens: each changes what it says, in as many sequences as it says, and nothing else."""

import math

import pytest
import torch

from foreshock.experiments.training.stacked_engine import StackedEngine
from foreshock.faults.bad_batch import BadBatch
from foreshock.faults.base import Sites
from foreshock.faults.label_noise import LabelNoise
from foreshock.faults.label_shift import LabelShift
from foreshock.faults.operation import Moment
from foreshock.faults.padding_counted import PADDING, PaddingCounted
from foreshock.faults.points import corrupt_batch
from foreshock.faults.tokenizer_mismatch import TokenizerMismatch, other_vocabulary
from foreshock.models.batch import IGNORED

HEALTHY = Sites(batch_size=8)
VOCABULARY = 97
BATCH = torch.randint(1, VOCABULARY, (8, 11), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = BATCH[:, :-1], BATCH[:, 1:]


def corrupted(*faults, seed: int = 0, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    sites = HEALTHY
    for fault in faults:
        sites = fault.sites(step, sites)
    return corrupt_batch(BATCH, sites.batch, Moment(seed, step, VOCABULARY)).unbind(1)


def hit_rows(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (inputs != INPUTS).any(1) | (targets != TARGETS).any(1)


@pytest.mark.parametrize("fault", [BadBatch(0.0), TokenizerMismatch(0.0), PaddingCounted(0.0), LabelShift(0)])
def test_the_identity_dose_is_a_control_that_returns_the_very_batch(fault):
    assert fault.describe().control
    assert corrupt_batch(BATCH, fault.sites(0, HEALTHY).batch, Moment(0, 0, VOCABULARY)) is BATCH


@pytest.mark.parametrize("share", [1e-6, 0.3, 1.0])
@pytest.mark.parametrize("make", [BadBatch, lambda share: BadBatch(share, "random_tokens"), TokenizerMismatch])
def test_a_share_of_the_sequences_is_hit_and_all_others_are_right(make, share):
    inputs, targets = corrupted(make(share))
    assert hit_rows(inputs, targets).sum() == math.ceil(share * 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert min(inputs.min(), targets.min()) >= 0 and max(inputs.max(), targets.max()) < VOCABULARY


@pytest.mark.parametrize("make", [BadBatch, TokenizerMismatch])
def test_which_sequences_are_hit_is_a_function_of_seed_and_step(make):
    first = hit_rows(*corrupted(make(0.5)))
    assert torch.equal(first, hit_rows(*corrupted(make(0.5))))
    assert not torch.equal(first, hit_rows(*corrupted(make(0.5), step=1)))
    assert not torch.equal(first, hit_rows(*corrupted(make(0.5), seed=1)))


def test_a_repeated_token_fills_its_sequence_and_differs_between_sequences():
    inputs, targets = corrupted(BadBatch(1.0))
    assert torch.equal(inputs, inputs[:, :1].expand_as(inputs)) and torch.equal(targets, inputs)
    assert len(inputs[:, 0].unique()) > 1


def test_random_tokens_take_many_values():
    inputs, _ = corrupted(BadBatch(1.0, "random_tokens"))
    assert all(len(row.unique()) > 5 for row in inputs)


def test_another_vocabulary_is_one_cycle_and_the_same_at_every_step():
    ids = other_vocabulary(Moment(0, 0, VOCABULARY))
    assert torch.equal(ids, other_vocabulary(Moment(0, 9, VOCABULARY)))
    assert not torch.equal(ids, other_vocabulary(Moment(1, 0, VOCABULARY)))
    position, seen = 0, set()
    while position not in seen:
        seen.add(position)
        position = int(ids[position])
    assert len(seen) == VOCABULARY
    inputs, targets = corrupted(TokenizerMismatch(1.0), step=4)
    assert torch.equal(inputs, ids[INPUTS]) and torch.equal(targets, ids[TARGETS])


@pytest.mark.parametrize(
    ("shift", "by_hand"),
    [
        (1, [2, 3, 4, IGNORED]),
        (3, [4, IGNORED, IGNORED, IGNORED]),
        (-1, [0, 1, 2, 3]),
        (-2, [IGNORED, 0, 1, 2]),
    ],
)
def test_targets_are_shifted_as_by_hand(shift, by_hand):
    tokens = torch.arange(5).unsqueeze(0)  # x_t = t, so that the right targets are 1, 2, 3, 4
    inputs, targets = corrupt_batch(tokens, LabelShift(shift).sites(0, HEALTHY).batch, Moment(0, 0, 5)).unbind(1)
    assert inputs.tolist() == [[0, 1, 2, 3]] and targets.tolist() == [by_hand]


def test_a_target_that_is_left_out_stays_so_under_another_fault():
    for other in (LabelNoise(1.0), TokenizerMismatch(1.0)):
        _, targets = corrupted(LabelShift(2), other)
        assert torch.equal(targets == IGNORED, corrupted(LabelShift(2))[1] == IGNORED)


@pytest.mark.parametrize(("counted", "target"), [(True, PADDING), (False, IGNORED)])
def test_padding_takes_the_end_of_every_sequence(counted, target):
    inputs, targets = corrupted(PaddingCounted(0.25, counted))  # ceil(2.5) = 3 of 10 targets
    assert torch.equal(targets[:, :7], TARGETS[:, :7]) and (targets[:, 7:] == target).all()
    assert torch.equal(inputs[:, :8], INPUTS[:, :8]) and (inputs[:, 8:] == PADDING).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BadBatch(1.5), "fault.share=1.5 is not allowed: 0 "),
        (lambda: TokenizerMismatch(float("nan")), "fault.share=nan is not allowed: 0 "),
        (lambda: PaddingCounted(-0.1), "fault.share=-0.1 is not allowed: 0 "),
        (lambda: BadBatch(0.1, "noise"), "fault.kind='noise' is not allowed: one of repeated_token, random_tokens"),
    ],
)
def test_an_impossible_fault_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=label_shift", "fault.shift=-16"], "fault.shift=-16 leaves no target: .* model.context_length=16"),
        (["fault=padding_counted", "fault.share=1.0", "fault.counted=false"], "fault.share=1.0 .* leaves no target"),
    ],
)
def test_a_dose_that_leaves_no_target_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)


def test_the_loss_leaves_out_targets_that_are_not_there(make_run):
    """Padding that is not counted: the mean loss over the text is that of the same text without the padding."""
    run = make_run("fault=padding_counted", "fault.counted=false", "fault.share=0.5")
    engine, healthy = run.new_engine(), run.healthy_sites()
    (clean,) = engine.micro_batches(0, healthy)
    loss = engine.step(0, [run.fault.sites(0, healthy)]).loss
    short = run.new_model().loss(clean[:, :9])  # 8 of 16 targets
    assert float(loss) == pytest.approx(short.item(), rel=16 * 2**-24 * 8 * 8)  # FP32 sums of 64 terms


def test_a_stack_counts_the_tokens_of_one_of_its_runs(make_run):
    run = make_run()
    models = [run.new_model() for _ in range(2)]
    stack = StackedEngine(models, [run.train] * 2, run.corpus, [0, 1])
    assert stack.step(0, [run.healthy_sites()] * 2).tokens == run.train.batch_size * run.model_config.context_length
