"""A tiny model whose weights are set by hand, and what a monitor sees of it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from models.moe import Routing
from models.numerics import HEALTHY, AttentionNumerics
from models.objective import objective_at
from models.taps import Taps
from models.transformer import Transformer, TransformerConfig
from monitors.base import Monitor, StepView, WeightHistory, tapped

torch.set_num_threads(1)

TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 8, "context_length": 4, "vocab_size": 7}


class TinyRun:
    """Steps a model through ``change`` and shows each step to a monitor as the loop does."""

    def __init__(self, *monitors: Monitor, **changes) -> None:
        self.model = Transformer(TransformerConfig(**TINY | changes)).initialise(torch.Generator().manual_seed(0))
        self.history = WeightHistory(lb for monitor in monitors for lb in monitor.needs.history)
        self.past = []
        self._generator = torch.Generator().manual_seed(1)
        self._record()

    def _record(self) -> None:
        self.past.append({name: p.detach().double().clone() for name, p in self.model.named_parameters()})
        self.history.record(self.step, self.model)

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
        tokens = 64 * self.step
        return StepView(
            self.step, tokens, torch.tensor(loss), torch.tensor(grad_norm), self.model, self.history, routings
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
        self.optimizer.zero_grad(set_to_none=True)
        with Taps(self.model, self.places) as taps:
            loss, auxiliary, routings = self.model.objective(tokens, self.numerics)
            (loss + auxiliary).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.step += 1
        return StepView(
            self.step,
            self.step * tokens[:, 1:].numel(),
            loss.detach(),
            norm,
            self.model,
            WeightHistory([]),
            routings,
            taps,
            self.optimizer,
            self.numerics,
            partial(objective_at, self.model, tokens, 1.0),
        )


@pytest.fixture
def trained_steps() -> type[TrainedSteps]:
    return TrainedSteps
