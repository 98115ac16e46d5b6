"""The dense feed-forward part of a block."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

KINDS = ("gelu", "swiglu")


class MLP(nn.Module):
    """``gelu``: W_out gelu(W_in x). ``swiglu``: W_out (silu(W_gate x) * W_in x) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, d_model: int, d_ff: int, kind: str) -> None:
        super().__init__()
        self.input = nn.Linear(d_model, d_ff, bias=False)
        self.gate = nn.Linear(d_model, d_ff, bias=False) if kind == "swiglu" else None
        self.output = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.input(x)
        hidden = F.gelu(hidden) if self.gate is None else F.silu(self.gate(x)) * hidden
        return self.output(hidden)
