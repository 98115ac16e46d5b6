"""Experts as a list of modules, as Mixtral has them in ``transformers`` before version 5."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foreshock
from tests.attaching.hugging_face import batches, model_of  # skips where transformers is not installed
from tests.attaching.test_transformers import THRESHOLD


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(*sizes, bias=False) for sizes in ((width, inner), (inner, width), (width, inner))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """A router and a list of experts, each of which is called with the tokens that chose it."""

    def __init__(self, width: int, inner: int, count: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.gate = top_k, nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(-1).topk(self.top_k, dim=-1)
        weights, out = weights / weights.sum(-1, keepdim=True), torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, place = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(tokens[token]) * weights[token, place, None])
        return out.view_as(x)


def test_routers_are_read_and_experts_have_no_laws_of_their_own():
    ratios, of_router = [], ("router_shift_residual.over_noise", "linear_euler_residual.router.over_noise")
    keep = lambda _, readings: ratios.extend(float(readings[name].max()) for name in of_router)  # noqa: E731
    model = model_of("Mixtral")
    for layer in model.model.layers:
        layer.mlp = Experts(64, 48, 4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with foreshock.attach(model, optimizer, quiet=True, every_steps=1, on_readings=keep) as watch:
        for batch in batches(3):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            watch.step(loss)
            optimizer.zero_grad()
    assert watch.stopped is None and not watch.tracebacks
    assert watch.declined.keys() == {"delta_bias_oracle", "loss_scale"}
    assert {
        "moe_util_entropy",
        "routing_entropy",
        "router_topk_margin",
        "router_weight_similarity",
    } <= watch.seen.keys()
    assert len(ratios) == 2 * 3 and max(ratios) < THRESHOLD
    assert not [name for name in watch.seen if "expert" in name]
