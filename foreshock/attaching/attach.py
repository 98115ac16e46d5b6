"""``foreshock.attach``: monitors on a model that trains in a loop of its own."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TypeGuard, Unpack
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn

from foreshock.attaching.choice import configuration, configured, declined
from foreshock.attaching.options import Given, Options
from foreshock.attaching.watch import AttachedWatch
from foreshock.models.anatomy import Anatomy

_WATCHED: WeakSet[nn.Module] = WeakSet()


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Unpack[Given]) -> AttachedWatch:
    """Watch a training that goes on as before: not a bit of it changes.

        watch = foreshock.attach(model, optimizer)
        for batch in batches:
            loss = model(batch).loss
            loss.backward()
            optimizer.step()
            watch.step(loss)
            optimizer.zero_grad()
        watch.close()

    model: GPT-2, nanoGPT, Llama, Qwen, Mistral, OLMo, Mixtral or alike, ours, or any other with ``anatomy=``; inside
    DistributedDataParallel too; attach before ``torch.compile``. options: see ``foreshock.attaching.options.Options``.

    Raises ValueError in one line: for an optimizer that holds other parameters than the model, for a model that has a
    watch, for one that is not recognised, for an unknown monitor, and where no monitor is left.
    """
    given, plain = Options.of(options).of_rank(rank()), unwrapped(model)
    if plain in _WATCHED:
        raise ValueError(f"attach: this {type(plain).__name__} has a watch already: close() that first")
    check_optimizer(plain, optimizer)
    anatomy = Anatomy.of(plain, given.anatomy)
    asked = configured(given.patterns, given.every_steps)
    reasons = declined(asked, anatomy, optimizer, given.scaler)
    monitors = {name: monitor for name, monitor in asked.items() if name not in reasons}
    if not monitors:
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"attach: no monitor is left; {name}: {reason}")
    nodes = configuration(list(monitors), given.every_steps)
    watch = AttachedWatch(anatomy, optimizer, monitors, given, reasons, nodes)
    _WATCHED.add(plain)
    watch.when_closed(lambda: _WATCHED.discard(plain))
    if not given.quiet:
        with suppress(OSError, ValueError):  # a terminal that is gone is no reason to stop
            print(watch.summary(), file=sys.stderr)
    return watch


def rank() -> int:
    """Of this process in a distributed training, 0 without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or ``torch.compile``."""
    inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    return unwrapped(inner) if _is_wrapper(model, inner) else model


def _is_wrapper(model: nn.Module, inner: object) -> TypeGuard[nn.Module]:
    return isinstance(inner, nn.Module) and len(list(model.children())) == 1 and not model._parameters


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where the optimizer holds a parameter that the model does not have, or none of the model's."""
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strange = [tuple(parameter.shape) for parameter in held if id(parameter) not in own]
    if strange or not held:
        found = f"{len(strange)} of {len(held)} parameters that {type(model).__name__} does not have"
        first = f", the first of shape {strange[0]}" if strange else ""
        raise ValueError(f"attach: {type(optimizer).__name__} holds {found}{first}: give the optimizer of this model")
