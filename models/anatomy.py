"""Which parts of a language model play which role, so that its readers need not know its class.

Shapes: L blocks, H query heads, G key-value heads, D head width, E model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from foreshock.models.anatomies.by_hand import of_roles
from foreshock.models.anatomies.parts import (
    BLOCK,
    LINEAR_LAYERS,
    MLP_PARTS,
    NORMS,
    OUTSIDE,
    ROLES,
    Block,
    Heads,
    Part,
)
from foreshock.models.anatomies.structure import Found, of_structure
from foreshock.models.moe import MoEConfig
from foreshock.models.taps import M_co, Tap
from foreshock.models.transformer import Transformer

__all__ = ["BLOCK", "LINEAR_LAYERS", "MLP_PARTS", "NORMS", "OUTSIDE", "ROLES", "Anatomy", "Block", "Heads", "Part"]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model and the roles of its parts.

    parts: by role, of ``OUTSIDE``; tied: whether the head's weight is the embedding's; moe: how the router shares out
    tokens, None without experts; counters: buffers that count the non-finite numbers which reached a fault site.
    """

    model: nn.Module
    parts: Mapping[str, Part]
    blocks: tuple[Block, ...]
    heads: Heads
    tied: bool
    moe: MoEConfig | None = None
    counters: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, roles: Mapping[str, str | int] | None = None) -> Anatomy:
        """Of a ``models.transformer.Transformer``, of another model by its structure, or by ``roles`` that name it.

        roles: see ``models.anatomies.by_hand``. ValueError names what a model lacks.
        """
        if roles is not None:
            return _of_found(model, of_roles(model, roles))
        return _of_transformer(model) if isinstance(model, Transformer) else _of_found(model, of_structure(model))

    def role(self, role: str) -> list[Part]:
        """The parts that play a role: one, or one a block. None where the model, or one of its blocks, lacks it."""
        places = [self.parts] if role in OUTSIDE else [block.parts for block in self.blocks]
        return [parts[role] for parts in places] if all(role in parts for parts in places) else []

    def parameters(self, role: str) -> list[str]:
        """The names of a role's parameters, in the model's order. Empty where the model lacks the role."""
        if role == BLOCK:
            return [name for block in self.blocks for name in block.parameters]
        return [part.weight for part in self.role(role)]

    @cached_property
    def head_shape(self) -> tuple[int, int] | None:
        """Rows and columns of the head's weight, tokens and width, None without a head."""
        heads = self.role("head")
        return (*heads[0].of(self.weights()).shape,) if heads else None

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters as they are now, by name, a tied one once. Detached, not copied."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def stacked(self, role: str, weights: Mapping[str, Tensor]) -> Tensor:
        """A role's weights of all blocks, (L, rows, E), out of weights by name. Raises KeyError for a missing one."""
        return torch.stack([part.of(weights) for part in self.role(role)])

    def taps(self, role: str, taps: Mapping[str, Tap[M_co]]) -> list[Tap[M_co]]:
        """A role's taps out of taps by module name: one, or one a block.

        Of a role in a fused product they are its rows of that. None where the model lacks the role, or has it untapped.
        """
        parts = self.role(role)
        if not all(part.module in taps for part in parts):
            return []
        return [taps[part.module] if part.rows is None else taps[part.module].of_rows(part.rows) for part in parts]

    def fused(self, roles: Sequence[str], taps: Mapping[str, Tap]) -> list[Tap]:
        """The taps of a product that all of these roles share, one a block. None where they do not share one."""
        parts = [self.role(role) for role in roles]
        modules = [{part.module for part in of_block} for of_block in zip(*parts, strict=True)] if all(parts) else []
        if not modules or any(len(names) > 1 or not names <= taps.keys() for names in modules):
            return []
        return [taps[names.pop()] for names in modules]


_OUTSIDE = {"embedding": "tokens", "positions": "positions", "final_norm": "final_norm", "head": "head"}
_ATTENTION = {
    "attention_norm": "attention_norm",
    "mlp_norm": "mlp_norm",
    **{role: f"attention.{role}" for role in (*"qkvo", "q_norm", "k_norm")},
}
_DENSE = {part: f"mlp.{part}" for part in MLP_PARTS}
_ROUTED = {
    **{f"experts_{part}": name for part, name in _DENSE.items()},
    **{f"shared_{part}": f"mlp.shared.{part}" for part in MLP_PARTS},
    "router": "mlp.router",
}
_OPTIONAL = {"positions", "q_norm", "k_norm", "gate", "experts_gate", *(f"shared_{part}" for part in MLP_PARTS)}


def _of_found(model: nn.Module, found: Found) -> Anatomy:
    return Anatomy(
        model=model, parts=found.parts, blocks=found.blocks, heads=found.heads, tied=found.tied, moe=found.moe
    )


def _of_transformer(model: nn.Module) -> Anatomy:
    """By the names that ``models.transformer`` gives."""
    modules = dict(model.named_modules())
    weight_names = {id(parameter): name for name, parameter in model.named_parameters()}

    def parts(names: Mapping[str, str], prefix: str = "") -> dict[str, Part]:
        for role, name in names.items():
            if prefix + name not in modules and role not in _OPTIONAL:
                raise ValueError(f"anatomy: {type(model).__name__} does not fit, it has no {prefix}{name} ({role})")
        present = {role: prefix + name for role, name in names.items() if prefix + name in modules}
        return {role: Part(name, weight_names[id(modules[name].weight)]) for role, name in present.items()}

    def block(prefix: str) -> Block:
        names = _ATTENTION | (_ROUTED if f"{prefix}mlp.router" in modules else _DENSE)
        own = tuple(n for n in weight_names.values() if n.startswith(prefix))
        return Block(parts(names, prefix), own, f"{prefix}attention")

    outside = parts(_OUTSIDE)
    layers = len(list(takewhile(lambda index: f"blocks.{index}" in modules, count()))) or 1
    config: Any = model.config
    head, embedding = modules["head"], modules["tokens"]
    return Anatomy(
        model=model,
        parts=outside,
        blocks=tuple(block(f"blocks.{layer}.") for layer in range(layers)),
        heads=Heads(config.n_heads, config.kv_heads, config.d_head),
        tied=head.weight is embedding.weight,
        moe=config.moe,
        counters=tuple(f"blocks.{layer}.attention.nonfinite" for layer in range(layers)),
    )
