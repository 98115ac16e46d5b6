"""Curvature of the loss against the edge of stability of the step that the optimizer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from foreshock.monitors.adam import AdamState
from foreshock.monitors.base import Masked, Needs, Reading, Signal, StepView
from foreshock.monitors.trailing import on_trailing_axes
from foreshock.monitors.unreadable import Unreadable

NOT_TWICE = (
    "derivative for aten::",  # an operation without a second derivative, such as a fused attention
    "does not require grad and does not have a grad_fn",  # a backward of one's own that cuts the graph
    "does not currently support double backward",
    "marked with @once_differentiable",
    "torch.utils.checkpoint is incompatible with .grad()",
)
"""What PyTorch says where a gradient has no derivative; it has no class of error for that."""
MOST_SAID = 100
"""Characters of such an error that are passed on."""
FIRST_ITERATIONS = 4
"""Power iterations of the first reading, which has no vector to start from but the gradient."""

Objective = Callable[[Mapping[str, Tensor]], Tensor]


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.sum(a * b) for a, b in zip(one, other, strict=True)]).sum()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


@on_trailing_axes
def _hessian_product(objective_at: Objective, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """tensors: weights, then a direction; of stacked runs the objective gives one number each, of that run's alone."""
    weights, direction = tensors[: len(names)], tensors[len(names) :]
    leaves = [weight.detach().requires_grad_() for weight in weights]
    with torch.enable_grad():
        objective = objective_at(dict(zip(names, leaves, strict=True))).sum()
        gradient = torch.autograd.grad(objective, leaves, create_graph=True, materialize_grads=True)
        slope = _dot(gradient, direction)
    return torch.autograd.grad(slope, leaves, materialize_grads=True)


def hessian_vector_product(
    objective_at: Objective, weights: Mapping[str, Tensor], direction: Sequence[Tensor]
) -> list[Tensor]:
    """H d, the derivative of the gradient's slope along d (Pearlmutter 1994), at any length of d.

    weights and direction: all parameters in one order, any floating dtype. Nothing is subtracted, so that its relative
    error, in the norm, is that of a gradient: rounding times the condition |H| |d| / |H d|. A zero direction gives
    zero; NaN and Inf give NaN.
    """
    return list(_hessian_product(objective_at, tuple(weights), *weights.values(), *direction))


class GradientCurvature:
    """``gradient_curvature`` and ``.preconditioned``: curvatures over the edge of stability, 1. Bad: up.

    ``gradient_curvature``: eta g^T H g / (2 |g|^2), the curvature along the gradient against 2 / eta
    (arXiv:2506.04805); above 1 a gradient step of that size raises the loss. g is the gradient of the last update, H
    the Hessian after it, on the same batch, of the objective without rounding or faults (``models.objective``). With
    one eta a parameter group, d = eta g and the ratio is d^T H d / (2 g.d), the same thing where they are equal. With
    ``train.micro_batch`` or ``train.watched_sequences`` H is of the watched sequences alone: of a smaller batch than g,
    whose top eigenvalue is larger.

    ``.preconditioned``: the top eigenvalue of P^-1 H over (2 + 2 beta1) / ((1 - beta1) eta), 38 / eta at 0.9, with
    P = (1 - beta1^t)(sqrt(v_hat) + eps) (Cohen et al., arXiv:2207.14484). From ``power_iterations`` of power iteration
    on sqrt(eta / P) H sqrt(eta / P), from where the last reading stopped; at first ``FIRST_ITERATIONS`` of them, from
    the gradient. It approaches the eigenvalue of the largest magnitude, sign included, over the readings.

    Conditioning: a relative change r of weights and gradients, rounding among others, moves the first by the order of
    r |d| |H d| / (2 g.d), which is large against a reading near zero, and the second by r |A| |v| / |A v| of each
    iteration, A v the worst conditioned product so far. Differences of a BF16 kernel's gradients at neighbouring
    weights, which these were once made of, move by that kernel's rounding over the distance: by a tenth of a reading.

    Each Hessian product costs a gradient and its derivative, three training steps: 3 + 3 ``power_iterations`` of them
    a reading. A zero gradient has no curvature: masked. NaN gives NaN, from then on in the second.
    """

    needs = Needs(view=("optimizer", "objective_at"), stackable=True)

    def __init__(self, every_steps: int, power_iterations: int) -> None:
        if power_iterations < 1:
            raise ValueError(f"monitor.power_iterations={power_iterations} is not allowed: at least 1")
        self.power_iterations = power_iterations
        self._top: dict[str, Tensor] | None = None
        self.signals = tuple(
            Signal(f"gradient_curvature{suffix}", "1", "up", (), every_steps, family="optimization", above=1.0)
            for suffix in ("", ".preconditioned")
        )

    def observe(self, view: StepView) -> dict[str, Reading]:
        if view.objective_at is None:
            raise ValueError("this monitor asks for the objective at other weights, and the step's view has none")
        try:
            return self._read(view.objective_at, AdamState.of(view))
        except CheckpointError as error:  # its second forward is outside of what makes attention the plain formula
            raise Unreadable(
                "the model runs its forward again in the backward (activation checkpointing), and what is run again "
                "has no second derivative"
            ) from error
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            if not any(known in said for known in NOT_TWICE):
                raise
            raise Unreadable(f"the objective cannot be differentiated twice: {said[:MOST_SAID]}") from error

    def _read(self, objective_at: Objective, adam: AdamState) -> dict[str, Reading]:
        steepest = torch._foreach_mul(adam.gradient, adam.learning_rate)
        falls = _dot(adam.gradient, steepest)
        bends = _dot(steepest, hessian_vector_product(objective_at, adam.weight, steepest))
        flat = falls == 0
        edge = (2 + 2 * adam.beta1) / (1 - adam.beta1)
        return {
            "gradient_curvature": Masked(bends / (2 * falls), flat),
            "gradient_curvature.preconditioned": Masked(self._top_eigenvalue(objective_at, adam) / edge, flat),
        }

    def _top_eigenvalue(self, objective_at: Objective, adam: AdamState) -> Tensor:
        """Of sqrt(eta / P) H sqrt(eta / P), by power iteration; keeps the vector for the next reading."""
        scale = torch._foreach_reciprocal(torch._foreach_mul(adam.root, adam.beta1_debias))
        scale = torch._foreach_sqrt(torch._foreach_mul(scale, adam.learning_rate))
        vector: tuple[Tensor, ...] | list[Tensor]
        if self._top is None:
            vector, iterations = torch._foreach_mul(scale, adam.gradient), max(FIRST_ITERATIONS, self.power_iterations)
        else:
            vector, iterations = list(self._top.values()), self.power_iterations
        for _ in range(iterations):
            vector = torch._foreach_div(vector, _norm(vector))
            bent = hessian_vector_product(objective_at, adam.weight, torch._foreach_mul(scale, vector))
            product = torch._foreach_mul(scale, bent)
            eigenvalue = _dot(vector, product)
            vector = product
        self._top = dict(zip(adam.weight, vector, strict=True))
        return eigenvalue

    def state_dict(self) -> dict[str, Any]:
        return {"top": self._top}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._top = state["top"]
