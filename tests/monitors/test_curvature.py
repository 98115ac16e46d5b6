"""Curvatures against exact Hessians, and reading them leaves the model as it is."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from foreshock.models.numerics import AttentionNumerics, SiteFault
from foreshock.monitors.adam import AdamState
from foreshock.monitors.curvature import GradientCurvature, hessian_vector_product
from foreshock.monitors.unreadable import Unreadable
from tests.rounding_bounds import FP32, FP64, gamma, likely

pytestmark = pytest.mark.numeric

IN_FP64 = {"dtype": torch.float64, "backend": "sdpa", "d_model": 4, "d_ff": 4, "n_heads": 2, "n_layers": 1}
CHAIN = 600
"""Roundings on the longest way through IN_FP64: 48 tokens' sums, 7 logits, 5 products of 4 or 16, norms; thrice for a
product with H, which is a backward of forward and backward."""


def exact_hessian(view) -> torch.Tensor:
    """Of the view's objective at its weights, dense, by double backward."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in view.model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(view.objective_at(weights), list(weights.values()), create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    rows = [torch.autograd.grad(entry, list(weights.values()), retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_the_product_of_a_quadratic_is_exact():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator).double()
    weights = {"a": torch.ones(2).double(), "b": torch.arange(3.0).double()}
    direction = [torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 0.0, 3.0]).double()]

    def objective(w):
        x = torch.cat([w["a"], w["b"]])
        return (root @ x).square().sum() / 2 + x.sum()

    got = hessian_vector_product(objective, weights, direction)
    assert [x.shape for x in got] == [(2,), (3,)]
    expected = root.mT @ root @ flat(direction)
    sizes = root.abs().mT @ root.abs() @ flat(direction).abs()
    assert ((flat(got) - expected).abs() <= 2 * gamma(20, FP64) * sizes).all()  # two products of 5 terms either way
    assert not flat(hessian_vector_product(objective, weights, [torch.zeros(2), torch.zeros(3)])).any()


def test_the_product_is_the_difference_of_gradients_at_neighbouring_weights(trained_steps):
    """In FP64, where a step e of 1e-6 costs (e / |w|)^2 = 1e-8 by the third derivative and 1e-10 by rounding."""
    view = trained_steps(**IN_FP64).next()
    weights = {name: p.detach() for name, p in view.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(w.shape, generator=generator).double() for w in weights.values()]
    gradients = []
    for step in (1e-6, -1e-6):
        moved = {n: (w + step * d).requires_grad_() for (n, w), d in zip(weights.items(), direction, strict=True)}
        gradients.append(flat(torch.autograd.grad(view.objective_at(moved), list(moved.values()))))
    got, difference = flat(hessian_vector_product(view.objective_at, weights, direction)), gradients[0] - gradients[1]
    assert (got - difference / 2e-6).norm() < 1e-6 * got.norm()


def test_both_readings_are_those_of_the_exact_hessian(trained_steps):
    run, monitor = trained_steps(**IN_FP64), GradientCurvature(1, power_iterations=60)
    for _ in range(3):
        view = run.next()
    got = {name: reading.value.item() for name, reading in monitor.observe(view).items()}
    hessian, adam = exact_hessian(view), AdamState.of(view)
    g = flat(adam.gradient)
    rounding = 2 * gamma(CHAIN, FP64) * float(hessian.norm())  # of a quotient g^T H g / g^T g
    curvature = float(g @ hessian @ g / (g @ g))
    assert got["gradient_curvature"] == pytest.approx(curvature * 1e-2 / 2, rel=0, abs=rounding * 1e-2 / 2)
    scale = (adam.beta1_debias.double() * flat(adam.root)).rsqrt()
    eigenvalues, vectors = torch.linalg.eigh(scale[:, None] * hessian * scale)
    order = eigenvalues.abs().argsort(descending=True)
    (top, next_one), share = eigenvalues[order[:2]], (vectors.mT @ (scale * g)).square()[order]
    # after k products the rest's share of the vector is at most tan^2 of its start's angle times (next / top)^2k
    rest = float(share[1:].sum() / share[0] * (next_one / top) ** (2 * 59))
    tolerance = 2 * rest + 2 * gamma(CHAIN, FP64) * float((scale[:, None] * hessian * scale).norm() / top.abs())
    assert tolerance < 1e-6
    assert got["gradient_curvature.preconditioned"] == pytest.approx(float(top) * 1e-2 / 38, rel=tolerance)


