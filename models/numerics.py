"""Which bit operation is done to which attention tensor, in which arithmetic, and how BF16 storage is imitated."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from foreshock.models.arithmetic import ORDINARY, Arithmetic
from foreshock.models.bits import BitOperation
from foreshock.models.wiring import RIGHT, Wiring, wiring_of


class Heads(Protocol):
    """What a model has of layers, heads, and key-value heads (``models.transformer.TransformerConfig``)."""

    @property
    def n_layers(self) -> int: ...

    @property
    def n_heads(self) -> int: ...

    @property
    def kv_heads(self) -> int: ...

    @property
    def context_length(self) -> int: ...


BF16_SITES = ("q", "k", "v", "p", "o", "do", "ds", "dq", "dk", "dv")
"""Attention tensors that a flash-attention kernel stores or multiplies in BF16."""

FP32_SITES = ("s", "lse", "dp", "delta")
"""Attention tensors that it keeps in FP32; an active fault there rounds to BF16 first."""

SITES = BF16_SITES + FP32_SITES

FORWARD_SITES = ("q", "k", "v", "s", "p", "o")
"""Sites that the forward pass uses or returns (it writes ``lse`` but never reads it)."""

CAUSAL_SITES = ("s", "p", "dp", "ds")
"""Sites with a row of keys for each query, of which those that it may not look at are masked."""

KEY_VALUE_SITES = ("k", "v", "dk", "dv")
"""Sites whose heads are key-value heads; those of all others are query heads."""

PHASES = ("forward", "backward", "both")


def to_bf16_grid(x: Tensor) -> Tensor:
    """Round to the nearest BF16 number (ties to even) and return it in FP32, contiguous.

    An FP32 tensor that holds BF16 numbers multiplies on a CPU exactly as BF16 inputs with FP32
    accumulation do on a tensor core.
    """
    return x.to(torch.bfloat16, memory_format=torch.contiguous_format).float()


def at_least_fp32(x: Tensor) -> Tensor:
    """x in FP32, or as it is in FP64: what softmax and loss are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class SiteFault:
    """One bit operation on one attention tensor of chosen layers and heads.

    site: a name in ``SITES``; phase: ``forward`` corrupts the value that the forward uses or
    returns (its saved copy stays clean), ``backward`` the value that the backward reads,
    ``both`` each of them. rounding, bits, share: see ``models.bits.BitOperation``; the share is of the elements of
    each batch row and head. layers, heads: indices, or None for all; heads are those of the tensor that ``site`` names
    (``KEY_VALUE_SITES``).
    """

    site: str
    phase: str
    rounding: str
    bits: int
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    share: float = 1.0

    @cached_property
    def operation(self) -> BitOperation:
        return BitOperation(self.rounding, self.bits, self.share)

    def __post_init__(self) -> None:
        for field, value, allowed in (("site", self.site, SITES), ("phase", self.phase, PHASES)):
            if value not in allowed:
                raise ValueError(f"{field}={value!r} is not allowed: one of {', '.join(allowed)}")
        if self.phase != "backward" and self.site not in FORWARD_SITES:
            raise ValueError(
                f"site={self.site!r} has no {self.phase} value: the forward pass reads only {', '.join(FORWARD_SITES)}"
            )
        self.operation  # noqa: B018  (building it checks its fields)
        for field, chosen in (("layers", self.layers), ("heads", self.heads)):
            if chosen is not None and (len(set(chosen)) != len(chosen) or not chosen or min(chosen) < 0):
                raise ValueError(f"{field}={list(chosen)} is not allowed: distinct indices from 0, or null for all")

    @property
    def changes_forward(self) -> bool:
        """Whether it changes what the forward computes."""
        return self.bits > 0 and self.phase != "backward"

    def overlaps(self, other: SiteFault) -> bool:
        """Whether both would corrupt the same value: same site, a common phase, layer and head."""

        def meet(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
            return a is None or b is None or bool(set(a) & set(b))

        phases_meet = self.phase == other.phase or "both" in (self.phase, other.phase)
        return (
            self.site == other.site
            and phases_meet
            and meet(self.layers, other.layers)
            and meet(self.heads, other.heads)
        )


@dataclass(frozen=True)
class AttentionNumerics:
    """Which operation is done to which attention tensor of which layer and head, every layer's arithmetic, and wirings.

    Empty and ``ORDINARY`` = healthy; a sum does what both do.
    """

    stackable: ClassVar[bool] = True

    faults: tuple[SiteFault, ...] = ()
    arithmetic: Arithmetic = ORDINARY
    wirings: tuple[Wiring, ...] = ()

    def __post_init__(self) -> None:
        for i, one in enumerate(self.faults):
            for other in self.faults[:i]:
                if one.overlaps(other):
                    raise ValueError(
                        f"two faults on site {one.site!r} in the {one.phase} pass meet: "
                        "give each its own layers or heads"
                    )
        for one, other in combinations(self.wirings, 2):  # type: ignore[assignment]  # wirings now
            if one.meets(other):  # type: ignore[attr-defined]
                raise ValueError(f"{one} and {other} meet: give each its own layers")
        if self.arithmetic.pv_accumulation == "bf16" and any(wiring.mask_shift for wiring in self.wirings):
            raise ValueError("a shifted mask is not possible with pv_accumulation=bf16, which skips masked keys")

    def __add__(self, other: AttentionNumerics) -> AttentionNumerics:
        if ORDINARY not in (self.arithmetic, other.arithmetic):
            raise ValueError("two faults both change the arithmetic of attention: give each steps of its own")
        arithmetic = other.arithmetic if self.arithmetic == ORDINARY else self.arithmetic
        return AttentionNumerics(self.faults + other.faults, arithmetic, self.wirings + other.wirings)

    @property
    def changes_forward(self) -> bool:
        """Whether the same weights give another loss than with a healthy kernel."""
        miswired = any(wiring.wrong for wiring in self.wirings)
        return miswired or self.arithmetic.changes_forward or any(fault.changes_forward for fault in self.faults)

    def check_fits(self, model: Heads, train: Any) -> None:
        """Raise ValueError if a fault names a layer or head that the model does not have."""
        for wiring in self.wirings:
            wiring.check_fits(model.n_layers, model.n_heads, model.kv_heads, model.context_length)
        for fault in self.faults:
            shared = fault.site in KEY_VALUE_SITES and model.kv_heads != model.n_heads
            heads = (model.kv_heads, f"key-value heads for {fault.site!r}") if shared else (model.n_heads, "heads")
            for field, chosen, (count, what) in (
                ("layers", fault.layers, (model.n_layers, "layers")),
                ("heads", fault.heads, heads),
            ):
                if chosen is not None and max(chosen) >= count:
                    raise ValueError(
                        f"fault.{field}={list(chosen)} does not fit the model: it has {count} {what}, 0 to {count - 1}"
                    )

    @lru_cache(maxsize=256)  # noqa: B019  (frozen and hashable: one small entry a fault and layer)
    def layer(self, index: int) -> LayerNumerics:
        """The active faults of one layer, looked up by (site, pass), its arithmetic and its wiring."""
        table: dict[tuple[str, str], tuple[SiteFault, ...]] = {}
        for fault in self.faults:
            if fault.bits and (fault.layers is None or index in fault.layers):
                for phase in ("forward", "backward") if fault.phase == "both" else (fault.phase,):
                    table[fault.site, phase] = (*table.get((fault.site, phase), ()), fault)
        wiring = wiring_of(index, self.wirings)
        healthy = not table and self.arithmetic == ORDINARY and wiring == RIGHT
        return HEALTHY_LAYER if healthy else LayerNumerics(table, self.arithmetic, wiring)


class LayerNumerics:
    """The faults of one attention layer, its arithmetic and its wiring, true where it is not a healthy one.

    ``bits=0`` faults are left out: they do nothing, bit for bit.
    """

    __slots__ = ("_table", "arithmetic", "wiring")

    def __init__(
        self,
        table: Mapping[tuple[str, str], tuple[SiteFault, ...]],
        arithmetic: Arithmetic = ORDINARY,
        wiring: Wiring = RIGHT,
    ) -> None:
        self._table, self.arithmetic, self.wiring = table, arithmetic, wiring

    def __bool__(self) -> bool:
        return bool(self._table) or self.arithmetic != ORDINARY or self.wiring != RIGHT

    def hears(self, change: str) -> bool:
        """Whether ``note`` of a change is of use, so that a costly one need not be prepared in vain."""
        return False

    def note(self, change: str, before: Tensor, after: Tensor, batched: bool = False) -> None:
        """Hear what a wrong wiring or arithmetic has changed, for those who keep a log (``faults.logged_numerics``).

        batched: whether the tensors lead with an axis of sequences, which runs of a stack share out.
        """

    def touches(self, site: str, phase: str) -> bool:
        return (site, phase) in self._table

    def items(self) -> ItemsView[tuple[str, str], tuple[SiteFault, ...]]:
        """The active faults of each (site, pass) that has any."""
        return self._table.items()

    def reached(
        self, site: str, phase: str, x_BHT: Tensor, window: int | None = None
    ) -> list[tuple[slice | list[int], Tensor | None]]:
        """What each fault of this site reaches of x: its heads, and which of their elements (None: all)."""
        shape, device, causal = x_BHT.shape[2:], x_BHT.device, site in CAUSAL_SITES
        return [
            (
                slice(None) if fault.heads is None else list(fault.heads),
                fault.operation.hits(shape, device, causal, window if causal else None),
            )
            for fault in self._table.get((site, phase), ())
        ]

    def apply(self, site: str, phase: str, x_BHT: Tensor, nonfinite: Tensor, window: int | None = None) -> Tensor:
        """The value that this pass reads at this site: x itself, or a corrupted copy in FP32.

        x_BHT: FP32, shape (batch, heads, ...), heads being those of the site; window: how many keys the layer's queries
        see. The number of non-finite values that reach an active fault is added to ``nonfinite`` (an integer scalar on
        x's device, or one each for the runs that follow one another in the batch) before the operation, which could
        hide them.
        """
        faults = self._table.get((site, phase))
        if faults is None:
            return x_BHT
        out = x_BHT.clone()
        for fault, (heads, hits) in zip(faults, self.reached(site, phase, x_BHT, window), strict=True):
            before = x_BHT[:, heads]
            finite = torch.isfinite(before)
            counted = (finite if hits is None else finite | ~hits).reshape(*nonfinite.shape, -1)
            nonfinite += counted.shape[-1] - counted.sum(-1)
            out[:, heads] = fault.operation(before, hits)
        return out


HEALTHY_LAYER = LayerNumerics({})
HEALTHY = AttentionNumerics()
