"""Sign diversity against an SVD and a count."""

import math

import pytest
import torch

from foreshock.monitors.spectral_alignment import (
    LAYERS,
    SpectralAlignment,
    majority_fraction,
    top_right_singular_vector,
)

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20), (1, 5), (5, 1)])
def test_the_vector_is_the_svd_s_up_to_its_sign(shape):
    weight = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.linalg.svd(weight).Vh[:, 0]
    got = top_right_singular_vector(weight)
    sign = (got * expected).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(sign * got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4)])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_weight_without_a_direction_has_none(shape, value):
    weight = torch.ones(2, *shape)
    weight[1] = value
    got = top_right_singular_vector(weight)
    assert got[0].isfinite().all() and got[1].isnan().all()


@pytest.mark.parametrize(
    ("projection", "fraction"),
    [([1.0, 2.0, 3.0, 4.0], 1.0), ([-1.0, -2.0, 3.0, -4.0], 0.75), ([1.0, -9.0], 0.5), ([0.0, 1.0], 0.75)],
)
def test_fractions_of_known_signs(projection, fraction):
    assert majority_fraction(torch.tensor(projection)).item() == fraction


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_has_no_sign(value):
    fractions = majority_fraction(torch.tensor([[value, 1.0, 1.0, -1.0], [-2.0, 1.0, 1.0, 1.0]]))
    assert fractions[0].isnan() and fractions[1] == 0.75


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_each_reading_counts_the_signs_of_its_layer_s_inputs(trained_steps, mlp):
    monitor = SpectralAlignment(1)
    run = trained_steps(monitor, mlp=mlp)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    view = run.next()
    got = monitor.observe(view)
    assert set(got) == {signal.name for signal in monitor.signals}
    for suffix, module in LAYERS.items():
        for layer in range(2):
            name = f"blocks.{layer}.{module}"
            inputs = view.taps.at("linear")[name].inputs[0].reshape(48, -1).double()
            along = inputs @ torch.linalg.svd(before[f"{name}.weight"].double()).Vh[0]
            positive = int((along > 0).sum())
            assert got[f"spectral_alignment.{suffix}"].value[layer].item() == pytest.approx(
                max(positive, 48 - positive) / 48
            )


def test_inputs_of_one_sign_are_aligned(trained_steps):
    """W_q sums its inputs, and every token's is the same: the norm's bias."""
    monitor = SpectralAlignment(1)
    run = trained_steps(monitor)
    with torch.no_grad():
        run.model.blocks[0].attention.q.weight.fill_(0.1)
        run.model.blocks[0].attention_norm.weight.fill_(1e-3)
        run.model.blocks[0].attention_norm.bias.fill_(1.0)
        run.model.blocks[1].attention.k.weight.zero_()
    got = monitor.observe(run.next())
    assert got["spectral_alignment.q"].value[0].item() == 1.0
    assert got["spectral_alignment.k"].undefined.tolist() == [False, True]
