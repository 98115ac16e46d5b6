"""An update's gradient from micro-batches is that of the batch, and taps see the last of them."""

from __future__ import annotations

import pytest
import torch

from foreshock.experiments.training.gradients import backward, micro_batches
from foreshock.faults.base import Sites
from tests.rounding_bounds import FP32, gamma, once_stored_in_bf16

pytestmark = pytest.mark.numeric

SITES = Sites(batch_size=8)


@pytest.fixture
def model_and_batch(make_run):
    run = make_run("model.backend=sdpa", "model.tie_embeddings=false")
    return run.new_model(), torch.from_numpy(run.corpus.batch(0, 0, 8))


ROUNDINGS = 500
"""On the longest way: 128 tokens, 41 logits, two layers with products of 16, 8, 16, 16 and 32 terms and their norms."""


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Gradients of one batch in other pieces: other shapes of products, whose sums have orders of their own."""
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert (gradient - other[name]).norm() <= once_stored_in_bf16(ROUNDINGS) * other[name].norm(), name


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("micro_batch", "watched", "sizes"),
    [
        (None, None, [8]),
        (2, None, [2, 2, 2, 2]),
        (4, 4, [4, 4]),
        (4, 1, [4, 3, 1]),
        (None, 2, [6, 2]),
        (3, None, [3, 3, 2]),
        (3, 1, [3, 3, 1, 1]),
        (16, None, [8]),  # a fault's batch may be smaller than a micro-batch,
        (16, 2, [6, 2]),
        (16, 12, [8]),  # and than what is watched
    ],
)
def test_a_batch_in_pieces_the_watched_one_last(micro_batch, watched, sizes):
    batch = torch.arange(8)[:, None]
    parts = micro_batches(batch, micro_batch, watched)
    assert [len(part) for part in parts] == sizes and torch.equal(torch.cat(parts), batch)


@pytest.mark.parametrize(("micro_batch", "watched"), [(1, None), (3, None), (4, None), (4, 1), (4, 3), (None, 2)])
def test_micro_batches_add_up_to_the_batch(model_and_batch, micro_batch, watched):
    model, batch = model_and_batch
    whole = backward(model, [batch], SITES, (), model)
    of_batch = gradients(model)
    parts = backward(model, micro_batches(batch, micro_batch, watched), SITES, (), model)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=2 * gamma(ROUNDINGS, FP32), atol=0)
    assert_near(gradients(model), of_batch)


def test_auxiliary_losses_weigh_as_much_as_the_sequences_they_are_of(make_run):
    run = make_run("model=moe_nano", "model.moe.aux_coef=0.5", "model.moe.z_coef=0.1")
    model, batch = run.new_model(), torch.from_numpy(run.corpus.batch(0, 0, 8))
    parts = micro_batches(batch, 4, 1)
    assert [len(part) for part in parts] == [4, 3, 1]
    loss = backward(model, parts, SITES, (), model).loss
    found, nll = gradients(model), 0.0
    for part in parts:
        of_part, auxiliary, _ = model(part)
        (len(part) / 8 * (of_part + auxiliary)).backward()
        nll += len(part) / 8 * of_part.item()
    assert loss.item() == pytest.approx(nll, rel=2 * gamma(ROUNDINGS, FP32))
    assert_near(found, gradients(model))


def test_a_batch_that_fits_is_one_piece_bit_for_bit(model_and_batch):
    model, batch = model_and_batch
    whole = backward(model, [batch], SITES, (), None)
    of_batch = gradients(model)
    loss, auxiliary, _ = model(batch)
    (loss + auxiliary).backward()
    assert torch.equal(whole.loss, loss.detach())
    torch.testing.assert_close(gradients(model), of_batch, rtol=0, atol=0)
    assert torch.equal(whole.watched, batch)


@pytest.mark.parametrize(("micro_batch", "watched"), [(2, None), (4, 2)])
def test_taps_see_the_last_micro_batch_as_a_batch_of_its_own(model_and_batch, micro_batch, watched):
    model, batch = model_and_batch
    alone = backward(model, [batch[6:]], SITES, ("linear", "dot_product"), model)
    model.zero_grad(set_to_none=True)
    parts = micro_batches(batch, micro_batch, watched)
    seen = backward(model, parts, SITES, ("linear", "dot_product"), model)
    assert torch.equal(seen.watched, batch[6:])
    for name, tap in seen.taps.at("linear").items():
        other = alone.taps.at("linear")[name]
        for field in ("output", "output_grad", "weight", "weight_grad"):
            assert torch.equal(getattr(tap, field), getattr(other, field)), (name, field)
    for name, tap in seen.taps.at("dot_product").items():
        assert torch.equal(tap.input_grads[0], alone.taps.at("dot_product")[name].input_grads[0]), name


def test_watching_changes_no_gradient(model_and_batch):
    model, batch = model_and_batch
    parts = micro_batches(batch, 4, 1)
    backward(model, parts, SITES, (), model)
    unwatched = gradients(model)
    backward(model, parts, SITES, ("linear", "dot_product", "norm"), model)
    torch.testing.assert_close(gradients(model), unwatched, rtol=0, atol=0)
