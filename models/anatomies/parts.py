"""The parts of a language model: roles, and where the weight of each lies.

Shapes: L blocks, H query heads, G key-value heads, D head width, E model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

MLP_PARTS = ("input", "gate", "output")
OUTSIDE = ("embedding", "positions", "final_norm", "head")
"""Roles outside the blocks."""
NORMS = ("attention_norm", "mlp_norm", "q_norm", "k_norm")
LINEAR_LAYERS = (
    *"qkvo",
    *MLP_PARTS,
    *(f"experts_{part}" for part in MLP_PARTS),
    *(f"shared_{part}" for part in MLP_PARTS),
    "router",
)
"""Linear layers of a block: it has ``MLP_PARTS``, or a router, experts and perhaps an expert that all tokens share."""
BLOCK = "block"
"""All parameters of the blocks, those without a role of their own among them."""
ROLES = (*OUTSIDE, *NORMS, *LINEAR_LAYERS, BLOCK)


@dataclass(frozen=True)
class Heads:
    """Attention's heads, alike in every block: query and key-value heads, and the width of each."""

    query: int
    key_value: int
    width: int


@dataclass(frozen=True)
class Part:
    """The names of a module and of its weight.

    rows: first and last + 1 of a role in a fused product, None for all; transposed: whether the weight lies as
    (in, out), as in GPT-2's Conv1D, and not as (out, in).
    """

    module: str
    weight: str
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def of(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The part's own rows of its weight, (..., rows, E)."""
        weight = weights[self.weight].mT if self.transposed else weights[self.weight]
        return weight if self.rows is None else weight[..., slice(*self.rows), :]


@dataclass(frozen=True)
class Block:
    """parts: by role, of ``NORMS`` and ``LINEAR_LAYERS``; parameters: the names of all parameters of the block.

    attention: the name of the module whose forward calls attention's dot product, None where that is not known.
    """

    parts: Mapping[str, Part]
    parameters: tuple[str, ...]
    attention: str | None = None
