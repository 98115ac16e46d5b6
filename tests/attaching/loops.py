"""Training loops that know nothing of monitors, and what is left of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import foreshock

_EXAMPLE = Path(__file__).parents[2] / "examples" / "nanogpt_style.py"
_spec = importlib.util.spec_from_file_location("nanogpt_style", _EXAMPLE)
nanogpt_style = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = nanogpt_style  # torch.compile imports it by its name
_spec.loader.exec_module(nanogpt_style)

VOCABULARY, CONTEXT = 31, 16


def gpt(**changes: Any) -> nn.Module:
    """nanoGPT's model, tiny, the same each time; its head is tied to its embedding."""
    torch.manual_seed(0)
    small = {"vocabulary": VOCABULARY, "context": CONTEXT, "width": 32, "layers": 2, "heads": 2}
    return nanogpt_style.GPT(**small | changes)


def batches(steps: int, rows: int = 4) -> list[Tensor]:
    """Tokens (rows, CONTEXT + 1) of a text with structure."""
    generator = torch.Generator().manual_seed(1)
    text = torch.arange(400).square().remainder(VOCABULARY)
    starts = torch.randint(0, 400 - CONTEXT - 1, (steps, rows), generator=generator).tolist()
    return [torch.stack([text[i : i + CONTEXT + 1] for i in of_batch]) for of_batch in starts]


class Left(NamedTuple):
    """What a training leaves behind; every tensor counts to the bit."""

    weights: dict[str, Tensor]
    optimizer: Any
    random: Tensor
    gradients: list[Tensor | None]


class Trained(NamedTuple):
    left: Left
    watch: Any


def train(
    model: nn.Module,
    watched: bool,
    *,
    steps: int = 7,
    parts: int = 1,
    bf16: bool = False,
    scaled: bool = False,
    clip: float | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    wrap: Callable[[nn.Module], Callable[..., Any]] | None = None,
    **options: Any,
) -> Trained:
    """Train for some steps, with a watch or without; wrap: makes of the model what is called."""
    optimizer = (optimizer or (lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)))(
        model
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) if scaled else None
    settings = ({} if "monitors" in options else {"every_steps": 2}) | {"quiet": True, "scaler": scaler} | options
    watch = foreshock.attach(model, optimizer, **settings) if watched else None
    called = model if wrap is None else wrap(model)
    torch.manual_seed(5)
    for batch in batches(steps, 4 * parts):
        pieces = batch.chunk(parts)
        for piece in pieces:
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = called(piece[:, :-1], piece[:, 1:])[1] / parts
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if watch is not None:
            watch.step(loss.detach() * parts)
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
    if watch is not None:
        watch.close()
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    return Trained(Left(weights, optimizer.state_dict(), torch.get_rng_state(), gradients), watch)


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same bits."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
