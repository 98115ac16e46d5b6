"""The mixture of experts against a dense FP64 reference that runs every expert on every token."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from foreshock.models.moe import MoE, MoEConfig, auxiliary_loss
from foreshock.models.transformer import PARAMETER_GROUPS, Transformer, TransformerConfig, parameter_group
from tests.rounding_bounds import FP32, gamma

pytestmark = pytest.mark.numeric

M, FF, B, T = 16, 24, 3, 7
ROUNDINGS = 200
"""On the longest way: forward and backward of products of 16, 24 and 6 terms, sums over 21 tokens and two places."""
BASE = MoEConfig(n_experts=6, top_k=2)
VARIANTS = {
    "plain": BASE,
    "gates as they are": dataclasses.replace(BASE, renormalise=False),
    "top-1": MoEConfig(5, 1, renormalise=False),
    "every expert": dataclasses.replace(BASE, top_k=6),
    "tight capacity": dataclasses.replace(BASE, capacity_factor=0.6),
    "one slot an expert": dataclasses.replace(BASE, capacity_factor=1e-6),
    "loose capacity": dataclasses.replace(BASE, capacity_factor=6.0),
    "shared expert": dataclasses.replace(BASE, shared_d_ff=8),
    "balancing bias": dataclasses.replace(BASE, bias_update_speed=1e-3),
}


def layer(config=BASE, kind="gelu", seed=0) -> MoE:
    moe, generator = MoE(M, FF, kind, config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
        if moe.balance_bias is not None:
            moe.balance_bias.normal_(0.0, 0.3, generator=generator)
    return moe


def tokens(seed=1, B=B) -> torch.Tensor:
    return torch.randn(B, T, M, generator=torch.Generator().manual_seed(seed))


def dense_reference(moe: MoE, x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every expert on every token, a token's share zero where it did not choose the expert or came too late."""
    c = moe.config
    x = x.flatten(0, 1)
    p = (x @ w["router.weight"].T).softmax(-1)
    bias = w.get("balance_bias", torch.zeros(c.n_experts, dtype=torch.float64))
    gates, taken = torch.zeros_like(p), [0] * c.n_experts
    limit = math.inf if c.capacity_factor is None else math.ceil(c.capacity_factor * len(x) * c.top_k / c.n_experts)
    rows = []
    for n in range(len(x)):
        chosen = sorted(range(c.n_experts), key=lambda e: -(p[n] + bias)[e].item())[: c.top_k]
        total = sum(p[n, e] for e in chosen) if c.renormalise else 1.0
        row = [torch.zeros((), dtype=torch.float64)] * c.n_experts
        for e in chosen:
            if taken[e] < limit:
                row[e] = p[n, e] / total
            taken[e] += 1
        rows.append(torch.stack(row))
    gates = torch.stack(rows)

    def expert(hidden, gate):
        return F.gelu(hidden) if gate is None else F.silu(gate) * hidden

    y = torch.zeros_like(x)
    for e in range(c.n_experts):
        gate = x @ w["gate.weight"][e] if "gate.weight" in w else None
        y = y + gates[:, e : e + 1] * (expert(x @ w["input.weight"][e], gate) @ w["output.weight"][e])
    if c.shared_d_ff:
        gate = x @ w["shared.gate.weight"].T if "shared.gate.weight" in w else None
        y = y + expert(x @ w["shared.input.weight"].T, gate) @ w["shared.output.weight"].T
    return y.view(-1, T, M)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_are_those_of_every_expert_in_fp64(variant, kind):
    moe, x = layer(VARIANTS[variant], kind), tokens().requires_grad_()
    y, _ = moe(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * direction).sum().backward()

    x64 = x.detach().double().requires_grad_()
    w64 = {name: tensor.detach().double().requires_grad_() for name, tensor in moe.state_dict().items()}
    y64 = dense_reference(moe, x64, w64)
    (y64 * direction.double()).sum().backward()
    got = {"y": y, "x": x.grad} | {name: parameter.grad for name, parameter in moe.named_parameters()}
    right = {"y": y64, "x": x64.grad} | {name: w64[name].grad for name in got if name in w64}
    for name, exact in right.items():
        assert (got[name] - exact).norm() <= gamma(ROUNDINGS, FP32) * exact.norm(), name


