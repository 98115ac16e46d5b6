"""Adam's numbers against an update done by hand, and the size of its steps against their definition."""

import math

import pytest
import torch

from foreshock.monitors.adam import AdamState, AdamUpdateRMS, _debias
from tests.rounding_bounds import FP32, gamma

pytestmark = pytest.mark.numeric


def test_the_state_is_what_the_update_was_made_of(trained_steps):
    """theta_t = (1 - eta decay) theta_(t-1) - eta m_hat / root, with m_hat from beta1 and its debias."""
    run = trained_steps()
    run.next()
    before = [p.detach().clone() for p in run.model.parameters()]
    view = run.next()
    adam = AdamState.of(view)
    group = run.optimizer.param_groups[0]
    assert adam.learning_rate == [1e-2] * len(before) and adam.beta1 == 0.9
    assert adam.beta1_debias.item() == pytest.approx(1 - 0.9**2, rel=gamma(4, FP32))
    for old, (name, new), root, g in zip(before, run.model.named_parameters(), adam.root, adam.gradient, strict=True):
        momentum = run.optimizer.state[new]["exp_avg"] / adam.beta1_debias
        expected = (1 - 1e-2 * group["weight_decay"]) * old - 1e-2 * momentum / root
        size = (old.abs() + 1e-2 * (momentum / root).abs()).max()
        torch.testing.assert_close(adam.weight[name], expected, rtol=0, atol=2 * float(gamma(20, FP32) * size))
        assert torch.equal(g, new.grad)


def test_a_loop_that_has_cleared_its_gradients_is_told(trained_steps):
    view = trained_steps().next()
    view.optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"reads the gradient of tokens\.weight, and the step has none"):
        AdamState.of(view)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
def test_the_debias_keeps_fp32_s_digits(beta):
    """Four roundings: of ln beta to FP32, of the step count's product with it, of expm1, and of the result."""
    for steps in (1, 2, 100, 30_000):
        got = _debias(beta, torch.tensor(float(steps))).item()
        assert got == pytest.approx(1 - beta**steps, rel=gamma(4, FP32)), steps


def test_the_first_update_has_size_one(trained_steps):
    """v_hat is g^2 itself; but for embeddings of tokens that the batch does not have, and eps."""
    got = AdamUpdateRMS(1).observe(trained_steps().next())
    assert got["adam_update_rms"].value.shape == (2,)
    torch.testing.assert_close(got["adam_update_rms"].value, torch.ones(2), rtol=2e-2, atol=0)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "positions": "rope"}])
def test_each_layer_reports_its_largest_tensor(trained_steps, changes):
    run = trained_steps(**changes)
    for _ in range(3):
        view = run.next()
    got = AdamUpdateRMS(1).observe(view)
    rms = {}
    for name, p in run.model.named_parameters():
        v = run.optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.95**3)
        rms[name] = float((p.grad.double() ** 2 / (v.sqrt() + 1e-8) ** 2).mean().sqrt())
    for layer in range(2):
        expected = max(value for name, value in rms.items() if name.startswith(f"blocks.{layer}."))
        assert got["adam_update_rms"].value[layer].item() == pytest.approx(expected, rel=gamma(200, FP32))
    outside = [value for name, value in rms.items() if name.startswith(("tokens", "positions", "head"))]
    assert got["adam_update_rms.embedding"].item() == pytest.approx(max(outside), rel=gamma(300, FP32))


def test_a_gradient_that_grows_out_of_an_old_second_moment_is_above_the_published_number(trained_steps):
    run, monitor = trained_steps(), AdamUpdateRMS(1)
    view = run.next()
    parameter = run.model.blocks[1].attention.q.weight
    parameter.grad.fill_(10.0)
    run.optimizer.state[parameter]["exp_avg_sq"].fill_(0.05)  # of a 1, debiased by 1 - beta2
    got = monitor.observe(view)["adam_update_rms"].value
    assert got[1].item() == pytest.approx(10.0) and got[0] < 2.3
    parameter.grad[0, 0] = math.nan
    assert monitor.observe(view)["adam_update_rms"].value.isnan().tolist() == [False, True]


def test_a_view_without_an_optimizer_is_refused(tiny_run):
    with pytest.raises(ValueError, match="no optimizer"):
        AdamUpdateRMS(1).observe(tiny_run().view())
