"""Attention that a user registers with ``AttentionInterface`` of ``transformers``: it is seen, or declines by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import foreshock
from tests.attaching.hugging_face import batches, model_of, transformers  # skips where it is not installed

OF_ATTENTION = ("attention_laws", "attention_recomputed", "attention_scores")


def grouped(q, k, v):
    """k and v with a head for each of q's."""
    times = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)


def fused(module, q, k, v, mask, scaling=None, **_):
    o = F.scaled_dot_product_attention(*grouped(q, k, v), is_causal=True, scale=scaling)
    return o.transpose(1, 2), None


def softmaxed(scores):
    return (scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)).softmax(-1)


def by_products(module, q, k, v, mask, scaling=None, **_):
    q, k, v = grouped(q, k, v)
    p = softmaxed(torch.matmul(q, k.transpose(2, 3)) * scaling)
    return torch.matmul(p, v).transpose(1, 2).contiguous(), None


def by_einsum(module, q, k, v, mask, scaling=None, **_):
    q, k, v = grouped(q, k, v)
    p = softmaxed(torch.einsum("bhqd,bhkd->bhqk", q, k) * scaling)
    return torch.einsum("bhqk,bhkd->bqhd", p, v), None


def watch_of(kernel, kind: str):
    """The watch of three steps of a model that attends by this kernel."""
    transformers.AttentionInterface.register("ours", kernel)
    model = model_of(kind, "ours")
    optimizer = torch.optim.AdamW(model.parameters())
    with foreshock.attach(model, optimizer, quiet=True, every_steps=1, monitors=["loss", "attention_*"]) as watch:
        for batch in batches(3):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            watch.step(loss)
            optimizer.zero_grad()
    assert watch.stopped is None and not watch.tracebacks
    return watch


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
@pytest.mark.parametrize("kernel", [fused, by_products])
def test_a_registered_function_of_known_parts_is_seen_with_its_predicted_rounding(kernel, kind):
    watch = watch_of(kernel, kind)
    assert not watch.declined
    assert len([name for name in watch.seen if name.endswith(".over_noise")]) == 10


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_one_of_unknown_parts_declines_until_it_is_wrapped(kind):
    declined = watch_of(by_einsum, kind).declined
    assert declined.keys() == set(OF_ATTENTION)
    assert set(declined.values()) == {"no call of attention was seen: wrap its kernel with foreshock.watched_attention"}
    watch = watch_of(foreshock.watched_attention(by_einsum, output_layout="BTHD"), kind)
    assert {"value_shift_residual", "max_attn_logit"} <= watch.seen.keys()
    assert watch.declined.keys() == {"attention_laws.over_noise", "attention_recomputed.over_noise"}