def test_counts_and_drops_are_those_of_a_hand_count():
    config = MoEConfig(n_experts=4, top_k=2, capacity_factor=0.5)
    moe = layer(config)
    x = tokens()
    _, routing = moe(x)
    chosen = (x.flatten(0, 1) @ moe.router.weight.T).topk(2).indices
    counts = torch.bincount(chosen.flatten(), minlength=4)
    capacity = math.ceil(0.5 * B * T * 2 / 4)
    assert config.capacity(B * T) == capacity
    assert torch.equal(routing.counts_E, counts)
    assert int(routing.dropped) == int((counts - capacity).clamp_min(0).sum()) > 0


def test_a_dropped_token_is_left_to_the_residual_stream():
    """Capacity 1: of identical tokens only the first is served."""
    moe = layer(dataclasses.replace(BASE, capacity_factor=1e-6))
    same = tokens()[:1, :1].expand(1, T, M)
    y, routing = moe(same)
    assert y[0, 0].abs().min() > 0
    assert torch.equal(y[0, 1:], torch.zeros(T - 1, M))
    assert int(routing.dropped) == 2 * (T - 1)


def test_a_tokens_fate_never_depends_on_later_tokens_of_its_sequence():
    moe = layer(dataclasses.replace(BASE, capacity_factor=0.5))
    x, changed = tokens(B=1), tokens(B=1)
    changed[0, 4:] = tokens(seed=9, B=1)[0, 4:]
    torch.testing.assert_close(moe(x)[0][0, :4], moe(changed)[0][0, :4], rtol=0, atol=2 * gamma(ROUNDINGS, FP32))


@pytest.mark.parametrize("config", [BASE, dataclasses.replace(BASE, capacity_factor=0.7)])
def test_an_expert_that_nobody_chooses_costs_and_learns_nothing(config):
    moe = layer(config)
    with torch.no_grad():
        moe.router.weight[[1, 4], 0] = -100.0
    x = tokens()
    x[..., 0] = 5.0
    y, routing = moe(x)
    y.square().sum().backward()
    assert routing.counts_E[[1, 4]].tolist() == [0, 0]
    assert all((moe.input.weight.grad[e] == 0).all() == (routing.counts_E[e] == 0) for e in range(6))
    assert torch.isfinite(y).all()


def test_the_load_balance_loss_is_one_when_balanced_and_e_when_one_expert_takes_all():
    moe = layer(MoEConfig(4, 1, renormalise=False))
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, :4] = 1000.0 * torch.eye(4)
    even = torch.zeros(1, 4, M)
    even[0, :, :4] = torch.eye(4)
    assert float(moe(even)[1].load_balance) == pytest.approx(1.0)
    assert float(moe(even[:, :1].expand(1, 4, M))[1].load_balance) == pytest.approx(4.0)


def test_the_auxiliary_loss_is_the_sum_over_layers_with_its_coefficients():
    config = dataclasses.replace(BASE, aux_coef=0.02, z_coef=0.003)
    routings = [layer(config, seed=s)(tokens())[1] for s in (0, 1)]
    x = tokens().flatten(0, 1).double()
    expected = {0.0: 0.0, 1.0: 0.0, 2.5: 0.0}
    for seed in (0, 1):
        logits = x @ layer(config, seed=seed).router.weight.double().T
        p = logits.softmax(-1)
        f = torch.bincount(logits.topk(2).indices.flatten(), minlength=6).double() / (2 * len(x))
        balance, z = 6 * (f * p.mean(0)).sum(), logits.logsumexp(-1).square().mean()
        for scale in expected:
            expected[scale] += float(scale * 0.02 * balance + 0.003 * z)
    for scale, value in expected.items():
        assert float(auxiliary_loss(routings, config, scale)) == pytest.approx(value, rel=gamma(ROUNDINGS, FP32))


def test_the_bias_chooses_and_does_not_weigh_and_follows_the_load():
    config = dataclasses.replace(BASE, bias_update_speed=0.5)
    moe, plain = layer(config), layer(BASE)
    with torch.no_grad():
        moe.balance_bias.zero_()
    plain.load_state_dict({k: v for k, v in moe.state_dict().items() if k != "balance_bias"})
    y, routing = moe(tokens())
    assert torch.equal(y, plain(tokens())[0])
    mean = routing.counts_E.float().mean()
    moe.update_balance(routing, 1.0)
    assert torch.equal(moe.balance_bias, 0.5 * (mean - routing.counts_E).sign())
    before = moe.balance_bias.clone()
    moe.update_balance(routing, 0.0)
    assert torch.equal(moe.balance_bias, before)
    assert "balance_bias" not in dict(moe.named_parameters())


