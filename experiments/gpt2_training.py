"""A model in training on random tokens, stepped by the training loop's engine, without Hydra, data and files."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from foreshock.experiments.training.gradients import Backward
from foreshock.experiments.training.single_engine import SingleEngine
from foreshock.experiments.training.train_config import TrainConfig
from foreshock.faults.base import Sites
from foreshock.faults.operation import Places
from foreshock.models.numerics import AttentionNumerics
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors.base import StepView

Name = TypeVar("Name")


class RandomTokens:
    """The same sequences at every step, handed over from the host as a corpus does. sequences: how many there are."""

    def __init__(self, sequences: int, context_length: int, vocab_size: int) -> None:
        shape = sequences, context_length + 1
        self._tokens = np.random.default_rng(0).integers(vocab_size, size=shape, dtype=np.int64)

    def batch(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        return self._tokens[:batch_size]

    def batches(self, seeds: Sequence[int], step: int, batch_size: int) -> np.ndarray:
        return np.stack([self.batch(seed, step, batch_size) for seed in seeds])

    def held_out_batch(self, sequences: int) -> np.ndarray:
        return self._tokens[:sequences]

    @property
    def places(self) -> Places:
        return Places(len(self._tokens), self._tokens.shape[1] - 1)

    def starts(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        return np.arange(batch_size)

    def sequences(self, starts: np.ndarray) -> np.ndarray:
        return self._tokens[starts]


class Training:
    """An engine of which every step has the same sites, and the parts of its step by themselves.

    model: its device's backend filled in; numerics: what every step's attention is made to do; compiler: the backend of
    ``torch.compile`` where ``train.compile`` asks for it.
    """

    def __init__(
        self, model: TransformerConfig, config: TrainConfig, numerics: AttentionNumerics, compiler: str
    ) -> None:
        self.config, self.device = config, torch.device(config.device)
        self.sites = Sites(batch_size=config.batch_size, numerics=numerics)
        initial = Transformer(model, config.precision).initialise(torch.Generator().manual_seed(0))
        corpus = RandomTokens(config.batch_size, model.context_length, initial.tokens.num_embeddings)
        self.engine = SingleEngine(initial.to(self.device), config, corpus, 0, compiler)
        self.model = self.engine.model
        self.tokens_a_step = config.batch_size * model.context_length

    def step(self, index: int, places: Collection[str] = ()) -> StepView:
        """Update ``index`` (from 0), ``places`` tapped."""
        return self.engine.step(index, [self.sites], places)

    def batch(self) -> tuple[Tensor, ...]:
        """The micro-batches of a step, on the device."""
        return self.engine.micro_batches(0, self.sites)

    def update(self, index: int) -> Tensor:
        return self.engine.update(index, self.sites)

    def backward_watched(self, places: Collection[str] = ()) -> Backward:
        """Forward and backward of the sequences that may be tapped, which are never compiled."""
        return self.engine.backward(self.batch()[-1:], self.sites, places)

    def eager_micro_batch(self) -> Backward:
        """The same of a whole micro-batch."""
        return self.engine.backward(self.batch()[:1], self.sites)

    def unwatched_micro_batch(self) -> None:
        """Forward and backward of a whole micro-batch as those are run that nobody looks at."""
        loss, auxiliary, _ = self.engine.unwatched(self.batch()[0], self.sites.numerics, self.sites.balance_scale)
        (loss + auxiliary).backward()


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


def in_turns(calls: Mapping[Name, Callable[[], object]], device: torch.device, turns: int) -> dict[Name, float]:
    """The median seconds of each call, measured in turns; they are warm already."""
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            taken[name].append(seconds(call, device))
    return {name: median(values) for name, values in taken.items()}
