"""Layers whose attention has a scale or a window of its own are read each by its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import foreshock
from tests.attaching.loops import batches, gpt, nanogpt_style


def test_every_layer_is_read_at_its_own_scale_and_window():
    true = []

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for p in self.c_attn(x).chunk(3, -1))
        index = torch.arange(q.shape[-2])
        seen = (index[:, None] >= index) & (index[:, None] - index < self.window)
        scores = (self.scaling * q @ k.mT).masked_fill(~seen, -math.inf)
        true.append((scores.amax((0, 2, 3)).detach(), torch.special.entr(scores.softmax(-1)).sum(-1).mean((0, 2))))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scaling)
        return self.c_proj(o.transpose(1, 2).flatten(-2))

    model = gpt()
    for block, scaling, window in zip(model.h, (0.25, 2.5), (16, 4), strict=True):
        block.attn.__class__ = type("Attention", (nanogpt_style.Attention,), {"forward": forward})
        block.attn.scaling, block.attn.window = scaling, window
    optimizer = torch.optim.AdamW(model.parameters())
    batch = batches(1, 1)[0]
    watched = ["attention_scores", "attn_fragility"]
    with foreshock.attach(model, optimizer, quiet=True, every_steps=1, monitors=watched, alarms=False) as watch:
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        optimizer.step()
        readings = watch.step(loss)
    assert not watch.tracebacks and "attn_fragility" in readings
    largest, entropy = (torch.stack(each) for each in zip(*true, strict=True))
    torch.testing.assert_close(readings["max_attn_logit"], largest, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(readings["attn_entropy"], entropy.detach(), rtol=1e-5, atol=1e-6)