def test_one_iteration_a_reading_gets_there_by_starting_where_the_last_one_stopped(trained_steps):
    run = trained_steps(**IN_FP64)
    view = run.next()
    at_once = GradientCurvature(1, 60).observe(view)["gradient_curvature.preconditioned"].value
    patient = GradientCurvature(1, 1)
    readings = [patient.observe(view)["gradient_curvature.preconditioned"].value for _ in range(60)]
    assert abs(readings[0] / at_once - 1) > 1e-3
    assert readings[-1].item() == pytest.approx(at_once.item(), rel=1e-4)


def test_a_group_with_its_own_rate_weighs_by_it(trained_steps):
    """With d = eta g, d^T H d / (2 g.d); a frozen group has no part in either reading."""
    run = trained_steps(**IN_FP64)
    names = [name for name, _ in run.model.named_parameters()]
    moving = [".attention." in name for name in names]
    old = list(run.model.parameters())
    run.optimizer = torch.optim.AdamW(
        [
            {"params": [p for p, moves in zip(old, moving, strict=True) if moves], "lr": 3e-2},
            {"params": [p for p, moves in zip(old, moving, strict=True) if not moves], "lr": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    view = run.next()
    got = GradientCurvature(1, 1).observe(view)["gradient_curvature"].value
    mask = torch.cat([torch.full((p.numel(),), m) for p, m in zip(old, moving, strict=True)])
    g = flat(AdamState.of(view).gradient) * mask
    assert got.item() == pytest.approx(float(3e-2 * (g @ exact_hessian(view) @ g) / (2 * g @ g)), rel=1e-4)


def test_the_kernel_and_its_faults_have_no_say(trained_steps):
    """H is of the objective; the rounding of a kernel and what it does wrong reach it by the gradient alone."""
    view = trained_steps(init_std=0.2).next()
    told = replace(view, numerics=AttentionNumerics((SiteFault("o", "both", "truncate", 7),)))
    own, faulty = (GradientCurvature(1, 1).observe(one) for one in (view, told))
    for block in view.model.blocks:
        assert block.attention.dot_product.backend == "reference"  # as it was
        block.attention.dot_product.backend = "sdpa"
    plain = GradientCurvature(1, 1).observe(view)
    for signal, reading in own.items():
        assert reading.value == faulty[signal].value == plain[signal].value


@pytest.mark.parametrize("seed", range(4))
def test_legal_rounding_moves_a_reading_by_rounding(trained_steps, seed):
    """Weights and gradients one rounding off. Differences of a BF16 kernel's gradients moved a reading by a tenth."""
    run = trained_steps(init_std=0.2)
    for _ in range(3):
        view = run.next()
    own, adam = GradientCurvature(1, 1).observe(view), AdamState.of(view)
    g = [x.clone() for x in adam.gradient]
    bend = hessian_vector_product(view.objective_at, adam.weight, g)
    condition = float(flat(g).norm() * flat(bend).norm() / (flat(g) @ flat(bend)).abs())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in (*view.model.parameters(), *(p.grad for p in view.model.parameters())):
            x.mul_(1 + 2 * FP32 * (torch.rand(x.shape, generator=generator) - 0.5))
    moved = GradientCurvature(1, 1).observe(view)
    for signal, reading in own.items():
        # CHAIN of d_model 4; a model of 16 and d_ff 32 has thrice as many roundings
        assert abs(moved[signal].value / reading.value - 1) < condition * likely(3 * CHAIN, FP32), (signal, condition)


def test_reading_leaves_parameters_gradients_and_fault_counters_alone(trained_steps):
    numerics = AttentionNumerics((SiteFault("o", "backward", "truncate", 7),))
    run = trained_steps(numerics=numerics)
    view = run.next()
    parameters = list(run.model.parameters())
    with torch.no_grad():
        parameters[0][0, 0] = math.inf  # so that the fault has something to count
    state = copy.deepcopy(run.model.state_dict())
    gradients = [p.grad.clone() for p in parameters]
    GradientCurvature(1, 1).observe(view)
    assert all(a is b for a, b in zip(run.model.parameters(), parameters, strict=True))
    torch.testing.assert_close(run.model.state_dict(), state, rtol=0, atol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))


def test_the_vector_survives_a_checkpoint(trained_steps):
    run, one, resumed = trained_steps(), GradientCurvature(1, 1), GradientCurvature(1, 1)
    one.observe(run.next())
    resumed.load_state_dict(one.state_dict())
    view = run.next()
    kept, found = (monitor.observe(view)["gradient_curvature.preconditioned"].value for monitor in (one, resumed))
    assert torch.equal(kept, found)


def test_a_zero_gradient_has_no_curvature_and_a_nan_reads_nan(trained_steps):
    run, monitor = trained_steps(), GradientCurvature(1, 1)
    view = run.next()
    for p in run.model.parameters():
        p.grad.zero_()
    got = monitor.observe(view)
    assert all(reading.undefined for reading in got.values())
    next(run.model.parameters()).grad.fill_(math.nan)
    got = GradientCurvature(1, 1).observe(view)
    assert all(reading.value.isnan() and not reading.undefined for reading in got.values())


def test_impossible_settings_and_views_are_refused(tiny_run):
    with pytest.raises(ValueError, match=r"monitor\.power_iterations=0 "):
        GradientCurvature(100, 0)
    with pytest.raises(ValueError, match="objective at other weights"):
        GradientCurvature(1, 1).observe(tiny_run().view())


class CutsTheGraph(torch.autograd.Function):
    """A square whose backward is computed without a graph of its own, as a hand-written kernel's is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        with torch.no_grad():
            return 2 * gradient * ctx.saved_tensors[0]


def of_weights(function):
    """An objective that is the sum of a function of every weight."""
    return lambda weights: sum(function(w).sum() for w in weights.values())


@pytest.mark.parametrize(
    "objective",
    [
        of_weights(CutsTheGraph.apply),
        of_weights(lambda w: checkpoint(torch.square, w, use_reentrant=True)),
        of_weights(lambda w: F.scaled_dot_product_attention(*[w.reshape(1, 1, -1, 1).repeat(1, 1, 1, 8)] * 3)),
    ],
    ids=["cut", "checkpointed", "fused"],
)
def test_an_objective_without_a_second_derivative_leaves_the_step_out(trained_steps, objective):
    view = trained_steps().next()
    with pytest.raises(Unreadable, match=r"^the objective cannot be differentiated twice: "):
        GradientCurvature(1, 1).observe(replace(view, objective_at=objective))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        (RuntimeError, "mat1 and mat2 shapes cannot be multiplied (4x4 and 3x1)"),
    ],
)
def test_what_else_an_objective_raises_is_seen(trained_steps, error, message):
    def objective(weights):
        raise error(message)

    view = trained_steps().next()
    with pytest.raises(error, match=re.escape(message)) as raised:
        GradientCurvature(1, 1).observe(replace(view, objective_at=objective))
    assert not isinstance(raised.value, Unreadable)


def test_a_weight_that_the_objective_does_not_use_has_no_curvature():
    weights = {"a": torch.ones(2).double(), "b": torch.ones(3).double()}
    direction = [torch.ones(2).double(), torch.ones(3).double()]
    product = hessian_vector_product(lambda w: w["a"].square().sum(), weights, direction)
    assert product[0].tolist() == [2.0, 2.0] and not product[1].any()
