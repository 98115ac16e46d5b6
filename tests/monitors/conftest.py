"""A tiny model whose weights are set by hand, and what a monitor sees of it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from foreshock.models.moe import Routing
from foreshock.models.numerics import HEALTHY, AttentionNumerics
from foreshock.models.objective import objective_at
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors.base import Monitor, StepView, tapped
from foreshock.monitors.watch import Watch
from tests.views import view_of_gradients

torch.set_num_threads(1)

TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 8, "context_length": 4, "vocab_size": 7}


class TinyRun:
    """Steps a model through ``change`` and shows each step to a monitor as the loop does."""

    def __init__(self, *monitors: Monitor, **changes) -> None:
        self.model = Transformer(TransformerConfig(**TINY | changes)).initialise(torch.Generator().manual_seed(0))
        self._watch = Watch(self.model, {str(index): monitor for index, monitor in enumerate(monitors)})
        self.history = self._watch.history
        self.past = []
        self._generator = torch.Generator().manual_seed(1)
        self._record()

    def _record(self) -> None:
        self.past.append({name: p.detach().double().clone() for name, p in self.model.named_parameters()})
        self._watch.record(self.step)

    @property
    def step(self) -> int:
        return len(self.past) - 1

    @torch.no_grad()
    def advance(self, change: Callable[[str, Tensor], Tensor | None] | None = None) -> StepView:
        """Apply ``change(name, weight)``, or a random update; None leaves a weight as it is."""
        for name, parameter in self.model.named_parameters():
            random = 1e-2 * torch.randn(parameter.shape, generator=self._generator)
            new = parameter + random if change is None else change(name, parameter)
            if new is not None:
                parameter.copy_(new)
        self._record()
        return self.view()

    def view(self, loss: float = 1.0, grad_norm: float = 2.0, routings: tuple[Routing, ...] = ()) -> StepView:
        return StepView(
            step=self.step,
            tokens=64 * self.step,
            loss=torch.tensor(loss),
            grad_norm=torch.tensor(grad_norm),
            model=self.model,
            history=self.history,
            routings=routings,
        )

    def delta(self, name: str, window: int) -> Tensor:
        return self.past[self.step][name] - self.past[self.step - window][name]


@pytest.fixture
def tiny_run() -> type[TinyRun]:
    return TinyRun


class TrainedSteps:
    """Trains a model on random tokens, clipped, and shows each step as the loop does.

    ``model`` and ``optimizer`` may be changed between steps; dtype: of the weights; precision: of the products.
    """

    def __init__(
        self,
        *monitors: Monitor,
        dtype: torch.dtype = torch.float32,
        numerics: AttentionNumerics = HEALTHY,
        precision: str = "fp32",
        **changes,
    ) -> None:
        config = TransformerConfig(**TINY | {"context_length": 16, "d_ff": 32} | changes)
        self.model = Transformer(config, precision).initialise(torch.Generator().manual_seed(0)).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, betas=(0.9, 0.95))
        self.places, self.numerics, self.step = tapped(monitors), numerics, 0

    def next(self) -> StepView:
        T, generator = self.model.config.context_length, torch.Generator().manual_seed(self.step)
        tokens = torch.randint(self.model.config.vocab_size, (3, T + 1), generator=generator)
        view = view_of_gradients(self.model, tokens, self.places, numerics=self.numerics)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.step += 1
        return replace(
            view,
            step=self.step,
            tokens=self.step * view.tokens,
            grad_norm=norm,
            optimizer=self.optimizer,
            numerics=self.numerics,
            objective_at=partial(objective_at, self.model, tokens, 1.0),
        )


@pytest.fixture
def trained_steps() -> type[TrainedSteps]:
    return TrainedSteps
