"""The router family on closed-form cases, with more and with fewer experts than dimensions, and on a model."""

import math

import pytest
import torch

from foreshock.analysis.detect.alarms import oriented
from foreshock.models.moe import MoEConfig, Routing
from foreshock.monitors.base import Masked
from foreshock.monitors.router import (
    ExpertLoad,
    RouterWeight,
    RoutingProbability,
    centered_norm,
    conditioning_ratio,
    load_statistics,
    routing_entropy,
    topk_margin,
    weight_similarity,
)

pytestmark = pytest.mark.numeric

SHAPES = [(4, 9), (9, 4), (6, 6), (2, 1), (64, 3)]


def rows(E, M, seed=0) -> torch.Tensor:
    return torch.randn(E, M, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("shape", SHAPES)
def test_similarity_is_the_mean_of_the_pairwise_cosines(shape):
    W = rows(*shape)
    cosines = [
        float(torch.nn.functional.cosine_similarity(W[i], W[j], dim=0))
        for i in range(len(W))
        for j in range(len(W))
        if i != j
    ]
    assert weight_similarity(W).shape == ()
    assert float(weight_similarity(W)) == pytest.approx(sum(cosines) / len(cosines), abs=1e-12)


def test_similarity_of_known_rows():
    eye = torch.eye(5, dtype=torch.float64)
    assert float(weight_similarity(eye)) == pytest.approx(0.0, abs=1e-15)
    assert float(weight_similarity(torch.ones(5, 3) * torch.arange(1.0, 6.0)[:, None])) == pytest.approx(1.0)
    assert float(weight_similarity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-1.0)
    assert float(weight_similarity(eye - 0.2)) == pytest.approx(-0.25)  # a simplex: -1/(E - 1)
    assert float(weight_similarity(3.0 * eye)) == pytest.approx(0.0, abs=1e-15)
    assert weight_similarity(torch.zeros(3, 2)).isnan()


@pytest.mark.parametrize("shape", SHAPES)
def test_conditioning_is_the_farthest_row_from_the_mean(shape):
    W = rows(*shape) + 1.0
    mean = sum(W[e] for e in range(len(W))) / len(W)
    expected = max(float((W[e] - mean).norm()) for e in range(len(W))) / float(mean.norm())
    assert conditioning_ratio(W).shape == ()
    assert float(conditioning_ratio(W)) == pytest.approx(expected, rel=1e-12)


def test_conditioning_of_known_rows():
    assert float(conditioning_ratio(torch.ones(4, 3))) == 0.0
    assert float(conditioning_ratio(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))) == pytest.approx(0.5)
    assert conditioning_ratio(torch.tensor([[1.0], [-1.0]])).isinf()
    assert conditioning_ratio(torch.zeros(2, 2)).isnan()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_softmax_cannot_feel_is_not_in_the_centred_norm(shape):
    W = rows(*shape)
    assert float(centered_norm(W + rows(1, shape[1], seed=5))) == pytest.approx(float(centered_norm(W)), rel=1e-12)
    assert float(centered_norm(torch.ones(*shape))) == 0.0
    assert float(centered_norm(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))) == 10.0


def test_the_entropy_proxy_is_the_leading_fall_of_entropy_for_white_inputs():
    E, M = 8, 32
    W = 0.02 * rows(E, M)
    x = torch.randn(200_000, M, generator=torch.Generator().manual_seed(1)).double()
    fall = math.log(E) - float(routing_entropy(x @ W.T))
    assert float(centered_norm(W)) / (2 * E) == pytest.approx(fall, rel=0.02)


@pytest.mark.parametrize("E", [2, 8, 64])
def test_entropy_of_known_logits(E):
    assert float(routing_entropy(torch.zeros(5, E))) == pytest.approx(math.log(E), abs=1e-12)
    one_hot = torch.full((3, E), -torch.inf)
    one_hot[:, 0] = 0.0
    assert float(routing_entropy(one_hot)) == 0.0
    two = torch.full((3, E), -torch.inf)
    two[:, :2] = 0.0
    assert float(routing_entropy(torch.cat((two, one_hot)))) == pytest.approx(math.log(2) / 2)


def test_entropy_is_of_each_token_and_then_the_mean():
    """Tokens that are each sure of another expert have no entropy, though the mean probability is even."""
    assert float(routing_entropy(100.0 * torch.eye(4))) == pytest.approx(0.0, abs=1e-9)
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    expected = -sum(q * math.log(q) for q in p.flatten().tolist()) / 2
    assert routing_entropy(p.log() + 3.0).shape == ()
    assert float(routing_entropy(p.log() + 3.0)) == pytest.approx(expected, abs=1e-12)


def test_a_broken_logit_is_not_hidden():
    logits = torch.zeros(4, 3)
    logits[1, 2] = torch.nan
    assert routing_entropy(logits).isnan()
    logits[1, 2] = torch.inf
    assert routing_entropy(logits).isnan()


def test_margin_of_known_probabilities():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert float(topk_margin(p, 1)) == pytest.approx((0.2 + 0.7) / 2)
    assert float(topk_margin(p, 2)) == pytest.approx((0.1 + 0.0) / 2)
    with pytest.raises(ValueError, match="top_k=3 is not allowed: 1 to 2"):
        topk_margin(p, 3)


def test_load_statistics_of_known_counts():
    entropy, cv, max_vio = load_statistics(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [6, 6, 4, 4]]))
    share = -(2 * 0.3 * math.log(0.3) + 2 * 0.2 * math.log(0.2)) / math.log(4)
    assert entropy.tolist() == pytest.approx([1.0, 0.0, share])
    assert cv.tolist() == pytest.approx([0.0, math.sqrt(3), 0.2])
    assert max_vio.tolist() == pytest.approx([0.0, 3.0, 0.2])


