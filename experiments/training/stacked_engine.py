"""The engine of several runs along a model axis.

Sums round differently in a stacked LayerNorm and, by shape, processor and device, in a stacked matrix product, so
``train.stack`` is part of a run's identity. A stack that is stopped and goes on with the same runs keeps its bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreshock.experiments.training.engine import NOTHING, Batches, read_batch
from foreshock.experiments.training.optimizer import rate_of, rates_of
from foreshock.experiments.training.stacked_optimizer import StackedAdamW
from foreshock.experiments.training.train_config import TrainConfig
from foreshock.faults.base import Sites
from foreshock.faults.log import InjectionLog
from foreshock.faults.logged_numerics import logged
from foreshock.faults.operation import Moment
from foreshock.faults.points import corrupt_tensors, gradients_of, log_numbers
from foreshock.models.anatomy import Anatomy
from foreshock.models.objective import objective_at
from foreshock.models.precision import accumulate_in_fp32
from foreshock.models.stacked import StackedNumerics, StackedTransformer
from foreshock.models.taps import Taps
from foreshock.models.transformer import Transformer
from foreshock.monitors.base import StepView


class StackedEngine:
    """Runs that ``experiments.training.stacking.why_single`` lets together, each with a seed and a config of its own.

    models: of each run, on their device; their weights become views of the stack's. All see batches of one size, and
    no loss reaches another run's weights.
    """

    def __init__(
        self, models: Sequence[Transformer], configs: Sequence[TrainConfig], corpus: Batches, seeds: Sequence[int]
    ) -> None:
        accumulate_in_fp32()
        self.model, self.tokens = StackedTransformer(models), 0
        self.anatomy = Anatomy.of(self.model)
        self.optimizer = StackedAdamW(self.model, configs)
        self._configs, self._config, self._corpus, self._seeds = configs, configs[0], corpus, list(seeds)
        self._healthy = Sites(batch_size=self._config.batch_size)
        self._device = models[0].tokens.weight.device
        self.logs = tuple(InjectionLog() for _ in models)
        held_out = torch.from_numpy(corpus.held_out_batch(self._config.held_out_sequences)).to(self._device)
        self._held_out = held_out

    def step(self, step: int, sites: Sequence[Sites], places: Collection[str] = NOTHING) -> StepView:
        tokens_NBT1 = torch.from_numpy(self._batches(step, sites))
        if self._device.type == "cuda":  # so that the copy waits for no kernel, and the host goes on meanwhile
            tokens_NBT1 = tokens_NBT1.pin_memory()
        tokens_NBT1 = tokens_NBT1.to(self._device, non_blocking=True)
        self.tokens += tokens_NBT1[0, :, 1:].numel()
        for log in self.logs:
            log.step = step
        numerics = _numerics(sites)
        with Taps(self.model, places) as taps:
            losses_N, _, _ = self.model(tokens_NBT1, logged(numerics, self.logs, self.model.config.backend))
            losses_N.sum().backward()
        self.model.take_gradients()
        for run, site in enumerate(sites):
            if site.gradients:
                gradients = gradients_of(self.model.slices[run])
                corrupt_tensors("gradients", gradients, site.gradients, self._moment(run, step), self.logs[run])
        grad_norms_N = self.optimizer.clip()
        of_runs = zip(self._configs, sites, self.logs, strict=True)
        scheduled = [rate_of(config, step, site.schedule, log) for config, site, log in of_runs]
        for optimizer, site, rate, log in zip(self.optimizer.slices, sites, scheduled, self.logs, strict=True):
            log_numbers(site, self._healthy, step, rates_of(optimizer, rate), log)
        self.optimizer.step(scheduled, [site.lr_scale for site in sites], step)
        for run, site in enumerate(sites):
            if site.weights:
                weights = dict(self.model.slices[run].named_parameters())
                corrupt_tensors("weights", weights, site.weights, self._moment(run, step), self.logs[run])
        return StepView(
            step=step + 1,
            tokens=self.tokens,
            loss=losses_N.detach(),
            grad_norm=grad_norms_N,
            anatomy=self.anatomy,
            taps=taps,
            numerics=numerics,  # type: ignore[arg-type]  # of the slices, which ``slice_view`` parts
            objective_at=partial(objective_at, self.model, tokens_NBT1, 1.0),
            batch=tokens_NBT1,
        )

    def _batches(self, step: int, sites: Sequence[Sites]) -> np.ndarray:
        """The runs' batches, (N, B, T + 1), gathered at once where all read them as a healthy run does."""
        if not any(site.sampling or site.data_step is not None for site in sites):
            return self._corpus.batches(self._seeds, step, self._config.batch_size)
        moments = [
            self._moment(run, step if site.data_step is None else site.data_step) for run, site in enumerate(sites)
        ]
        return np.stack([read_batch(self._corpus, *of_run) for of_run in zip(moments, sites, self.logs, strict=True)])

    def _moment(self, run: int, step: int) -> Moment:
        # a model that is built has a vocabulary
        return Moment(self._seeds[run], step, self.model.config.vocab_size)  # type: ignore[arg-type]

    @torch.no_grad()
    def held_out_loss(self, sites: Sequence[Sites]) -> Tensor:
        numerics = _numerics(sites)
        losses = [
            # ``loss`` hands them on to the stack's own ``forward``
            self.model.loss(chunk.expand(len(sites), -1, -1), numerics) * len(chunk)  # type: ignore[arg-type]
            for chunk in self._held_out.split(self._config.batch_size)
        ]
        return torch.stack(losses).sum(0) / len(self._held_out)

    def state_of(self, run: int) -> dict[str, Any]:
        model, optimizer = self.model.slices[run], self.optimizer.slices[run]
        injections = self.logs[run].state_dict()
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "tokens": self.tokens,
            "injections": injections,
        }

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        for run, state in enumerate(states):
            self.model.slices[run].load_state_dict(state["model"])
            self.optimizer.load_state_dict(run, state["optimizer"])
            self.logs[run].load_state_dict(state["injections"])
        self.tokens = states[0]["tokens"]


def _numerics(sites: Sequence[Sites]) -> StackedNumerics:
    return StackedNumerics(tuple(site.numerics for site in sites))
