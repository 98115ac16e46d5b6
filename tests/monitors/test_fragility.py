"""Attention's condition numbers against dense Jacobians and singular values."""

import math

import pytest
import torch

from foreshock.monitors.attention_scores import causal_scores
from foreshock.monitors.fragility import (
    AttentionFragility,
    score_condition,
    softmax_condition,
    softmax_jacobian_norm,
    value_condition,
)

pytestmark = pytest.mark.numeric


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def jacobian(p):
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


@pytest.mark.parametrize("sharpness", [0.0, 0.1, 1.0, 5.0, 50.0])
def test_the_jacobian_s_norm_is_its_largest_eigenvalue(sharpness):
    p = (sharpness * draw(20, 9)).softmax(-1)
    expected = torch.linalg.eigvalsh(jacobian(p))[:, -1]
    torch.testing.assert_close(softmax_jacobian_norm(p), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("p", "norm"),
    [
        ([1.0, 0.0, 0.0], 0.0),
        ([0.5, 0.5, 0.0], 0.5),  # the largest there is
        ([0.25] * 4, 0.25),
        ([0.7, 0.3], 0.42),  # 2 p (1 - p)
    ],
)
def test_jacobians_of_known_norm(p, norm):
    assert softmax_jacobian_norm(torch.tensor(p).double()).item() == pytest.approx(norm, abs=1e-7)


def test_softmax_condition_is_that_of_the_worst_query():
    scores = causal_scores(3 * draw(2, 6, 4), draw(2, 6, 4, seed=1))
    for one, got in zip(scores, softmax_condition(scores), strict=True):
        queries = []
        for i in range(6):
            seen = one[i, : i + 1]
            p = seen.softmax(0)
            queries.append(float(torch.linalg.matrix_norm(jacobian(p), 2) * seen.norm() / p.norm()))
        assert got.item() == pytest.approx(max(queries), rel=1e-8)


@pytest.mark.parametrize("tokens", [3, 4, 9])
def test_score_condition_is_the_ratio_of_spectral_norms(tokens):
    q, k = draw(5, tokens, 4), draw(5, tokens, 4, seed=1)
    norm = torch.linalg.matrix_norm
    torch.testing.assert_close(score_condition(q, k), norm(q, 2) * norm(k, 2) / norm(q @ k.mT, 2), rtol=1e-7, atol=0)
    torch.testing.assert_close(score_condition(q, q), torch.ones(5).double(), rtol=1e-7, atol=0)


def with_singular_values(values, tokens, seed):
    left, right = (torch.linalg.qr(draw(n, n, seed=2 * seed + i)).Q for i, n in enumerate((tokens, len(values))))
    return left[:, : len(values)] @ torch.diag(torch.tensor(values).double()) @ right


