"""Mixture-of-experts layer: a top-k softmax router over experts that are computed grouped.

Shapes: N tokens of a batch, M d_model, E experts, K top_k, F expert width. A *slot* is one of a token's
K places at experts; a batch has N K of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from foreshock.models.mlp import MLP
from foreshock.models.numerics import at_least_fp32
from foreshock.models.precision import as_autocast, outside_autocast

MOST_EXPERTS, MOST_SHARED = 4096, 2**20
"""The largest number of experts, and width of the shared one."""


@dataclass(frozen=True)
class MoEConfig:
    """Router and experts of every layer; their width is ``model.d_ff``. The keys of ``model.moe``.

    n_experts, top_k: experts, and how many of them each token visits;
    renormalise: gates are the top-k probabilities divided by their sum, else the probabilities themselves;
    capacity_factor: an expert takes at most ceil(factor N K / E) slots of a batch and drops the rest, which
    leaves those tokens to the residual stream, or None to drop nothing;
    aux_coef: of the Switch load-balance loss (arXiv:2101.03961 eq. 4); z_coef: of the router z-loss
    (arXiv:2202.08906 eq. 5); each is summed over layers, 0 for none;
    shared_d_ff: width of an expert that every token visits (arXiv:2401.06066), or None;
    bias_update_speed: step of the selection bias that balances without a loss (arXiv:2408.15664), or None.
    """

    n_experts: int
    top_k: int
    renormalise: bool = True
    capacity_factor: float | None = None
    aux_coef: float = 0.0
    z_coef: float = 0.0
    shared_d_ff: int | None = None
    bias_update_speed: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.n_experts <= MOST_EXPERTS:
            raise ValueError(f"model.moe.n_experts={self.n_experts} is not allowed: 2 to {MOST_EXPERTS}")
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"model.moe.top_k={self.top_k} is not allowed: 1 to n_experts={self.n_experts}")
        if self.top_k == 1 and self.renormalise:
            raise ValueError(
                "model.moe.renormalise=True with model.moe.top_k=1 makes every gate 1 and starves the router of "
                "gradient: set renormalise=false"
            )
        for field in ("capacity_factor", "bias_update_speed"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"model.moe.{field}={value} is not allowed: above 0, or null for none")
        for field in ("aux_coef", "z_coef"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"model.moe.{field}={getattr(self, field)} is not allowed: 0 or more")
        if self.shared_d_ff is not None and not 1 <= self.shared_d_ff <= MOST_SHARED:
            raise ValueError(
                f"model.moe.shared_d_ff={self.shared_d_ff} is not allowed: 1 to {MOST_SHARED}, or null for none"
            )

    @property
    def balances(self) -> bool:
        """Whether anything keeps the experts' loads even."""
        return self.aux_coef > 0 or self.bias_update_speed is not None

    def capacity(self, n_tokens: int) -> int | None:
        """Slots of one expert in a batch of ``n_tokens``, or None for no limit."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * n_tokens * self.top_k / self.n_experts)


@dataclass(frozen=True)
class Routing:
    """What one layer's router did with one batch. Everything stays on the device.

    logits_NE and probabilities_NE, their full softmax: FP32, with gradient; counts_E: slots that chose each
    expert, before capacity; dropped: slots over capacity, 0-dim.
    """

    logits_NE: Tensor
    probabilities_NE: Tensor
    counts_E: Tensor
    dropped: Tensor

    @cached_property
    def load_balance(self) -> Tensor:
        """Switch load-balance loss E sum_e f_e P_e: f the share of slots, P the mean probability; 1 when balanced."""
        share_E = self.counts_E / self.counts_E.sum()
        return len(share_E) * (share_E * self.probabilities_NE.mean(0)).sum()

    @cached_property
    def z(self) -> Tensor:
        """Router z-loss: the mean over tokens of logsumexp(logits)^2."""
        return self.logits_NE.logsumexp(-1).square().mean()


class GroupedLinear(nn.Module):
    """One bias-free linear layer an expert, all in one grouped product: y = x W_e for the slots x of expert e.

    A module, so that it is tapped as ``nn.Linear`` is; its weight (E, in, out) lies the other way round.
    """

    def __init__(self, n_experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_in, d_out))

    def forward(self, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        """x_SI: slots sorted by expert; ends_E: int32, where each expert's slots end. Returns (S, out)."""
        x_SI, weight = as_autocast(x_SI, self.weight)
        return F.grouped_mm(x_SI, weight, offs=ends_E)


