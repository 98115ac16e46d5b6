"""Linear layers that multiply in another number format, while a step's forward and backward run."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

import torch.nn as nn
from torch import Tensor

from foreshock.faults.amax_history import AmaxHistory
from foreshock.faults.operation import Operation, Training
from foreshock.models.corruption import Log
from foreshock.models.moe import GroupedLinear
from foreshock.models.transformer import TransformerConfig, skeleton

Linear = nn.Linear | GroupedLinear
WILD = "*?["
BLOCKS, ROUTER = "blocks.", ".router"
"""How the names of a block's layers begin, and how that of its router ends."""


class Scope(NamedTuple):
    """What a product may use beside its operands: the engine's history, and the log of the step or None."""

    amaxes: AmaxHistory
    log: Log | None


@dataclass(frozen=True)
class ProductFormat(Operation):
    """The number format in which linear layers multiply: of their forward and of both products of their backward.

    modules: names as in ``named_modules()``, or patterns of them (``blocks.*.mlp.*``); None for every linear layer of
    the blocks, those of experts included and routers not. form: of x and W; gradient_form: of dy; ``fp32`` leaves an
    operand as it is, as ``form`` all of them. A run with one trains by itself, and eagerly.
    """

    stackable: ClassVar[bool] = False

    modules: tuple[str, ...] | None
    form: str
    gradient_form: str

    @property
    def idle(self) -> bool:
        return self.form == "fp32"

    @property
    def changes_forward(self) -> bool:
        return not self.idle

    def form_of(self, operand: str) -> str:
        """The format of ``x``, ``w`` or ``dy``."""
        return self.gradient_form if operand == "dy" else self.form

    def meets(self, other: Any) -> bool:
        """Whether a layer may be given two formats. Two patterns are taken to share a name."""
        if not isinstance(other, ProductFormat) or self.idle or other.idle:
            return False
        if self.modules is None:
            return other.modules is None or any(map(_may_be_in_blocks, other.modules))
        if other.modules is None:
            return other.meets(self)
        return any(_may_share(own, another) for own in self.modules for another in other.modules)

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        self.find(skeleton(model))
        if train.compile:
            raise ValueError("train.compile=True has no fault sites outside attention: set train.compile=false")

    def find(self, model: nn.Module) -> dict[str, Linear]:
        """The layers by name. Raises ValueError for a name or pattern of no linear layer of the model."""
        known = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        if self.modules is None:
            return {name: known[name] for name in known if name.startswith(BLOCKS) and not name.endswith(ROUTER)}
        chosen: dict[str, Linear] = {}
        for pattern in self.modules:
            matches = [name for name in known if fnmatchcase(name, pattern)]
            if not matches:
                near = difflib.get_close_matches(pattern, known, n=4, cutoff=0.0)
                raise ValueError(
                    f"fault.modules: the model has no linear layer {pattern!r}; the nearest are {', '.join(near)}"
                )
            chosen |= {name: known[name] for name in matches}
        return chosen

    def forward_of(self, name: str, module: Linear, scope: Scope) -> Callable[..., Tensor]:
        """What takes the place of the module's forward."""
        raise NotImplementedError


def _may_be_in_blocks(pattern: str) -> bool:
    """Whether a name or pattern may be of a linear layer of the blocks that is no router."""
    start = re.split(r"[*?\[]", pattern)[0]
    return (start.startswith(BLOCKS) or BLOCKS.startswith(start)) and not pattern.endswith(ROUTER)


def _may_share(one: str, other: str) -> bool:
    both_wild = all(any(sign in pattern for sign in WILD) for pattern in (one, other))
    return both_wild or fnmatchcase(one, other) or fnmatchcase(other, one)


def check_modules(modules: Sequence[str] | None) -> None:
    """Raise ValueError for no module, or one that is named twice."""
    if modules is not None and (not modules or len(set(modules)) != len(modules) or not all(modules)):
        raise ValueError(
            f"fault.modules={list(modules)} is not allowed: distinct names or patterns, at least one, or null for "
            "every linear layer of the blocks"
        )


class Formatted:
    """The formats of a step in a model's linear layers, while the context is open; idle ones do nothing.

    What stands around a layer, such as taps and faults of its output, takes the product for the layer's own. At the end
    the amaxes of the update are added to the history; under ``torch.no_grad`` none are noted.
    """

    def __init__(
        self,
        model: nn.Module,
        formats: Sequence[ProductFormat],
        amaxes: AmaxHistory,
        log: Log | None = None,
    ) -> None:
        self._places = [(form, form.find(model)) for form in formats if not form.idle]
        self._scope = Scope(amaxes, log)
        self._changed: list[Linear] = []

    def __enter__(self) -> Formatted:
        for form, layers in self._places:
            for name, module in layers.items():
                module.forward = form.forward_of(name, module, self._scope)  # type: ignore[method-assign]  # of this one
                self._changed.append(module)
        return self

    def __exit__(self, *_: Any) -> None:
        for module in self._changed:
            del module.forward
        self._changed.clear()
        self._scope.amaxes.end_update()
