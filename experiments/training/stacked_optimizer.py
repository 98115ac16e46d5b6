"""AdamW for stacked runs: PyTorch's own fused update, with each slice's own learning rates and clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_update

from foreshock.experiments.training.optimizer import adamw, set_learning_rate
from foreshock.experiments.training.train_config import TrainConfig
from foreshock.faults.base import LearningRateScale
from foreshock.models.stacked import StackedTransformer

Rates = tuple[float, float, LearningRateScale]
"""A slice's scheduled learning rate, its weight decay, and its factors on the rate."""


class StackedAdamW:
    """One update of every slice by few calls of torch's functional AdamW, a call for each learning rate that differs.

    Neighbours of one learning rate are updated in one piece, so that a call's cost does not grow with their number.

    ``slices``: an ``AdamW`` for each slice, as its monitors and its checkpoint know it: learning rates by group, state
    by parameter. It is never stepped; its state is a view of the moments here. N optimizers stepped one by one would
    cost a GPU N times the launches of one, and a learning rate that is a tensor must have one element.

    moments: by name and segment of the model, (N, P); steps: updates counted, (N, segments).
    configs: of each slice; clip and betas are those of the first for all.
    """

    def __init__(self, model: StackedTransformer, configs: Sequence[TrainConfig]) -> None:
        self._model, self._configs = model, configs
        self.slices: list[torch.optim.AdamW] = [
            adamw(one, config) for one, config in zip(model.slices, configs, strict=True)
        ]
        self.moments = {name: [torch.zeros_like(w) for w in model.weights] for name in ("exp_avg", "exp_avg_sq")}
        gradients = model.views(model.gradients)
        # in the order in which a single run adds up their squares
        self._gradients = [gradients[name].flatten(1) for name, _ in model.slices[0].named_parameters()]
        self.steps = torch.zeros(len(self.slices), len(model.segments), device=model.weights[0].device)
        self._rates: list[Rates | None] = [None] * len(self.slices)
        self._learning_rates: Tensor | None = None
        self._operands: dict[tuple[int, int], list[tuple[Tensor, ...]]] = {}
        for index in range(len(self.slices)):
            self._show_state(index)

    def _show_state(self, index: int) -> None:
        """Let a slice's own optimizer see its part of the moments and step counts."""
        model = self._model.slices[index]
        moments = {
            name: self._model.views([moment[index] for moment in of_segments])
            for name, of_segments in self.moments.items()
        }
        for names, step in zip(self._model.segments, self.steps[index], strict=True):
            for name in names:
                own = {moment: parts[name] for moment, parts in moments.items()}
                self.slices[index].state[model.get_parameter(name)] = {"step": step, **own}

    def load_state_dict(self, index: int, state: Mapping[str, Any]) -> None:
        """Take over a slice's state, as ``slices[index].state_dict()`` gave it."""
        optimizer = self.slices[index]
        optimizer.load_state_dict(dict(state))
        loaded = {parameter: dict(values) for parameter, values in optimizer.state.items()}
        self._show_state(index)
        self._rates[index] = None
        for parameter, values in loaded.items():
            for name, value in values.items():
                optimizer.state[parameter][name].copy_(value)

    @property
    def learning_rates(self) -> Tensor:
        """Of the last update, (N, segments)."""
        if self._learning_rates is None:
            rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.slices]
            self._learning_rates = torch.tensor(rates, device=self.steps.device)
        return self._learning_rates

    def clip(self) -> Tensor:
        """The gradient norm of every slice before the clip, (N,); then each slice's gradient is clipped to its own."""
        parts = [torch.linalg.vector_norm(gradient, dim=1) for gradient in self._gradients]
        norms_N: Tensor = torch.linalg.vector_norm(torch.stack(parts, dim=1), dim=1)
        clip = self._configs[0].clip
        if clip is not None:  # as torch.nn.utils.clip_grads_with_norm_ has it
            factor_N1 = (clip / (norms_N + 1e-6)).clamp(max=1.0).unsqueeze(1)
            for gradients in self._model.gradients:
                gradients.mul_(factor_N1)
        return norms_N

    @torch.no_grad()
    def step(self, scheduled: Sequence[float], scales: Sequence[LearningRateScale], step: int) -> None:
        """Update ``step`` (from 0) at each slice's scheduled learning rate times its own factors."""
        rates = [
            (rate, config.weight_decay, scale)
            for rate, config, scale in zip(scheduled, self._configs, scales, strict=True)
        ]
        for index, (optimizer, own) in enumerate(zip(self.slices, rates, strict=True)):
            if own != self._rates[index]:
                set_learning_rate(optimizer, own[0], own[2])
        if rates != self._rates:
            self._learning_rates = None
        self._rates = list(rates)
        alike: dict[tuple[float, float], list[tuple[Tensor, ...]]] = {}
        first = 0
        for _, neighbours in groupby(rates):
            last = first + len(list(neighbours))
            for group, operands in zip(self.slices[first].param_groups, self._of(first, last), strict=True):
                alike.setdefault((group["lr"], group["weight_decay"]), []).append(operands)
            first = last
        group = self.slices[0].param_groups[0]
        beta1, beta2 = group["betas"]
        for (rate, weight_decay), segments in alike.items():
            weights, gradients, exp_avgs, exp_avg_sqs, steps = map(list, zip(*segments, strict=True))
            adamw_update(
                weights,
                gradients,
                exp_avgs,
                exp_avg_sqs,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=rate,
                weight_decay=weight_decay,
                eps=group["eps"],
                maximize=False,
            )
        self.steps.fill_(step + 1)

    def _of(self, first: int, last: int) -> list[tuple[Tensor, ...]]:
        """What the update of neighbouring slices takes, by segment; the step count is that of the first of them."""
        if (first, last) not in self._operands:
            numbers = zip(self._model.weights, self._model.gradients, *self.moments.values(), strict=True)
            self._operands[first, last] = [
                (*(rows[first:last] for rows in of_segment), self.steps[first, place])
                for place, of_segment in enumerate(numbers)
            ]
        return self._operands[first, last]
