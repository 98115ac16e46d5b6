"""Largest logit and entropy against a double loop over queries and keys."""

import math

import pytest
import torch

from foreshock.monitors.attention_scores import AttentionScores, causal_scores
from tests.rounding_bounds import FP32, gamma

pytestmark = pytest.mark.numeric


def naive(q, k) -> tuple[float, float]:
    """Largest causal score, and mean entropy in nats, of one head of some rows: (rows, T, D)."""
    largest, entropies = -math.inf, []
    for query, key in zip(q.double(), k.double(), strict=True):
        for i in range(len(query)):
            scores = [float(query[i] @ key[j]) / math.sqrt(len(query[i])) for j in range(i + 1)]
            total = sum(math.exp(s) for s in scores)
            largest = max([largest, *scores])
            entropies.append(-sum(math.exp(s) / total * (s - math.log(total)) for s in scores))
    return largest, sum(entropies) / len(entropies)


def bound(q, k):
    """Of a score, whose 8 terms are below |q| |k| / 2; and of the softmax and mean over 48 rows, a size of 1."""
    return gamma(8, FP32) * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / 2 + gamma(16 + 48, FP32)


@pytest.mark.parametrize(("rows", "chosen"), [(0, slice(None)), (1, slice(1, 2))])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_both_are_those_of_every_head_s_scores(trained_steps, rows, chosen, backend):
    monitor = AttentionScores(1, rows)
    view = trained_steps(monitor, backend=backend, init_std=0.5).next()
    got = monitor.observe(view)
    for layer, tap in enumerate(view.taps.at("dot_product").values()):
        for head in range(2):
            q, k = (tap.module.stored(x)[chosen, head] for x in tap.inputs[:2])
            largest, entropy = naive(q, k)
            assert got["max_attn_logit"][layer, head].item() == pytest.approx(largest, rel=0, abs=bound(q, k))
            assert got["attn_entropy"][layer, head].item() == pytest.approx(entropy, rel=0, abs=16 * bound(q, k))


def test_a_grouped_head_reads_its_group_s_keys_within_the_window(trained_steps):
    monitor = AttentionScores(1, 0)
    view = trained_steps(monitor, n_heads=4, n_kv_heads=2, window=5, init_std=0.5).next()
    got = monitor.observe(view)
    for layer, tap in enumerate(view.taps.at("dot_product").values()):
        q, k = (tap.module.stored(x).double() for x in tap.inputs[:2])
        for head in range(4):
            s = q[:, head] @ k[:, head // 2].mT / 2
            seen = torch.ones(16, 16, dtype=torch.bool).tril().triu(-4)
            p = s.masked_fill(~seen, -math.inf).softmax(-1)
            assert got["max_attn_logit"][layer, head].item() == pytest.approx(
                float(s[:, seen].max()), rel=0, abs=bound(q[:, head], k[:, head // 2])
            )
            assert got["attn_entropy"][layer, head].item() == pytest.approx(
                float(torch.special.entr(p).sum(-1).mean()), rel=0, abs=16 * bound(q[:, head], k[:, head // 2])
            )


def test_zero_queries_attend_evenly_and_one_huge_key_takes_all(trained_steps):
    monitor = AttentionScores(1, 0)
    run = trained_steps(monitor)
    with torch.no_grad():
        run.model.blocks[0].attention.q.weight.zero_()
    got = monitor.observe(run.next())
    even = sum(math.log(i) for i in range(1, 17)) / 16
    assert got["max_attn_logit"][0].tolist() == [0.0, 0.0]
    assert got["attn_entropy"][0].tolist() == pytest.approx(
        [even, even], rel=gamma(16 + 48 + 10, FP32)
    )  # keys, queries, logarithms
    with torch.no_grad():
        for matrix in (run.model.blocks[1].attention.q, run.model.blocks[1].attention.k):
            matrix.weight.mul_(1e4)
    got = monitor.observe(run.next())
    assert got["max_attn_logit"][1].min() > 100 and got["attn_entropy"][1].max() < 0.2


def test_a_later_key_has_no_score():
    q, k = torch.randn(2, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    scores = causal_scores(q, k)
    assert scores.shape == (2, 3, 5, 5)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    assert (scores[..., ~allowed] == -math.inf).all()
    torch.testing.assert_close(scores[..., allowed], (q @ k.mT / 2)[..., allowed], rtol=0, atol=2 * bound(q, k))


def test_nan_in_one_head_stays_there(trained_steps):
    monitor = AttentionScores(1, 0)
    run = trained_steps(monitor)
    with torch.no_grad():
        run.model.blocks[1].attention.q.weight[:8] = math.nan  # the last layer's first head
    got = monitor.observe(run.next())
    for name in ("max_attn_logit", "attn_entropy"):
        assert got[name].isnan().tolist() == [[False, False], [True, False]]
