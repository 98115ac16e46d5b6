"""The transformer against a second, functional FP64 forward; its variants, symmetries, sizes and fault plumbing."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import yaml

from foreshock.models.moe import MoEConfig
from foreshock.models.numerics import HEALTHY, AttentionNumerics, SiteFault
from foreshock.models.transformer import Rotary, Transformer, TransformerConfig
from tests.rounding_bounds import FP32, gamma

pytestmark = pytest.mark.numeric

CONF = Path(__file__).parents[2] / "conf" / "model"
SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "context_length": 12, "vocab_size": 19}
VARIANTS = [
    dict(zip(("norm", "positions", "mlp", "tie_embeddings", "qk_norm"), chosen, strict=True))
    for chosen in itertools.product(
        ("layernorm", "rmsnorm"), ("learned", "rope"), ("gelu", "swiglu"), (True, False), (True, False)
    )
] + [
    {"n_kv_heads": 2},
    {"n_kv_heads": 1, "window": 4, "positions": "rope", "qk_norm": True},
    {"window": 5, "norm": "rmsnorm", "mlp": "swiglu"},
]


def config(**changes) -> TransformerConfig:
    return TransformerConfig(**SHAPE | changes)


def model(seed=0, **changes) -> Transformer:
    return Transformer(config(**changes)).initialise(torch.Generator().manual_seed(seed))


def perturbed(**changes) -> Transformer:
    """A model far from its initialisation, so that no norm is the identity and attention is not uniform."""
    net, generator = model(**changes), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return net


def batch(B=3, T=12, seed=0) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def fp64_logits(net: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """The forward pass written from the papers, in FP64, a head at a time."""
    c = net.config
    w = {name: tensor.double() for name, tensor in net.state_dict().items()}
    T, D = tokens.shape[1], c.d_head

    def norm(x, name):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def rotate(x):  # halves as real and imaginary parts
        if c.positions == "learned":
            return x
        frequency = c.rope_base ** (-2 * torch.arange(D // 2).double() / D)
        turn = torch.exp(1j * torch.arange(T).double()[:, None] * frequency)
        z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return torch.cat((z.real, z.imag), -1)

    x = w["tokens.weight"][tokens]
    if c.positions == "learned":
        x = x + w["positions.weight"][:T]
    for layer in range(c.n_layers):
        block, normed = f"blocks.{layer}", norm(x, f"blocks.{layer}.attention_norm")
        for head in range(c.n_heads):
            rows = slice(head * D, (head + 1) * D)
            group = head // (c.n_heads // (c.n_kv_heads or c.n_heads))
            q = normed @ w[f"{block}.attention.q.weight"][rows].T
            k, v = (normed @ w[f"{block}.attention.{m}.weight"][group * D : group * D + D].T for m in "kv")
            if c.qk_norm:
                q, k = norm(q, f"{block}.attention.q_norm"), norm(k, f"{block}.attention.k_norm")
            s = rotate(q) @ rotate(k).mT / math.sqrt(D)
            distance = torch.arange(T)[:, None] - torch.arange(T)
            p = s.masked_fill((distance < 0) | (distance >= (c.window or T)), -math.inf).softmax(-1)
            x = x + p @ v @ w[f"{block}.attention.o.weight"][:, rows].T
        normed = norm(x, f"{block}.mlp_norm")
        hidden = normed @ w[f"{block}.mlp.input.weight"].T
        if c.mlp == "gelu":
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        else:
            gate = normed @ w[f"{block}.mlp.gate.weight"].T
            hidden = hidden * gate * torch.sigmoid(gate)
        x = x + hidden @ w[f"{block}.mlp.output.weight"].T
    head = w["tokens.weight"] if c.tie_embeddings else w["head.weight"]
    return norm(x, "final_norm") @ head.T


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({field: 0}, f"model.{field}=0 ") for field in ("d_model", "n_layers", "n_heads", "d_ff", "context_length")),
        ({"vocab_size": 1}, "model.vocab_size=1 "),
        ({"norm": "batchnorm"}, "model.norm='batchnorm' .*layernorm, rmsnorm"),
        ({"positions": "alibi"}, "model.positions='alibi' .*learned, rope"),
        ({"mlp": "relu"}, "model.mlp='relu' .*gelu, swiglu"),
        ({"backend": "flash"}, "model.backend='flash' .*auto, reference, triton, sdpa"),
        ({"n_heads": 5}, "model.d_model=32 is not divisible by model.n_heads=5"),
        ({"n_kv_heads": 3}, "model.n_heads=4 is not divisible by model.n_kv_heads=3"),
        ({"n_kv_heads": 8}, "model.n_heads=4 is not divisible by model.n_kv_heads=8"),
        ({"n_kv_heads": 0}, "model.n_kv_heads=0 is not allowed: at least 1, or null for n_heads"),
        ({"window": 0}, "model.window=0 is not allowed: at least 1, or null for every earlier key"),
        ({"d_model": 12, "positions": "rope"}, "even d_head, got 3"),
        ({"query_init_std": -0.1}, "model.query_init_std=-0.1 is not allowed: from 0"),
        ({"query_init_std": math.nan}, "model.query_init_std=nan is not allowed: from 0"),
    ],
)
def test_an_impossible_config_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_a_model_needs_its_vocabulary():
    assert config(vocab_size=None).vocab_size is None
    with pytest.raises(ValueError, match=r"model\.vocab_size=null"):
        Transformer(config(vocab_size=None))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_fp64_forward(variant):
    """FP32 all the way (sdpa): an error of FP32 size leaves no room for a wrong head, norm or angle."""
    net = perturbed(**variant, backend="sdpa")
    expected = fp64_logits(net, batch())
    error = (net.logits(batch()).double() - expected).norm() / expected.norm()
    assert error < 1e-5


@pytest.mark.parametrize("variant", VARIANTS[::5])
def test_the_fault_site_backend_differs_by_bf16_rounding_only(variant):
    net = perturbed(**variant)
    expected = fp64_logits(net, batch())
    error = (net.logits(batch()).double() - expected).norm() / expected.norm()
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_at_initialisation_is_that_of_guessing(variant):
    assert model(**variant).loss(batch(8)).item() == pytest.approx(math.log(SHAPE["vocab_size"]), abs=0.05)


def test_loss_is_the_mean_next_token_nll():
    net, tokens = perturbed(), batch(T=9)
    logits = net.logits(tokens[:, :-1]).double()
    nll = [-logits[b, t].log_softmax(-1)[tokens[b, t + 1]] for b, t in itertools.product(range(3), range(8))]
    assert net.loss(tokens).item() == pytest.approx(
        torch.stack(nll).mean().item(), rel=gamma(50, FP32)
    )  # 24 tokens, softmax


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_causal(variant, backend):
    """The gradient of the logits at t with respect to later embeddings is exactly zero."""
    net, t, embedded = perturbed(**variant, backend=backend), 5, []
    net.tokens.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    logits = net.logits(batch())
    (gradient,) = torch.autograd.grad(logits[:, t].square().sum(), embedded)
    per_token = gradient.abs().amax(-1)
    assert (per_token[:, t + 1 :] == 0).all() and (per_token[:, : t + 1] > 0).all()


def test_rotated_scores_depend_on_the_distance_alone():
    """score(i, j) = Re sum_f q_f conj(k_f) exp(i theta_f (i - j)), halves as real and imaginary parts."""
    T, D, base = 40, 16, 10000.0
    q, k = torch.randn(2, D, generator=torch.Generator().manual_seed(0))
    rotary = Rotary(D, T, base)
    scores = (rotary(q.expand(T, D)) @ rotary(k.expand(T, D)).T).double()
    distance = torch.arange(T)[:, None] - torch.arange(T)
    theta = base ** (-2 * torch.arange(D // 2).double() / D)
    z = torch.complex(*q.double().chunk(2)) * torch.complex(*k.double().chunk(2)).conj()
    expected = (z * torch.exp(1j * distance[..., None] * theta)).real.sum(-1)
    size = float(q.norm() * k.norm())  # 16 terms; an angle below 40 is rounded, and its frequency
    torch.testing.assert_close(scores, expected, rtol=0, atol=gamma(16 + 2 * 2 * T, FP32) * size)
    assert expected.std() > 0.5


def test_rotation_starts_at_the_identity_and_keeps_the_norm():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    rotated = Rotary(16, 8, 10000.0)(x)
    assert torch.equal(rotated[0], x[0]) and not torch.isclose(rotated[1:], x[1:]).all()
    torch.testing.assert_close(
        rotated.norm(dim=-1), x.norm(dim=-1), rtol=2 * gamma(16 + 6, FP32), atol=0
    )  # 16 squares, cos and sin


def test_rotary_tables_are_not_saved():
    assert not [name for name in model(positions="rope").state_dict() if "rotary" in name]


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_head_shares_its_storage(tie):
    net = model(tie_embeddings=tie)
    assert (net.head.weight.data_ptr() == net.tokens.weight.data_ptr()) is tie
    assert (net.head.weight is net.tokens.weight) is tie
    assert len([name for name, _ in net.named_parameters() if name in ("head.weight", "tokens.weight")]) == 2 - tie


def load(name) -> dict:
    """The fields that a model file gives, those of the file it builds on included."""
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    for base in node.pop("defaults", []):
        node = {"_target_": "models.transformer.TransformerConfig"} | load(base) | node
    assert node.pop("_target_") == "models.transformer.TransformerConfig"
    if isinstance(node["moe"], dict):
        assert node["moe"].pop("_target_") == "models.moe.MoEConfig"
        assert set(node["moe"]) == {field.name for field in dataclasses.fields(MoEConfig)}
        node["moe"] = MoEConfig(**node["moe"])
    return node


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_model_file_spells_out_the_whole_config(name):
    node = load(name)
    assert set(node) == {field.name for field in dataclasses.fields(TransformerConfig)}
    TransformerConfig(**node)


def closed_form_size(c: TransformerConfig) -> int:
    E, D = c.d_model, c.d_head
    attention = 2 * E * E + 2 * E * D * (c.n_kv_heads or c.n_heads)
    per_norm = 2 if c.norm == "layernorm" else 1
    experts = c.moe.n_experts if c.moe else 1
    mlp = experts * (3 if c.mlp == "swiglu" else 2) * E * c.d_ff + (E * c.moe.n_experts if c.moe else 0)
    block = attention + mlp + per_norm * (2 * E + (2 * D if c.qk_norm else 0))
    embeddings = c.vocab_size * E * (1 if c.tie_embeddings else 2) + (
        c.context_length * E if c.positions == "learned" else 0
    )
    return embeddings + c.n_layers * block + per_norm * E


@pytest.mark.parametrize(
    ("name", "size", "tolerance"), [("gpt2_124m", 124e6, 0.005), ("paper", 1.16e9, 0.002), ("moe_paper", 9.65e9, 0.001)]
)
def test_published_sizes(name, size, tolerance):
    with torch.device("meta"):
        net = Transformer(TransformerConfig(**load(name)).on(torch.device("cpu")))
    assert {tensor.device.type for tensor in (*net.parameters(), *net.buffers())} == {"meta"}
    counted = sum(parameter.numel() for parameter in net.parameters())
    assert counted == closed_form_size(net.config)
    assert counted == pytest.approx(size, rel=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_has_weights_that_the_closed_form_lacks(variant):
    net = Transformer(config(**variant))
    assert sum(parameter.numel() for parameter in net.parameters()) == closed_form_size(net.config)


def test_initialisation_is_a_function_of_the_seed():
    one, same, other = (model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].ndim > 1)


def test_initialisation_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    net = Transformer(config())
    before = torch.get_rng_state()
    net.initialise(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_scales():
    """Sample standard deviations of n numbers, within 5 of their standard errors 1/sqrt(2n)."""
    wide = model(d_model=96, d_ff=128, n_layers=3, vocab_size=97, mlp="swiglu", init_std=0.05, tie_embeddings=False)
    for name, parameter in wide.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
            continue
        residual = name.endswith(("attention.o.weight", "mlp.output.weight"))
        expected = 0.05 / math.sqrt(6) if residual else 0.05
        standard_error = 1 / math.sqrt(2 * parameter.numel())
        assert parameter.std(correction=0).item() == pytest.approx(expected, rel=5 * standard_error), name


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_queries_may_have_an_initial_scale_of_their_own(std):
    """All other weights stay the ones that they are without it; at 0 every row of P is uniform."""
    plain, own = model(), model(query_init_std=std)
    for (name, before), after in zip(plain.named_parameters(), own.parameters(), strict=True):
        if not name.endswith("attention.q.weight"):
            assert torch.equal(before, after), name
            continue
        assert torch.allclose(after, before * std / plain.config.init_std, rtol=1e-5)


def gradients(net, numerics=HEALTHY):
    loss = net.loss(batch(), numerics)
    return loss.detach(), dict(
        zip(
            (name for name, _ in net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True
        )
    )


def test_a_fault_reaches_the_chosen_layer_and_head():
    """dQ of layer 1, head 2: that head's rows of W_Q change, and what lies below; nothing beside or above."""
    net = perturbed()
    numerics = AttentionNumerics((SiteFault("dq", "backward", "truncate", 7, layers=(1,), heads=(2,)),))
    (healthy_loss, healthy), (loss, faulty) = gradients(net), gradients(net, numerics)
    assert torch.equal(loss, healthy_loss)
    changed = {name for name in healthy if not torch.equal(healthy[name], faulty[name])}
    w_q = "blocks.1.attention.q.weight"
    rows = (healthy[w_q] != faulty[w_q]).any(-1)
    assert torch.equal(rows, torch.arange(32) // 8 == 2)
    below = {name for name in healthy if name.startswith(("blocks.0.", "tokens.", "positions."))}
    assert changed == below | {w_q, "blocks.1.attention_norm.weight", "blocks.1.attention_norm.bias"}


def test_a_forward_fault_in_one_layer_changes_the_logits():
    net = perturbed()
    healthy = net.logits(batch())
    for site_layer in (0, 1):
        numerics = AttentionNumerics((SiteFault("o", "forward", "truncate", 7, layers=(site_layer,)),))
        assert not torch.equal(net.logits(batch(), numerics), healthy)
    outside = AttentionNumerics((SiteFault("o", "forward", "truncate", 7, layers=(2,)),))
    assert torch.equal(net.logits(batch(), outside), healthy)


def test_each_layer_counts_its_own_non_finite_values_and_saves_the_count():
    net = perturbed()
    with torch.no_grad():
        net.blocks[1].attention.v.weight[0, 0] = math.inf
    numerics = AttentionNumerics((SiteFault("v", "forward", "truncate", 7),))
    net.logits(batch(B=1), numerics)
    counts = [block.attention.nonfinite.item() for block in net.blocks]
    assert counts == [0, 12]  # one feature of one head at each of 12 tokens
    restored = model()
    restored.load_state_dict(net.state_dict())
    assert [block.attention.nonfinite.item() for block in restored.blocks] == counts


def test_the_fast_backend_refuses_a_fault():
    numerics = AttentionNumerics((SiteFault("o", "backward", "truncate", 1, layers=(1,)),))
    with pytest.raises(ValueError, match="'sdpa' has no fault sites"):
        model(backend="sdpa").logits(batch(), numerics)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_batch_longer_than_the_context_is_refused(positions):
    with pytest.raises(RuntimeError):
        model(positions=positions).logits(batch(T=13))