def test_the_bias_balances_the_load_in_time():
    moe = layer(dataclasses.replace(BASE, bias_update_speed=0.01))
    with torch.no_grad():
        moe.balance_bias.zero_()
        moe.router.weight *= 0.3
        moe.router.weight[0] += 0.1
    x = tokens(B=20) + 0.5
    even = x.shape[0] * T * 2 / 6
    first = moe(x)[1].counts_E
    for _ in range(200):
        moe.update_balance(moe(x)[1], 1.0)
    assert first.max() > 1.4 * even
    assert moe(x)[1].counts_E.max() < 1.1 * even


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_experts": 1}, "model.moe.n_experts=1 is not allowed: 2 to 4096"),
        ({"top_k": 7}, "model.moe.top_k=7 is not allowed: 1 to n_experts=6"),
        ({"top_k": 0}, "model.moe.top_k=0"),
        ({"top_k": 1}, "model.moe.renormalise=True with model.moe.top_k=1"),
        ({"capacity_factor": 0.0}, "model.moe.capacity_factor=0.0 is not allowed: above 0, or null"),
        ({"capacity_factor": -1.0}, "model.moe.capacity_factor=-1.0"),
        ({"bias_update_speed": 0.0}, "model.moe.bias_update_speed=0.0"),
        ({"aux_coef": -0.1}, "model.moe.aux_coef=-0.1 is not allowed: 0 or more"),
        ({"z_coef": math.inf}, "model.moe.z_coef=inf"),
        ({"shared_d_ff": 0}, "model.moe.shared_d_ff=0"),
    ],
)
def test_an_impossible_config_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


SHAPE = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 8, "context_length": 6, "vocab_size": 11}


def model(moe=BASE, **changes) -> Transformer:
    return Transformer(TransformerConfig(**SHAPE, moe=moe, **changes)).initialise(torch.Generator().manual_seed(0))


def batch() -> torch.Tensor:
    return torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(3))


def test_the_objective_adds_the_routers_losses_to_the_same_nll():
    net = model(dataclasses.replace(BASE, aux_coef=0.1))
    nll, auxiliary, routings = net(batch())
    assert torch.equal(nll, net.loss(batch()))
    assert len(routings) == 2
    assert float(auxiliary) == pytest.approx(sum(0.1 * float(r.load_balance) for r in routings), rel=gamma(4, FP32))
    assert float(net(batch(), balance_scale=0.0)[1]) == 0.0


def test_a_dense_model_has_no_routers():
    _, auxiliary, routings = model(None)(batch())
    assert float(auxiliary) == 0.0 and routings == ()
    model(None).update_balance(routings, 1.0)


def test_two_of_half_the_width_have_the_active_parameters_of_the_dense_model():
    dense, sparse = model(None), model(BASE)
    matrices = ("mlp.input.weight", "mlp.output.weight")
    experts = sum(p.numel() for n, p in sparse.named_parameters() if n.endswith(matrices))
    mlps = sum(p.numel() for n, p in dense.named_parameters() if ".mlp." in n)
    assert experts * BASE.top_k / BASE.n_experts == 2 * mlps  # d_ff is each expert's


def test_residual_outputs_start_small_and_everything_is_drawn():
    net = model(dataclasses.replace(BASE, shared_d_ff=64), mlp="swiglu")
    for name, parameter in net.named_parameters():
        if parameter.ndim >= 2:
            residual = name.endswith(("attention.o.weight", "mlp.output.weight", "mlp.shared.output.weight"))
            assert float(parameter.std()) == pytest.approx(0.02 / (2.0 if residual else 1.0), rel=0.25), name


def test_every_parameter_belongs_to_a_group():
    names = [name for name, _ in model(qk_norm=True, tie_embeddings=False).named_parameters()]
    groups = {name: parameter_group(name) for name in names}
    assert set(groups.values()) == set(PARAMETER_GROUPS)
    assert groups["blocks.0.mlp.router.weight"] == "router"
    assert groups["blocks.1.mlp.input.weight"] == groups["blocks.1.mlp.output.weight"] == "mlp"
    assert groups["blocks.0.attention.q_norm.weight"] == "attention"
    assert groups["blocks.0.attention_norm.weight"] == groups["final_norm.bias"] == "norm"
    assert groups["head.weight"] == groups["tokens.weight"] == groups["positions.weight"] == "embedding"
