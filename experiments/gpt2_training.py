"""A model in training on random tokens, stepped by the training loop's own parts, without Hydra, data and files."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from experiments.gradients import Backward, backward, micro_batches
from experiments.optimizer import TrainConfig, adamw, update
from faults.base import Sites
from models.compiled import CompiledObjective
from models.corruption import Corrupted
from models.numerics import AttentionNumerics
from models.objective import objective_at
from models.precision import accumulate_in_fp32
from models.transformer import Transformer, TransformerConfig
from monitors.base import StepView, WeightHistory


class Training:
    """What ``experiments.loop`` holds between two steps, and its step.

    model: its device's backend filled in; numerics: what every step's attention is made to do; compiler: the backend of
    ``torch.compile`` where ``train.compile`` asks for it. Tokens come from the host at every step, as in the loop.
    """

    def __init__(
        self, model: TransformerConfig, config: TrainConfig, numerics: AttentionNumerics, compiler: str
    ) -> None:
        accumulate_in_fp32()
        device = torch.device(config.device)
        self.config, self.device = config, device
        self.sites = Sites(batch_size=config.batch_size, numerics=numerics)
        self.model = Transformer(model, config.precision).initialise(torch.Generator().manual_seed(0)).to(device)
        self.optimizer, self.parameters = adamw(self.model, config), list(self.model.parameters())
        self.unwatched = CompiledObjective(self.model, compiler) if config.compile else self.model.objective
        shape = config.batch_size, model.context_length + 1
        self._tokens = np.random.default_rng(0).integers(model.vocab_size, size=shape, dtype=np.int64)

    @property
    def tokens_a_step(self) -> int:
        return self._tokens[:, 1:].size

    def batch(self) -> Tensor:
        return torch.from_numpy(self._tokens).to(self.device)

    def step(self, index: int, places: Collection[str] = ()) -> tuple[Backward, Tensor]:
        """Update ``index`` (from 0), ``places`` tapped; what the backward left, and the gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        with Corrupted(self.model, self.sites.modules):
            done = backward(self.model, self._parts(), self.sites, places, self.unwatched)
        return done, self.update(index)

    def update(self, index: int) -> Tensor:
        return update(self.parameters, self.optimizer, self.config, index, self.sites.lr_scale)

    def backward_watched(self, places: Collection[str] = ()) -> Backward:
        """Forward and backward of the sequences that may be tapped, which are never compiled."""
        return backward(self.model, self._parts()[-1:], self.sites, places, self.unwatched)

    def eager_micro_batch(self) -> Backward:
        """The same of a whole micro-batch."""
        return backward(self.model, self._parts()[:1], self.sites, (), self.unwatched)

    def unwatched_micro_batch(self) -> None:
        """Forward and backward of a whole micro-batch as those are run that nobody looks at."""
        loss, auxiliary, _ = self.unwatched(self._parts()[0], self.sites.numerics, self.sites.balance_scale)
        (loss + auxiliary).backward()

    def _parts(self) -> tuple[Tensor, ...]:
        return micro_batches(self.batch(), self.config.micro_batch, self.config.watched_sequences)

    def view(self, now: int, history: WeightHistory, places: Collection[str]) -> StepView:
        """What monitors see after a step that makes ``now`` updates."""
        done, grad_norm = self.step(now - 1, places)
        history.record(now, self.model)
        sites = self.sites
        objective = partial(objective_at, self.model, done.watched, sites.balance_scale)
        return StepView(
            now,
            now * self.tokens_a_step,
            done.loss,
            grad_norm,
            self.model,
            history,
            done.routings,
            done.taps,
            self.optimizer,
            sites.numerics,
            objective,
        )


def flops_a_token(model: TransformerConfig, parameters: int) -> float:
    """Model FLOPs of forward and backward, 6 P + 6 L E T (arXiv:2204.02311 appendix B, its attention halved: causal).

    P: parameters of matrix products, that is without learned positions; a tied embedding counts as the head it is.
    """
    positions = model.context_length * model.d_model if model.positions == "learned" else 0
    attention = 6 * model.n_layers * model.d_model * model.context_length
    return 6 * (parameters - positions) + attention


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a call on a device that is idle before it, until it is idle again."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(calls: Mapping[str, Callable[[], object]], device: torch.device, turns: int) -> dict[str, float]:
    """The median seconds of each call, measured in turns; they are warm already."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            taken[name].append(seconds(call, device))
    return {name: median(values) for name, values in taken.items()}
