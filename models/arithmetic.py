"""How attention's forward sums P V and what its backward makes of O: low precision as it is, and what cures it.

The natural fault of low-precision attention (Qiu & Yao, arXiv:2510.04212). Where several scores tie at the maximum of
a row, Pbar = exp(S - max S) is exactly 1 several times, so that V itself is added up. Where V has one sign in some
feature, the sum carries into the next binade and a bit of V drops out as it is rounded to BF16; what the other keys add
has the same sign, and breaks the tie away from zero. So the error of O has a sign, and through delta = rowsum(dO * O)
it enters every dS of its row. Rounding every single addition does not do this, for the rest then comes too late or too
early to break a tie; where attention is even it loses small addends instead, and O errs towards zero.

Shapes: B batch, H query heads, G key-value heads, T tokens, D d_head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHOICES = {
    "pv_accumulation": ("fp32", "bf16"),
    "stored_o": ("bf16", "fp32"),
    "delta": ("o", "p"),
    "row_max": ("plain", "dynamic", "offset"),
}

ROUNDS_TO_ONE = math.log1p(-(2.0**-9))
"""Scores this close to the maximum of their row have a Pbar that BF16 stores as 1."""


@dataclass(frozen=True)
class Arithmetic:
    """What is done in which precision. The defaults are an ordinary flash-attention kernel.

    pv_accumulation: ``fp32``, or ``bf16``: the running sum of Pbar V is rounded to BF16 after every ``pv_block`` keys,
    in the order of the keys; within a block it is FP32. None rounds the whole sum once, before it is divided by the row
    sum, as a product of BF16 tensors does and as the source describes; 1 rounds every addition.

    The cures, each of which leaves softmax what it is in exact arithmetic. stored_o: the O that the backward reads,
    ``bf16``: the one returned, or ``fp32``: one accumulated and kept in FP32, which the forward does not return.
    delta: ``o``, rowsum(dO * O), or ``p``, rowsum(dP * P), which no error of O reaches. row_max: what is subtracted
    from the scores of a row, ``plain``: their maximum m; ``dynamic``: beta m if m > 0 and 0 if m < 0 in rows where the
    maximum repeats (BF16 stores more than one Pbar as 1), so that no Pbar there is 1; ``offset``: m + offset in every
    row, which is no cure but the source's positive control: tied scores still have one and the same Pbar. Where
    exp(-offset) is no BF16 number, rounding it biases O in every row, ties or none.

    beta: above 1, at most 8 (the source takes 2 to 8); exp(S - beta m) must not underflow, and a row of which all
    does has no O: NaN. offset: above 0. Raises ValueError on impossible values and on values without effect, by name.
    """

    pv_accumulation: str = "fp32"
    pv_block: int | None = None
    stored_o: str = "bf16"
    delta: str = "o"
    row_max: str = "plain"
    beta: float | None = None
    offset: float | None = None

    def __post_init__(self) -> None:
        allowed: tuple[str, ...] | str
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not allowed: one of {', '.join(allowed)}")
        if self.pv_block is not None and self.pv_accumulation != "bf16":
            raise ValueError(f"pv_block={self.pv_block} is not allowed: it goes with pv_accumulation=bf16 alone")
        for field, needed, condition in (
            ("beta", self.row_max == "dynamic", "row_max=dynamic"),
            ("offset", self.row_max == "offset", "row_max=offset"),
        ):
            if (getattr(self, field) is not None) != needed:
                raise ValueError(f"{field}={getattr(self, field)} is not allowed: it goes with {condition} alone")
        for field, fits, allowed in (
            ("pv_block", self.pv_block is None or self.pv_block >= 1, "at least 1 key"),
            ("beta", self.beta is None or 1 < self.beta <= 8, "above 1, at most 8"),
            ("offset", self.offset is None or 0 < self.offset < math.inf, "above 0"),
        ):
            if not fits:
                raise ValueError(f"{field}={getattr(self, field)} is not allowed: {allowed}")
        if self.delta == "p" and self.stored_o == "fp32":
            raise ValueError("stored_o='fp32' has no effect with delta='p', which reads no O")

    @property
    def changes_forward(self) -> bool:
        """Whether the O that the forward returns is rounded otherwise than by an ordinary kernel."""
        return (self.pv_accumulation, self.row_max) != (ORDINARY.pv_accumulation, ORDINARY.row_max)


ORDINARY = Arithmetic()


def row_shift(s: Tensor, arithmetic: Arithmetic) -> Tensor:
    """What is subtracted from each row of scores before exp, (..., T, T) -> (..., T, 1); masked scores are -inf."""
    largest = s.amax(-1, keepdim=True)
    if arithmetic.row_max == "offset":
        return largest + arithmetic.offset  # type: ignore[operator]  # given with this row_max alone
    if arithmetic.row_max == "dynamic":
        repeats = (s >= largest + ROUNDS_TO_ONE).sum(-1, keepdim=True) > 1
        moved = torch.where(largest > 0, arithmetic.beta * largest, 0.0)  # type: ignore[operator]  # given, as offset
        return torch.where(repeats, moved, largest)
    return largest


def product_in_bf16(p_BHTT: Tensor, v_BGTD: Tensor, block: int | None, window: int | None) -> Tensor:
    """P V with an accumulator that is rounded to BF16 after every ``block`` keys, or once, (B, H, T, D) in FP32.

    p: zero where a query does not see a key. Those keys are skipped: to add 0 rounds nothing.
    """
    B, H, T, _ = p_BHTT.shape
    G, D = v_BGTD.shape[1], v_BGTD.shape[-1]
    p, v = p_BHTT.view(B, G, H // G, T, T), v_BGTD.unsqueeze(2)
    total = torch.zeros(B, G, H // G, T, D, dtype=torch.bfloat16, device=p.device)
    block = T if block is None else block
    for first in range(0, T, block):
        keys = slice(first, min(first + block, T))
        seeing = slice(first, None if window is None else keys.stop - 1 + window)
        weight, value = p[..., seeing, keys], v[..., keys, :]
        added = weight * value if block == 1 else weight @ value
        total[..., seeing, :] = added.add_(total[..., seeing, :])
    return total.view(B, H, T, D).float()
