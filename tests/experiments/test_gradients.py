"""An update's gradient from micro-batches is that of the batch, and taps see the last of them."""

from __future__ import annotations

import pytest
import torch

from experiments.gradients import backward
from faults.base import Sites

SITES = Sites(batch_size=8)


@pytest.fixture
def model_and_batch(make_run):
    run = make_run("model.backend=sdpa", "model.tie_embeddings=false")
    return run.new_model(), torch.from_numpy(run.corpus.batch(0, 0, 8))


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(model_and_batch, micro_batch):
    model, batch = model_and_batch
    whole = backward(model, batch, SITES, None, (), model.objective)
    of_batch = gradients(model)
    parts = backward(model, batch, SITES, micro_batch, (), model.objective)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(gradients(model), of_batch)


def test_a_batch_that_fits_is_one_piece_bit_for_bit(model_and_batch):
    model, batch = model_and_batch
    whole = backward(model, batch, SITES, None, (), model.objective)
    of_batch = gradients(model)
    loss, auxiliary, _ = model.objective(batch)
    (loss + auxiliary).backward()
    assert torch.equal(whole.loss, loss.detach())
    torch.testing.assert_close(gradients(model), of_batch, rtol=0, atol=0)
    shrunk = backward(model, batch[:2], SITES, 4, (), None)
    assert torch.equal(shrunk.watched, batch[:2])


def test_taps_see_the_last_micro_batch_as_a_batch_of_its_own(model_and_batch):
    model, batch = model_and_batch
    alone = backward(model, batch[6:], SITES, None, ("linear", "dot_product"), model.objective)
    model.zero_grad(set_to_none=True)
    seen = backward(model, batch, SITES, 2, ("linear", "dot_product"), model.objective)
    assert torch.equal(seen.watched, batch[6:])
    for name, tap in seen.taps.at("linear").items():
        other = alone.taps.at("linear")[name]
        for field in ("output", "output_grad", "weight", "weight_grad"):
            assert torch.equal(getattr(tap, field), getattr(other, field)), (name, field)
    for name, tap in seen.taps.at("dot_product").items():
        assert torch.equal(tap.input_grads[0], alone.taps.at("dot_product")[name].input_grads[0]), name


def test_watching_changes_no_gradient(model_and_batch):
    model, batch = model_and_batch
    backward(model, batch, SITES, 2, (), model.objective)
    unwatched = gradients(model)
    backward(model, batch, SITES, 2, ("linear", "dot_product", "norm"), model.objective)
    torch.testing.assert_close(gradients(model), unwatched, rtol=0, atol=0)
