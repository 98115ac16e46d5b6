"""Curvatures against exact Hessians, and reading them leaves the model as it is."""

import copy
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.numerics import AttentionNumerics, SiteFault
from monitors.adam import AdamState
from monitors.curvature import RELATIVE_STEP, GradientCurvature, hessian_vector_product

FP64 = {"dtype": torch.float64, "backend": "sdpa", "d_model": 4, "d_ff": 4, "n_heads": 2, "n_layers": 1}


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
    torch.testing.assert_close(flat(got), root.mT @ root @ flat(direction), rtol=1e-10, atol=1e-10)
    assert flat(hessian_vector_product(objective, weights, [torch.zeros(2), torch.zeros(3)])).isnan().all()


@pytest.mark.parametrize(("relative_step", "tolerance"), [(RELATIVE_STEP, 2e-3), (RELATIVE_STEP / 20, 1e-5)])
def test_both_readings_are_those_of_the_exact_hessian(trained_steps, monkeypatch, relative_step, tolerance):
    """The error falls with the square of the step."""
    monkeypatch.setattr("monitors.curvature.RELATIVE_STEP", relative_step)
    run, monitor = trained_steps(**FP64), GradientCurvature(1, power_iterations=60)
    for _ in range(3):
        view = run.next()
    got = monitor.observe(view)
    hessian, adam = exact_hessian(view), AdamState.of(view)
    g = flat(adam.gradient)
    curvature = g @ hessian @ g / (g @ g)
    assert got["gradient_curvature"].value.item() == pytest.approx(float(curvature) * 1e-2 / 2, rel=tolerance)
    scale = ((1 - 0.9**3) * flat(adam.root)).rsqrt()
    eigenvalues = torch.linalg.eigvalsh(scale[:, None] * hessian * scale)
    top = eigenvalues[eigenvalues.abs().argmax()]
    assert got["gradient_curvature.preconditioned"].value.item() == pytest.approx(float(top) * 1e-2 / 38, rel=tolerance)


def test_one_iteration_a_reading_gets_there_by_starting_where_the_last_one_stopped(trained_steps):
    run = trained_steps(**FP64)
    view = run.next()
    at_once = GradientCurvature(1, 60).observe(view)["gradient_curvature.preconditioned"].value
    patient = GradientCurvature(1, 1)
    readings = [patient.observe(view)["gradient_curvature.preconditioned"].value for _ in range(60)]
    assert abs(readings[0] / at_once - 1) > 1e-3
    assert readings[-1].item() == pytest.approx(at_once.item(), rel=1e-4)


def test_a_group_with_its_own_rate_weighs_by_it(trained_steps):
    """With d = eta g, d^T H d / (2 g.d); a frozen group has no part in either reading."""
    run = trained_steps(**FP64)
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


def test_the_bf16_kernel_reads_what_fp32_attention_reads(trained_steps):
    readings = {}
    for backend in ("reference", "sdpa"):
        run = trained_steps(backend=backend, init_std=0.2)
        for block in run.model.blocks:
            block.attention.dot_product.backend = "sdpa"  # train both alike
        view = run.next()
        for block in run.model.blocks:
            block.attention.dot_product.backend = backend
        readings[backend] = GradientCurvature(1, 1).observe(view)["gradient_curvature"].value.item()
    assert readings["reference"] == pytest.approx(readings["sdpa"], rel=0.05)
    assert readings["reference"] != readings["sdpa"]


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
