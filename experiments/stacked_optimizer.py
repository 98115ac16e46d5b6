"""AdamW for stacked runs: PyTorch's own fused update, with each slice's own learning rates and clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_update

from experiments.optimizer import TrainConfig, adamw, learning_rate, set_learning_rate
from faults.base import LearningRateScale
from models.stacked import StackedTransformer


class StackedAdamW:
    """One update of every slice by few calls of torch's functional AdamW, a call for each learning rate that differs.

    ``slices``: an ``AdamW`` for each slice, as its monitors and its checkpoint know it: learning rates by group, state
    by parameter. It is never stepped; its state is a view of the moments here. N optimizers stepped one by one would
    cost a GPU N times the launches of one, and a learning rate that is a tensor must have one element.

    configs: of each slice; clip and betas are those of the first for all.
    """

    def __init__(self, model: StackedTransformer, configs: Sequence[TrainConfig]) -> None:
        self._model, self._configs = model, configs
        self.slices: list[torch.optim.AdamW] = [
            adamw(one, config) for one, config in zip(model.slices, configs, strict=True)
        ]
        self._moments = {name: torch.zeros_like(model.weights) for name in ("exp_avg", "exp_avg_sq")}
        gradients = model.views(model.gradients)
        # in the order in which a single run adds up their squares
        self._gradients = [gradients[name].flatten(1) for name, _ in model.slices[0].named_parameters()]
        segments = _segments(model, self.slices[0])
        self._steps = torch.zeros(len(self.slices), len(segments), device=model.weights.device)
        self._operands = [
            [
                (
                    *(rows[index, span] for rows in (model.weights, model.gradients, *self._moments.values())),
                    steps[place],
                )
                for place, span in enumerate(segments)
            ]
            for index, steps in enumerate(self._steps)
        ]
        for index in range(len(self.slices)):
            self._show_state(index)

    def _show_state(self, index: int) -> None:
        """Let a slice's own optimizer see its part of the moments and step counts."""
        optimizer, model = self.slices[index], self._model.slices[index]
        views = {name: self._model.views(moment[index]) for name, moment in self._moments.items()}
        segment_of = {
            parameter: segment for segment, group in enumerate(optimizer.param_groups) for parameter in group["params"]
        }
        for name, parameter in model.named_parameters():
            moments = {moment: parts[name] for moment, parts in views.items()}
            optimizer.state[parameter] = {"step": self._steps[index, segment_of[parameter]], **moments}

    def load_state_dict(self, index: int, state: Mapping[str, Any]) -> None:
        """Take over a slice's state, as ``slices[index].state_dict()`` gave it."""
        optimizer = self.slices[index]
        optimizer.load_state_dict(state)
        loaded = {parameter: dict(values) for parameter, values in optimizer.state.items()}
        self._show_state(index)
        for parameter, values in loaded.items():
            for name, value in values.items():
                optimizer.state[parameter][name].copy_(value)

    def clip(self) -> Tensor:
        """The gradient norm of every slice before the clip, (N,); then each slice's gradient is clipped to its own."""
        parts = [torch.linalg.vector_norm(gradient, dim=1) for gradient in self._gradients]
        norms_N = torch.linalg.vector_norm(torch.stack(parts, dim=1), dim=1)
        clip = self._configs[0].clip
        if clip is not None:  # as torch.nn.utils.clip_grads_with_norm_ has it
            self._model.gradients.mul_((clip / (norms_N + 1e-6)).clamp(max=1.0).unsqueeze(1))
        return norms_N

    @torch.no_grad()
    def step(self, step: int, scales: Sequence[LearningRateScale]) -> None:
        """Update ``step`` (from 0) at each slice's scheduled learning rate times its own factors."""
        for optimizer, config, scale in zip(self.slices, self._configs, scales, strict=True):
            set_learning_rate(optimizer, learning_rate(config, step), scale)
        alike: dict[tuple[float, float], list[tuple[Tensor, ...]]] = {}
        for optimizer, operands in zip(self.slices, self._operands, strict=True):
            for group, segment in zip(optimizer.param_groups, operands, strict=True):
                alike.setdefault((group["lr"], group["weight_decay"]), []).append(segment)
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


def _segments(model: StackedTransformer, optimizer: torch.optim.AdamW) -> list[slice]:
    """Where each parameter group lies in a slice's row."""
    names = {parameter: name for name, parameter in model.slices[0].named_parameters()}
    segments = []
    for group in optimizer.param_groups:
        spans = sorted(model.spans[names[parameter]] for parameter in group["params"])
        size = sum(shape.numel() for _, shape in spans)
        last, shape = spans[-1]
        assert last + shape.numel() - spans[0][0] == size, f"parameter group {group['name']} is not in one piece"
        segments.append(slice(spans[0][0], spans[0][0] + size))
    return segments
