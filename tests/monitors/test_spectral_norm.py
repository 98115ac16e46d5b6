"""Spectral norms of W_Q and W_K, head by head, against an SVD."""

import math

import pytest
import torch

from foreshock.monitors.spectral_norm import SpectralNorm

pytestmark = pytest.mark.numeric


def test_each_head_has_its_largest_singular_value(tiny_run):
    monitor = SpectralNorm(1)
    run = tiny_run(monitor)
    view = run.advance(lambda name, w: w * math.nan if name == "blocks.1.attention.k.weight" else None)
    got = monitor.observe(view)
    assert set(got) == {signal.name for signal in monitor.signals}
    for matrix in "qk":
        for layer in range(2):
            blocks = run.past[-1][f"blocks.{layer}.attention.{matrix}.weight"].unflatten(0, (2, 8))
            if matrix == "k" and layer == 1:
                assert got["spectral_radius.k"][1].isnan().all()
                continue
            expected = torch.linalg.svdvals(blocks)[:, 0]
            torch.testing.assert_close(got[f"spectral_radius.{matrix}"][layer], expected, rtol=1e-7, atol=0)


def test_key_heads_are_those_that_there_are(tiny_run):
    run = tiny_run(n_heads=4, n_kv_heads=2)
    got = SpectralNorm(1).observe(run.view())
    for matrix, heads in (("q", 4), ("k", 2)):
        for layer in range(2):
            blocks = run.past[-1][f"blocks.{layer}.attention.{matrix}.weight"].unflatten(0, (heads, 4))
            expected = torch.linalg.svdvals(blocks)[:, 0]
            torch.testing.assert_close(got[f"spectral_radius.{matrix}"][layer], expected, rtol=1e-7, atol=0)


def test_a_rank_one_update_moves_the_norm_of_its_head_alone(tiny_run):
    monitor = SpectralNorm(1)
    run = tiny_run(monitor)
    before = monitor.observe(run.view())["spectral_radius.q"]
    rank_one = torch.zeros(16, 16)
    rank_one[8:] = torch.outer(torch.ones(8) / 8**0.5, torch.ones(16) / 4)

    def drift(name, weight):
        return weight + 3.0 * rank_one if name == "blocks.0.attention.q.weight" else None

    after = monitor.observe(run.advance(drift))["spectral_radius.q"]
    assert abs(after[0, 1].item() - 3.0) < before[0, 1].item()
    assert torch.equal(after[1], before[1]) and after[0, 0] == before[0, 0]
