"""The router family: what the router's weights, its probabilities and the experts' loads say.

Sources: arXiv:2606.28116 section 5 and its authors' design notes (weights, routing entropy); *Monitoring
Metrics for LLM Pre-Training* (loads); PaddleFleet's monitor suite (top-k margin).
Shapes: N tokens, E experts, M d_model. Signals are per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foreshock.models.taps import known
from foreshock.monitors.base import Masked, Needs, Reading, Signal, StepView
from foreshock.monitors.cadence import Cadence

PER_LAYER = ("layer",)
FAMILY = "router"


def weight_similarity(W: Tensor) -> Tensor:
    """Mean pairwise cosine of the experts' rows: (E ||mean_e w_e/||w_e|| ||^2 - 1) / (E - 1).

    Source: arXiv:2606.28116 eq. 7. W: (..., E, M), E at least 2. Returns (...), in [-1/(E - 1), 1]: 1 where all
    rows point one way, 0 where they are orthogonal. A zero row has no direction: NaN.
    """
    E = _experts(W)
    direction = W / torch.linalg.vector_norm(W, dim=-1, keepdim=True)
    return (E * direction.mean(-2).square().sum(-1) - 1) / (E - 1)


def conditioning_ratio(W: Tensor) -> Tensor:
    """Largest distance of a row from the mean row, in mean-row norms: max_e ||w_e - wbar|| / ||wbar||.

    Source: arXiv:2606.28116 eq. 8. W: (..., E, M), E at least 2. Returns (...), 0 or more: 0 where all rows are
    equal; Inf where they cancel, NaN where all are zero.
    """
    _experts(W)
    mean = W.mean(-2, keepdim=True)
    return torch.linalg.vector_norm(W - mean, dim=-1).amax(-1) / torch.linalg.vector_norm(mean, dim=-1).squeeze(-1)


def centered_norm(W: Tensor) -> Tensor:
    """||W - 1 wbar^T||_F^2, the part of the router that changes the softmax. (..., E, M) -> (...), 0 or more.

    Source: authors' design notes. Divided by 2E it is the leading fall of routing entropy below ln E, in nats,
    for inputs of unit covariance: H = ln E - Var_e(logit)/2 + ...
    """
    _experts(W)
    return (W - W.mean(-2, keepdim=True)).square().sum((-2, -1))


def routing_entropy(logits: Tensor) -> Tensor:
    """Mean over tokens of the entropy of the full softmax, -sum_e p_e ln p_e, in nats: in [0, ln E].

    Source: arXiv:2606.28116 section 5. logits: (..., N, E). Returns (...). A probability of 0 adds 0; NaN or
    +Inf among the logits gives NaN. The softmax and the logarithm are taken in FP64.
    """
    _experts(logits.mT)
    return torch.special.entr(logits.double().softmax(-1)).sum(-1).mean(-1)


def topk_margin(probabilities: Tensor, top_k: int) -> Tensor:
    """Mean over tokens of the gap between the k-th and the (k+1)-th probability. (..., N, E) -> (...), in [0, 1/k].

    NaN gives NaN. Raises ValueError unless 1 <= top_k < E: with every expert chosen there is no gap.
    """
    E = probabilities.shape[-1]
    if not 1 <= top_k < E:
        raise ValueError(f"top_k={top_k} is not allowed: 1 to {E - 1}, below the number of experts")
    top = probabilities.topk(top_k + 1, dim=-1).values
    margin = top[..., top_k - 1] - top[..., top_k]
    return torch.where(probabilities.isfinite().all(-1), margin, torch.nan).mean(-1)  # topk puts a NaN first


def load_statistics(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How evenly slots fall on experts: entropy of the shares / ln E, CV = std / mean, MaxVio = max / mean - 1.

    counts: (..., E), at least one slot. Each (...): the entropy in [0, 1], 1 when even; CV (population standard
    deviation) and MaxVio in [0, E - 1], 0 when even. No slot at all, or a NaN, gives NaN.
    """
    E = counts.shape[-1]
    counts = counts.double()
    mean = counts.mean(-1)
    entropy = torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1) / math.log(E)
    return entropy, counts.std(-1, correction=0) / mean, counts.amax(-1) / mean - 1


def _experts(W: Tensor) -> int:
    if W.ndim < 2 or W.shape[-2] < 2:
        raise ValueError(f"shape {tuple(W.shape)} has no two experts")
    return W.shape[-2]