class MoE(nn.Module):
    """y = sum over a token's top-k experts of gate_e(x) expert_e(x), plus the shared expert where there is one.

    Probabilities are the full softmax of W_R x; the top-k of them (of them plus the balancing bias, which
    chooses but does not weigh) name the experts. Slots are sorted by expert and each group goes through
    one grouped matrix product, so the cost does not depend on how the load is spread. An expert
    over capacity drops the slots that come last in the batch: a token's fate never depends on later tokens
    of its own sequence.
    """

    def __init__(self, d_model: int, d_ff: int, kind: str, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        E = config.n_experts
        self.input = GroupedLinear(E, d_model, d_ff)
        self.gate = GroupedLinear(E, d_model, d_ff) if kind == "swiglu" else None
        self.output = GroupedLinear(E, d_ff, d_model)
        self.router = nn.Linear(d_model, E, bias=False)
        self.shared = MLP(d_model, config.shared_d_ff, kind) if config.shared_d_ff else None
        balanced = config.bias_update_speed is not None
        self.balance_bias: Tensor | None
        self.register_buffer("balance_bias", torch.zeros(E) if balanced else None)

    def forward(self, x_BTM: Tensor) -> tuple[Tensor, Routing]:
        c, x_NM = self.config, x_BTM.flatten(0, 1)
        with outside_autocast(x_NM):
            logits_NE = self.router(at_least_fp32(x_NM))
        probabilities_NE = logits_NE.softmax(-1)
        scores_NE = probabilities_NE if self.balance_bias is None else probabilities_NE + self.balance_bias
        expert_NK = scores_NE.topk(c.top_k, dim=-1).indices
        gate_NK = probabilities_NE.gather(-1, expert_NK)
        if c.renormalise:
            gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)

        expert_S, slot_S = expert_NK.flatten().sort(stable=True)  # slots by expert, in batch order within one
        ends_E = torch.searchsorted(expert_S, torch.arange(c.n_experts, device=x_NM.device), right=True)
        starts_E = F.pad(ends_E[:-1], (1, 0))
        gate_S = gate_NK.flatten().index_select(0, slot_S)
        dropped = torch.zeros((), dtype=torch.int64, device=x_NM.device)
        capacity = c.capacity(len(x_NM))
        if capacity is not None:
            place_S = torch.arange(len(slot_S), device=x_NM.device) - starts_E[expert_S]
            over_S = place_S >= capacity
            gate_S, dropped = gate_S.masked_fill(over_S, 0.0), over_S.sum()

        token_S = slot_S // c.top_k
        y_SM = self._experts(x_NM.index_select(0, token_S), ends_E.int()) * gate_S[:, None]
        y_NM = torch.zeros_like(x_NM).index_add(0, token_S, y_SM)
        if self.shared is not None:
            y_NM = y_NM + self.shared(x_NM)
        return y_NM.view_as(x_BTM), Routing(logits_NE, probabilities_NE, ends_E - starts_E, dropped)

    def _experts(self, x_SM: Tensor, ends_E: Tensor) -> Tensor:
        hidden = self.input(x_SM, ends_E)
        hidden = F.gelu(hidden) if self.gate is None else F.silu(self.gate(x_SM, ends_E)) * hidden
        return self.output(hidden, ends_E)

    @torch.no_grad()
    def update_balance(self, routing: Routing, scale: float) -> None:
        """Loss-free balancing after an update: b_e += scale speed sign(mean load - load_e)."""
        if self.balance_bias is not None:
            counts_E = routing.counts_E.float()
            # where there is a bias, there is a speed
            self.balance_bias += scale * self.config.bias_update_speed * (counts_E.mean() - counts_E).sign()  # type: ignore[operator]


def auxiliary_loss(routings: Sequence[Routing], config: MoEConfig, balance_scale: float) -> Tensor:
    """What is added to the NLL: sum over layers of balance_scale aux_coef load_balance + z_coef z. 0-dim."""
    total = torch.zeros((), device=routings[0].logits_NE.device)
    for routing in routings:
        if config.aux_coef and balance_scale:
            total = total + balance_scale * config.aux_coef * routing.load_balance
        if config.z_coef:
            total = total + config.z_coef * routing.z
    return total