@pytest.mark.parametrize("function", [weight_similarity, conditioning_ratio, centered_norm])
def test_one_expert_is_no_router(function):
    with pytest.raises(ValueError, match="no two experts"):
        function(torch.ones(1, 3))


MOE = MoEConfig(n_experts=4, top_k=2, capacity_factor=0.75, aux_coef=0.01)


def routings(counts=((3, 5, 4, 0), (3, 3, 3, 3)), dropped=(2, 0)) -> tuple[Routing, ...]:
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(6, 4, generator=generator) for _ in counts]
    return tuple(
        Routing(x, x.softmax(-1), torch.tensor(c), torch.tensor(d))
        for x, c, d in zip(logits, counts, dropped, strict=True)
    )


def test_the_weight_monitor_reads_every_layers_router(tiny_run):
    run = tiny_run(RouterWeight(10), moe=MOE)
    seen = RouterWeight(10).observe(run.view())
    for layer in range(2):
        W = run.past[-1][f"blocks.{layer}.mlp.router.weight"]
        assert float(seen["router_weight_similarity"].value[layer]) == pytest.approx(float(weight_similarity(W)))
        assert float(seen["router_conditioning_ratio"].value[layer]) == pytest.approx(float(conditioning_ratio(W)))
        assert float(seen["router_centered_norm"][layer]) == pytest.approx(float(centered_norm(W)))
        proxy = float(seen["router_centered_norm.entropy_proxy"][layer])
        assert proxy == pytest.approx(float(centered_norm(W)) / 8)


def test_a_zero_row_is_a_missing_sample(tiny_run):
    run = tiny_run(RouterWeight(10), moe=MOE)
    with torch.no_grad():
        run.model.blocks[1].mlp.router.weight[2] = 0.0
    similarity = RouterWeight(10).observe(run.view())["router_weight_similarity"]
    assert isinstance(similarity, Masked)
    assert similarity.undefined.tolist() == [False, True]


def test_the_routing_monitor_reads_every_layers_logits(tiny_run):
    view = tiny_run(RoutingProbability(10), moe=MOE).view(routings=routings())
    seen = RoutingProbability(10).observe(view)
    for layer, routing in enumerate(routings()):
        entropy = float(routing_entropy(routing.logits_NE))
        assert float(seen["routing_entropy"][layer]) == pytest.approx(entropy)
        assert float(seen["routing_entropy.fraction"][layer]) == pytest.approx(entropy / math.log(4))
        margin = float(topk_margin(routing.probabilities_NE, 2))
        assert float(seen["router_topk_margin"][layer]) == pytest.approx(margin)


def test_a_load_that_is_too_even_alarms_as_one_that_is_uneven():
    """Counts of eight experts against healthy ones: levelled by a balance loss, and two fallen silent."""
    names = ("moe_util_entropy", "moe_util_entropy.cv", "moe_util_entropy.max_vio")
    bad = {signal.name: signal.bad for signal in ExpertLoad(10, 10).signals}
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor([1.6, 1.3, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6])
    healthy = load_statistics(1000 * shape * (1 + 0.05 * torch.randn(200, 8, generator=generator)))
    for counts in (1000 + 50 * (shape - 1), 1000 * shape * (torch.arange(8) < 6)):
        for name, reading, band in zip(names, load_statistics(counts), healthy, strict=True):
            z = ((reading - band.mean()) / band.std()).reshape(1, 1, 1).numpy()
            assert max(side[0] for side in oriented(z, bad[name])) > 4, name


def test_the_load_monitor_counts_a_window_and_survives_a_checkpoint(tiny_run):
    run = tiny_run(moe=MOE)
    monitor = ExpertLoad(every_steps=2, window=2)
    shown = [((12, 0, 0, 0), (3, 3, 3, 3)), ((4, 4, 4, 0), (3, 3, 3, 3)), ((3, 5, 4, 0), (6, 6, 0, 0))]
    readings = []
    for counts in shown:
        run.advance()
        readings.append(monitor.observe(run.view(routings=routings(counts))))
        resumed = ExpertLoad(every_steps=2, window=2)
        resumed.load_state_dict(monitor.state_dict())
        monitor = resumed
    assert "moe_util_entropy" not in readings[0]
    assert readings[1]["moe_util_entropy"].tolist() == pytest.approx(
        load_statistics(torch.tensor([[16, 4, 4, 0], [6, 6, 6, 6]]))[0].tolist()
    )
    assert readings[1]["moe_util_entropy.max_vio"].tolist() == pytest.approx([16 / 6 - 1, 0.0])
    assert readings[2]["moe_drop_rate"].tolist() == pytest.approx([100 * 2 / 12, 0.0])
    expected = [float(r.load_balance) for r in routings(shown[2])]
    assert readings[2]["moe_load_balance_loss"].tolist() == pytest.approx(expected)


def test_a_model_that_drops_nothing_has_no_drop_rate(tiny_run):
    run = tiny_run(moe=MoEConfig(n_experts=4, top_k=2))
    assert "moe_drop_rate" not in ExpertLoad(1, 1).observe(run.view(routings=routings()))


def test_where_every_expert_is_chosen_there_is_no_margin(tiny_run):
    run = tiny_run(moe=MoEConfig(n_experts=4, top_k=4))
    assert "router_topk_margin" not in RoutingProbability(10).observe(run.view(routings=routings()))