@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e9, 1e12])
def test_a_full_rank_condition_is_right_however_large(kappa):
    v = torch.stack([with_singular_values([kappa, 3.0, 2.0, 1.0], 9, seed) for seed in range(20)])
    torch.testing.assert_close(value_condition(v), torch.full((20,), max(kappa, 3.0)).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("tokens", [3, 4, 9, 64])
def test_a_rank_deficient_condition_is_that_of_its_rank_every_time(tokens):
    """Equal rows, columns that add up, or a rank-one product: never Inf, never a number that rounding made."""
    for seed in range(20):
        base = draw(tokens, 4, seed=seed)
        equal = base[:3].repeat(3, 1)
        summed = torch.cat((base, base[:, :1] + base[:, 1:2]), 1)
        rank_one = base[:, :1] @ base[:1]
        for v, expected in ((equal, None), (summed, None), (rank_one, 1.0)):
            values = torch.linalg.svdvals(v)
            kept = values[values > 1e-10 * values[0]]
            assert len(kept) < min(v.shape) or min(v.shape) == tokens
            assert value_condition(v).item() == pytest.approx(expected or float(kept[0] / kept[-1]), rel=1e-6)


def test_orthogonal_queries_and_keys_read_as_the_largest_ratio_that_is_resolved():
    largest = 1 / math.sqrt(9 * torch.finfo(torch.float64).eps)
    for seed in range(20):
        q, k = draw(9, 4, seed=seed), draw(9, 4, seed=seed + 20)
        basis = torch.linalg.qr(draw(4, 4, seed=seed + 40)).Q
        q, k = q @ basis[:, :2] @ basis[:, :2].mT, k @ basis[:, 2:] @ basis[:, 2:].mT
        assert score_condition(q, k).item() == pytest.approx(largest)


def test_healthy_rope_and_a_context_of_one_token_have_finite_readings(trained_steps):
    for changes in ({"positions": "rope", "norm": "rmsnorm", "context_length": 32}, {"context_length": 1}):
        monitor = AttentionFragility(1, 0)
        run = trained_steps(monitor, init_std=0.3, **changes)
        for _ in range(5):
            got = monitor.observe(run.next())
            assert got["attn_fragility"].value.isfinite().all() and not got["attn_fragility"].undefined.any()
            assert ((got["attn_fragility"].value == 0) == (changes["context_length"] == 1)).all()


def test_a_nan_in_one_row_is_not_hidden_by_the_zeros_of_another(trained_steps):
    monitor = AttentionFragility(1, 0)
    run = trained_steps(monitor, init_std=0.3)
    view = run.next()
    for tap in view.taps.at("dot_product").values():
        tap.inputs[2][0] = 0.0
        tap.inputs[2][1, 1, 0, 0] = math.nan
    got = monitor.observe(view)["attn_fragility"]
    assert got.undefined[:, 0].all() and not got.undefined[:, 1].any() and got.value[:, 1].isnan().all()


def test_the_reading_is_the_product_of_its_factors(trained_steps):
    monitor = AttentionFragility(1, 0)
    run = trained_steps(monitor, init_std=0.3)
    view = run.next()
    got = monitor.observe(view)
    for layer, (tap, block) in enumerate(zip(view.taps.at("dot_product").values(), run.model.blocks, strict=True)):
        for head in range(2):
            w_o = block.attention.o.weight.detach().double()[:, 8 * head : 8 * head + 8]
            rows = []
            for row in range(3):
                q, k, v = (tap.module.stored(x)[row, head].double() for x in tap.inputs)
                product = softmax_condition(causal_scores(q, k)) * (1 + score_condition(q, k))
                rows.append(float(product * torch.linalg.cond(v) * torch.linalg.matrix_norm(w_o, 2)))
            assert got["attn_fragility"].value[layer, head].item() == pytest.approx(max(rows), rel=1e-4)


def test_a_grouped_head_has_the_keys_and_values_of_its_group(trained_steps):
    monitor = AttentionFragility(1, 1)
    run = trained_steps(monitor, init_std=0.3, n_heads=4, n_kv_heads=2, window=6)
    view = run.next()
    got = monitor.observe(view)
    for layer, (tap, block) in enumerate(zip(view.taps.at("dot_product").values(), run.model.blocks, strict=True)):
        q, k, v = (tap.module.stored(x)[1].double() for x in tap.inputs)
        for head in range(4):
            w_o = block.attention.o.weight.detach().double()[:, 4 * head : 4 * head + 4]
            key, value = k[head // 2], v[head // 2]
            product = softmax_condition(causal_scores(q[head], key, 6)) * (1 + score_condition(q[head], key))
            expected = float(product * torch.linalg.cond(value) * torch.linalg.matrix_norm(w_o, 2))
            assert got["attn_fragility"].value[layer, head].item() == pytest.approx(expected, rel=1e-4)


def test_the_softmax_maximum_never_falls_and_survives_a_checkpoint(trained_steps):
    monitor = AttentionFragility(1, 1)
    run = trained_steps(monitor, init_std=0.3)
    first, second = (monitor.observe(run.next()) for _ in range(2))
    largest = torch.maximum(first["attn_fragility.softmax"], second["attn_fragility.softmax"])
    assert torch.equal(second["attn_fragility.softmax_max"], largest)
    resumed = AttentionFragility(1, 1)
    resumed.load_state_dict(monitor.state_dict())
    view = run.next()
    kept, found = (one.observe(view)["attn_fragility.softmax_max"] for one in (monitor, resumed))
    assert torch.equal(kept, found) and (kept >= largest).all()


def test_zero_values_have_no_condition(trained_steps):
    monitor = AttentionFragility(1, 0)
    run = trained_steps(monitor, init_std=0.3)
    with torch.no_grad():
        run.model.blocks[0].attention.v.weight[:8] = 0.0
    got = monitor.observe(run.next())
    assert got["attn_fragility"].undefined.tolist() == [[True, False], [False, False]]
    assert got["attn_fragility"].value[~got["attn_fragility"].undefined].isfinite().all()
    assert got["attn_fragility.softmax_max"].isfinite().all()


def test_nan_is_a_reading_and_stays_in_the_maximum(trained_steps):
    monitor = AttentionFragility(1, 0)
    run = trained_steps(monitor, init_std=0.3)
    healthy = monitor.observe(run.next())
    with torch.no_grad():
        run.model.blocks[1].attention.k.weight[8:] = math.nan  # the last layer's second head
    broken = monitor.observe(run.next())
    assert broken["attn_fragility.softmax"].isnan().tolist() == [[False, False], [False, True]]
    assert broken["attn_fragility"].value[1, 1].isnan() and not broken["attn_fragility"].undefined.any()
    assert healthy["attn_fragility.softmax_max"].isfinite().all()
    assert broken["attn_fragility.softmax_max"][1, 1].isnan()
