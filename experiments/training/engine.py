"""An engine takes one training step: the only place where a fault enters and where a view of the step is made.

    weights                                                   # INJECT: resume (``experiments.training.loop``), start
    batch = corpus.batch(seed, step, sites.batch_size)        # INJECT: batch_size, data_step, sampling, batch, system
    loss scale                                                # INJECT: scaling, of train.precision=fp16
    for micro_batch in batch:
        loss, auxiliary, routings = model(micro_batch, sites.numerics, ...)  # INJECT: numerics, in both passes
        scaled(loss + auxiliary).backward()                   # INJECT: modules, formats, both passes; TAP: activations
        gradients                                             # INJECT: accumulation
    gradients, unscaled                                       # INJECT: gradients
    grad_norm = clip                                          # INJECT: clip
    update(learning_rate(step) * sites.lr_scale)              # INJECT: schedule, lr_scale, optimizer, of an AdamW step
    weights                                                   # INJECT: weights
    model.update_balance(routings, sites.balance_scale)       # INJECT: balance_scale, of routers with a balancing bias
    view of the step                                          # OBSERVE: read-only

A step whose gradients overflow in FP16 goes from there to ``weights``: it is no update (``loss_scaler``).

``SingleEngine`` trains one run, ``StackedEngine`` several runs along a model axis. Benches and tests step an engine as
the training loop does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from foreshock.faults.base import Sites
from foreshock.faults.log import InjectionLog
from foreshock.faults.operation import Moment, Places
from foreshock.faults.points import corrupt_starts
from foreshock.models.anatomy import Anatomy
from foreshock.monitors.base import StepView

NOTHING: frozenset[str] = frozenset()


class Batches(Protocol):
    """Token batches of a corpus, each a function of its arguments alone (``experiments.training.data.Corpus``)."""

    def batch(self, seed: int, step: int, batch_size: int) -> np.ndarray: ...

    def batches(self, seeds: Sequence[int], step: int, batch_size: int) -> np.ndarray: ...

    def held_out_batch(self, sequences: int) -> np.ndarray: ...

    @property
    def places(self) -> Places: ...

    def starts(self, seed: int, step: int, batch_size: int) -> np.ndarray: ...

    def sequences(self, starts: np.ndarray) -> np.ndarray: ...


def read_batch(corpus: Batches, moment: Moment, site: Sites, log: InjectionLog | None = None) -> np.ndarray:
    """The token batch of a step with these sites, (B, T + 1). moment: of the step whose batch is read."""
    for operation in site.system:
        if not operation.idle:
            operation.wait(log)
    if not site.sampling:
        return corpus.batch(moment.seed, moment.step, site.batch_size)
    starts_B = corpus.starts(moment.seed, moment.step, site.batch_size)
    return corpus.sequences(corrupt_starts(starts_B, site.sampling, corpus.places, moment, log))


class Engine(Protocol):
    """The state of N >= 1 runs between two steps, and the step.

    model, optimizer: of one run, or stacked ones with ``slices``; anatomy: of that model; tokens: training tokens that
    each run has seen; logs: of each run, what its fault has changed.
    Tensors of a view, and losses, lead with an axis of runs in a stack, and have none in a single run.
    """

    optimizer: Any
    tokens: int

    @property
    def model(self) -> nn.Module: ...

    @property
    def anatomy(self) -> Anatomy: ...

    @property
    def logs(self) -> Sequence[InjectionLog]: ...

    def step(self, step: int, sites: Sequence[Sites], places: Collection[str] = NOTHING) -> StepView:
        """Take update ``step`` (from 0) with each run's sites; ``places`` are tapped (``models.taps.PLACES``)."""

    def held_out_loss(self, sites: Sequence[Sites]) -> Tensor:
        """Mean NLL on the held-out batch, in nats, through each run's faulty forward, if any."""

    def state_of(self, run: int) -> dict[str, Any]:
        """What a checkpoint of one run needs: ``model``, ``optimizer``, ``tokens``, ``injections``, and, of a single
        run, ``past``, ``amaxes`` and ``scaler``."""

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from these states, one a run."""
