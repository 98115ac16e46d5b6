"""AdamW's own numbers after an update, and the size of that update for each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock.models.taps import known
from foreshock.monitors.base import Masked, Needs, Reading, Signal, StepView

OUT_OF_DATE = 2.3
"""The RMS of an update above which StableAdamW holds that v is out of date."""


def _debias(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^t to FP32's last digits, which a difference of two numbers near 1 loses."""
    return -torch.expm1(steps * (math.log(beta) if beta else -math.inf))


@dataclass(frozen=True)
class AdamState:
    """What the last update was made of, by parameter name, in the model's order; frozen parameters are left out.

    gradient: as Adam took it, after the clip; root: sqrt(v / (1 - beta2^t)) + eps, what it divided by; learning_rate:
    of each tensor's group; beta1; beta1_debias: 1 - beta1^t, 0-dim.
    """

    weight: dict[str, Tensor]
    gradient: list[Tensor]
    root: list[Tensor]
    learning_rate: list[float]
    beta1: float
    beta1_debias: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, view: StepView) -> AdamState:
        """Raises ValueError where the view has no optimizer, or one that keeps no second moments."""
        if view.optimizer is None:
            raise ValueError("this monitor reads AdamW's state, and the step's view has no optimizer")
        groups = {parameter: group for group in view.optimizer.param_groups for parameter in group["params"]}
        state = view.optimizer.state  # a defaultdict: to ask it for a parameter that it does not have would change it
        held = {name: p for name, p in view.model.named_parameters() if p in groups and p in state}
        weight = {name: parameter for name, parameter in held.items() if parameter.grad is not None}
        if held and not weight:
            known(None, f"the gradient of {next(iter(held))}")
        if not all("exp_avg_sq" in state[parameter] for parameter in weight.values()) or not weight:
            raise ValueError(f"{type(view.optimizer).__name__} keeps no exp_avg_sq of its parameters")
        first = next(iter(weight.values()))
        (beta1, beta2), eps = groups[first]["betas"], groups[first]["eps"]
        steps = state[first]["step"].to(first.device)
        root = list(torch._foreach_sqrt([state[parameter]["exp_avg_sq"] for parameter in weight.values()]))
        torch._foreach_div_(root, _debias(beta2, steps).sqrt())
        torch._foreach_add_(root, eps)
        return cls(
            {name: parameter.detach() for name, parameter in weight.items()},
            [known(parameter.grad, f"the gradient of {name}") for name, parameter in weight.items()],
            root,
            [groups[parameter]["lr"] for parameter in weight.values()],
            beta1,
            _debias(beta1, steps),
        )


class AdamUpdateRMS:
    """``adam_update_rms``: sqrt(mean(g^2 / v)) over a tensor, the largest of each layer's. Bad: up.

    v: Adam's second moment, debiased, this step's gradient included; g: as Adam took it, after the clip. Near 1
    while v keeps up with the gradients; above 2.3 it is out of date, which goes before a loss spike (StableAdamW,
    Wortsman et al., arXiv:2304.13013, RMS_t; there g^2 / max(v, eps^2), here g^2 / (sqrt(v) + eps)^2 as the update
    has it). ``.embedding``: the largest of the tensors outside the layers but the last norm: tokens, positions and an
    untied head, what the source watches in its patch embedding. In [0, 1 / sqrt(1 - beta2)]; NaN gives NaN.
    """

    needs = Needs(view=("optimizer",), stackable=True)

    def __init__(self, every_steps: int) -> None:
        self.signals = (
            Signal("adam_update_rms", "1", "up", ("layer",), every_steps, family="optimization", above=OUT_OF_DATE),
            Signal("adam_update_rms.embedding", "1", "up", (), every_steps, family="optimization", above=OUT_OF_DATE),
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        adam = AdamState.of(view)
        norms = torch.stack(torch._foreach_norm(torch._foreach_div(adam.gradient, adam.root)))
        sizes = torch.tensor([weight.numel() for weight in adam.weight.values()], device=norms.device)
        rms = norms / sizes.sqrt()
        index = {name: position for position, name in enumerate(adam.weight)}

        def largest(names: Iterable[str]) -> Tensor:
            own = [index[name] for name in names if name in index]
            return rms[own].amax() if own else rms.new_zeros(())

        def frozen(names: Iterable[str]) -> bool:
            return not any(name in index for name in names)

        outside = {name for role in ("embedding", "positions", "head") for name in view.anatomy.parameters(role)}
        layers = torch.stack([largest(block.parameters) for block in view.anatomy.blocks])
        still = [frozen(block.parameters) for block in view.anatomy.blocks]
        readings: dict[str, Reading] = {"adam_update_rms": Masked(layers, torch.tensor(still, device=rms.device))}
        return readings if frozen(outside) else readings | {"adam_update_rms.embedding": largest(outside)}
