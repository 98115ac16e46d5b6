"""The engine of one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.experiments.training.clipping import clip_gradients, clip_wrongly
from foreshock.experiments.training.engine import NOTHING, Batches, read_batch
from foreshock.experiments.training.gradients import Backward, backward, micro_batches
from foreshock.experiments.training.loss_scaler import LossScaler
from foreshock.experiments.training.optimizer import adamw, rate_of, rates_of, set_learning_rate
from foreshock.experiments.training.train_config import TrainConfig
from foreshock.faults.amax_history import AmaxHistory
from foreshock.faults.base import Sites
from foreshock.faults.log import InjectionLog
from foreshock.faults.logged_numerics import logged
from foreshock.faults.operation import Moment
from foreshock.faults.optimizer_update import Update, corrupted_optimizer
from foreshock.faults.past import Past
from foreshock.faults.points import corrupt_batch, corrupt_tensors, gradients_of, log_numbers
from foreshock.faults.product_format import Formatted
from foreshock.models.anatomy import Anatomy
from foreshock.models.batch import IGNORED, inputs_and_targets
from foreshock.models.compiled import CompiledObjective
from foreshock.models.corruption import Corrupted
from foreshock.models.dropout import Draw, dropping
from foreshock.models.moe import Routing
from foreshock.models.objective import objective_at
from foreshock.models.precision import accumulate_in_fp32
from foreshock.models.transformer import Transformer
from foreshock.monitors.base import StepView


class SingleEngine:
    """One run: its model, on its device, and its AdamW.

    compiler: the backend of ``torch.compile`` where ``train.compile`` asks for it; past: what the fault reads of
    earlier steps (``faults.lookback``), None where it reads nothing; amaxes: the state of FP8 scales.
    ``micro_batches``, ``backward`` and ``update`` are the parts of ``step``, for benches that time them; without a log,
    they do not measure what a fault changes.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        corpus: Batches,
        seed: int,
        compiler: str = "inductor",
        past: Past | None = None,
    ) -> None:
        accumulate_in_fp32()
        self.model, self.anatomy, self.config, self.tokens = model, Anatomy.of(model), config, 0
        self.logs, self.past, self.amaxes = (InjectionLog(),), past or Past(), AmaxHistory()
        self.optimizer, self.parameters = adamw(model, config), list(model.parameters())
        self.scaler = LossScaler(model.tokens.weight.device, config.precision == "fp16")
        self._read_s: float | None = None
        self.unwatched = CompiledObjective(model, compiler) if config.compile else model
        self._healthy = Sites(batch_size=config.batch_size)
        self._corpus, self._seed, self._device = corpus, seed, model.tokens.weight.device
        self._held_out = torch.from_numpy(corpus.held_out_batch(config.held_out_sequences)).to(self._device)

    def step(self, step: int, sites: Sequence[Sites], places: Collection[str] = NOTHING) -> StepView:
        (site,), (log,) = sites, self.logs
        log.step = step
        if site.start:
            corrupt_tensors("start", self._weights(), site.start, self._moment(step), log)
        if self.past:
            self.past.keep("start", step, self._weights())
        parts = self.micro_batches(step, site, log)
        self.tokens += sum(_trained_tokens(part, site) for part in parts)
        self.scaler.corrupt(site.scaling, log)
        scale, skipped = self.scaler.scale, self.scaler.skipped
        done = self.backward(parts, site, places, log, step)
        grad_norm = self.update(step, site, done.routings, log)
        return StepView(
            step=step + 1,
            tokens=self.tokens,
            loss=done.loss,
            grad_norm=grad_norm,
            anatomy=self.anatomy,
            routings=done.routings,
            taps=done.taps,
            numerics=site.numerics,
            objective_at=partial(self._objective_at, step, len(parts) - 1, done.watched, site.balance_scale),
            batch=done.watched,
            loss_scale=None if scale == 1 else scale,
            scaling=self.scaler.scaling,
            skipped=self.scaler.skipped > skipped and bool(done.loss.isfinite()),
            read_s=self._read_s,
        )

    def _moment(self, step: int) -> Moment:
        # a built model has a vocabulary
        return Moment(self._seed, step, self.model.config.vocab_size, self.past)  # type: ignore[arg-type]

    def _weights(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def micro_batches(self, step: int, site: Sites, log: InjectionLog | None = None) -> tuple[Tensor, ...]:
        """The batch of a step, on the device, in the pieces that go through the model one after the other."""
        moment = self._moment(step if site.data_step is None else site.data_step)
        begun = time.perf_counter()
        tokens = read_batch(self._corpus, moment, site, log)
        self._read_s = time.perf_counter() - begun
        batch = corrupt_batch(torch.from_numpy(tokens).to(self._device), site.batch, moment, log)
        return micro_batches(batch, self.config.micro_batch, self.config.watched_sequences)

    def backward(
        self,
        parts: Sequence[Tensor],
        site: Sites,
        places: Collection[str] = NOTHING,
        log: InjectionLog | None = None,
        step: int = 0,
    ) -> Backward:
        """The gradients of a batch, and nothing left of those before. step: for an operation on their sum."""
        self.optimizer.zero_grad(set_to_none=True)
        if log is not None:
            # the model reads no more of them than ``layer``, which they all have
            site = replace(site, numerics=logged(site.numerics, (log,), self.model.config.backend))  # type: ignore[arg-type]
        with self._corrupted(site, log):
            after_part, in_part = self._after_part(step, site, log), partial(self._dropping, step)
            return backward(self.model, parts, site, places, self.unwatched, after_part, in_part, self.scaler.scaled)

    def _dropping(self, step: int, part: int) -> AbstractContextManager[None]:
        """The context in which a micro-batch draws its own masks of dropout."""
        if not self.model.config.dropout:
            return nullcontext()
        return dropping(self.model, Draw(self._seed, step, part))

    def _objective_at(
        self, step: int, part: int, tokens_BT1: Tensor, balance_scale: float, weights: Mapping[str, Tensor]
    ) -> Tensor:
        """``objective_at`` with the masks that the micro-batch was trained with."""
        with self._dropping(step, part):
            return objective_at(self.model, tokens_BT1, balance_scale, weights)

    @contextmanager
    def _corrupted(self, site: Sites, log: InjectionLog | None = None) -> Iterator[None]:
        """The context of the step's changes and formats of modules, each change with what it reads of the past."""
        changes = [change.remembering(self.past) for change in site.modules]
        with Corrupted(self.model, changes, log), Formatted(self.model, site.formats, self.amaxes, log):
            yield

    def _after_part(self, step: int, site: Sites, log: InjectionLog | None) -> Callable[[], None] | None:
        """What is done to the sum of gradients after each micro-batch, None for nothing."""
        if not site.accumulation:
            return None
        return lambda: corrupt_tensors(
            "accumulation", gradients_of(self.model), site.accumulation, self._moment(step), log
        )

    def update(
        self, step: int, site: Sites, routings: Sequence[Routing] = (), log: InjectionLog | None = None
    ) -> Tensor:
        """Clip the gradients and take update ``step``; the global gradient norm before the clip, 0-dim.

        Of gradients that overflow nothing is taken: weights, moments, counters and balancing biases stay. An operation
        on the weights is done then, too.
        """
        if self.scaler.unscale(self.optimizer):
            grad_norm = self._skip(step)
        else:
            grad_norm = self._optimise(step, site, log)
            self.model.update_balance(routings, site.balance_scale)
        self.scaler.update()
        if site.weights or self.past:
            weights = self._weights()
            corrupt_tensors("weights", weights, site.weights, self._moment(step), log)
            self.past.keep("weights", step, weights)
        return grad_norm

    def _skip(self, step: int) -> Tensor:
        """Leave an update out whose gradients overflow; a later step that reads them finds zeros."""
        gradients = gradients_of(self.model)
        if self.past:
            self.past.keep("gradients", step, {name: torch.zeros_like(x) for name, x in gradients.items()})
        return clip_gradients(self.parameters, None)

    def _optimise(self, step: int, site: Sites, log: InjectionLog | None) -> Tensor:
        """From the gradients to the optimizer's update; the norm before the clip, 0-dim."""
        if site.gradients or self.past:
            gradients = gradients_of(self.model)
            self.past.keep("gradients", step, gradients)
            corrupt_tensors("gradients", gradients, site.gradients, self._moment(step), log)
        grad_norm = self._clip(site, log)
        rate = rate_of(self.config, step, site.schedule, log)
        if log is not None:
            log_numbers(site, self._healthy, step, rates_of(self.optimizer, rate), log)
        set_learning_rate(self.optimizer, rate, site.lr_scale)
        with self._around_update(step, site, log):
            self.optimizer.step()
        return grad_norm

    def _clip(self, site: Sites, log: InjectionLog | None) -> Tensor:
        """Clip the gradients; the global norm before, 0-dim."""
        for operation in site.clip:  # one at most, as any two of them meet
            if not operation.idle and self.config.clip is not None:
                return clip_wrongly(self._weights(), self.config.clip, operation, log)
        return clip_gradients(self.parameters, self.config.clip)

    def _around_update(self, step: int, site: Sites, log: InjectionLog | None) -> AbstractContextManager[None]:
        if not site.optimizer:
            return nullcontext()
        update = Update(self.optimizer, self._weights(), self._moment(step), log)
        return corrupted_optimizer(update, site.optimizer)

    @torch.no_grad()
    def held_out_loss(self, sites: Sequence[Sites]) -> Tensor:
        (site,) = sites
        chunks = self._held_out.split(self.config.micro_batch or self.config.batch_size)
        with self._corrupted(site):
            losses = [self.model.loss(chunk, site.numerics) * len(chunk) for chunk in chunks]
        return torch.stack(losses).sum() / len(self._held_out)

    def state_of(self, run: int) -> dict[str, Any]:
        injections, optimizer = self.logs[run].state_dict(), self.optimizer.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "tokens": self.tokens,
            "injections": injections,
            "past": self.past.state_dict(),
            "amaxes": self.amaxes.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        (state,) = states
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tokens = state["tokens"]
        self.logs[0].load_state_dict(state["injections"])
        # a stack's checkpoint has none of them: its faults read nothing of them, and it scales no loss
        self.past.load_state_dict(state.get("past", {}))
        self.amaxes.load_state_dict(state.get("amaxes", {}))
        self.scaler.load_state_dict(state.get("scaler", {}))


def _trained_tokens(part: Tensor, site: Sites) -> int:
    """The targets of a micro-batch that the loss counts; only an operation on the batch leaves any out."""
    targets = inputs_and_targets(part)[1]
    return int((targets != IGNORED).sum()) if site.batch else targets.numel()