class RouterWeight:
    """The router's weight rows: ``router_weight_similarity`` (bad: up), ``router_conditioning_ratio`` (both),
    ``router_centered_norm`` (up) and its ``.entropy_proxy`` in nats (up). See the functions of this file.

    A zero row has no direction and a zero mean row no ratio: those readings are masked.
    """

    needs = Needs(roles=("router",))

    def __init__(self, every_steps: int) -> None:
        self.signals = tuple(
            Signal(name, unit, bad, PER_LAYER, every_steps, family=FAMILY)
            for name, unit, bad in (
                ("router_weight_similarity", "1", "up"),
                ("router_conditioning_ratio", "1", "both"),
                ("router_centered_norm", "1", "up"),
                ("router_centered_norm.entropy_proxy", "nats", "up"),
            )
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        W = view.anatomy.stacked("router", view.anatomy.weights()).double()
        norm, finite = centered_norm(W), W.isfinite().all(-1).all(-1)
        return {
            "router_weight_similarity": Masked(weight_similarity(W), (W == 0).all(-1).any(-1) & finite),
            "router_conditioning_ratio": Masked(conditioning_ratio(W), (W.mean(-2) == 0).all(-1)),
            "router_centered_norm": norm,
            "router_centered_norm.entropy_proxy": norm / (2 * W.shape[-2]),
        }


class RoutingProbability:
    """The router's probabilities on the training batch: ``routing_entropy`` in nats and its ``.fraction`` of ln E
    (bad: down), ``router_topk_margin`` (both; absent where every expert is chosen). See the functions of this file.
    """

    needs = Needs(view=("routings",), roles=("router",))

    def __init__(self, every_steps: int) -> None:
        self.signals = (
            Signal("routing_entropy", "nats", "down", PER_LAYER, every_steps, family=FAMILY),
            Signal("routing_entropy.fraction", "1", "down", PER_LAYER, every_steps, family=FAMILY),
            Signal("router_topk_margin", "1", "both", PER_LAYER, every_steps, family=FAMILY),
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        config = known(view.anatomy.moe, "the routers' configuration")
        entropy = routing_entropy(torch.stack([routing.logits_NE for routing in view.routings]))
        readings: dict[str, Reading] = {
            "routing_entropy": entropy,
            "routing_entropy.fraction": entropy / math.log(config.n_experts),
        }
        if config.top_k < config.n_experts:
            probabilities = torch.stack([routing.probabilities_NE for routing in view.routings])
            readings["router_topk_margin"] = topk_margin(probabilities, config.top_k)
        return readings


class ExpertLoad:
    """Where the batch's slots went. See the functions of this file.

    At every step: ``moe_drop_rate``, % of the slots over capacity (bad: up; absent without a capacity), and
    ``moe_load_balance_loss``, Switch's E sum_e f_e P_e (both). Every ``every_steps``, from the last ``window`` steps'
    counts: ``moe_util_entropy`` as a fraction of ln E, its ``.cv`` and ``.max_vio`` (both). A load is bad on either
    side: experts that fall silent make it uneven, a balance loss that outweighs the task makes it more even than the
    text is. A drop is bad on one: nothing is lost by fewer. A router whose logits are not finite has chosen nothing:
    NaN, as long as the step is in the window.
    """

    needs = Needs(view=("routings",), roles=("router",))

    def __init__(self, every_steps: int, window: int) -> None:
        if window < 1:
            raise ValueError(f"monitor.expert_load.window={window} is not allowed: at least 1 step")
        self.window, self._cadence = window, Cadence(every_steps, self.needs.jittered)
        self._counts: list[Tensor] = []
        self.signals = (
            Signal("moe_drop_rate", "%", "up", PER_LAYER, family=FAMILY, above=1.0),
            Signal("moe_load_balance_loss", "1", "both", PER_LAYER, family=FAMILY),
            Signal("moe_util_entropy", "1", "both", PER_LAYER, every_steps, family=FAMILY),
            Signal("moe_util_entropy.cv", "1", "both", PER_LAYER, every_steps, family=FAMILY),
            Signal("moe_util_entropy.max_vio", "1", "both", PER_LAYER, every_steps, family=FAMILY),
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        config = known(view.anatomy.moe, "the routers' configuration")
        counts = torch.stack([routing.counts_E for routing in view.routings])
        broken = torch.stack([routing.logits_NE.detach().sum() * 0.0 for routing in view.routings])
        self._counts = [*self._counts, counts.double() + broken[:, None]][-self.window :]
        readings: dict[str, Reading] = {
            "moe_load_balance_loss": torch.stack([routing.load_balance.detach() for routing in view.routings])
        }
        if config.capacity_factor is not None:
            dropped = torch.stack([routing.dropped for routing in view.routings])
            readings["moe_drop_rate"] = 100.0 * dropped / counts.sum(-1) + broken
        if self._cadence.is_due(view.step):
            names = ("moe_util_entropy", "moe_util_entropy.cv", "moe_util_entropy.max_vio")
            readings |= dict(zip(names, load_statistics(torch.stack(self._counts).sum(0)), strict=True))
        return readings

    def state_dict(self) -> dict[str, Sequence[Tensor]]:
        return {"counts": self._counts}

    def load_state_dict(self, state: dict[str, Sequence[Tensor]]) -> None:
        self._counts = list(state["counts"])
