"""The laws hold to FP64 rounding where they should, and a broken gradient breaks those that its derivation says."""

import pytest
import torch
import torch.nn.functional as F

from foreshock.models.moe import MoEConfig
from foreshock.models.taps import PLACES, Tap, Taps
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors import conservation as law

pytestmark = pytest.mark.numeric

ROUNDING = 1e-12
EXPERTS = MoEConfig(4, 2, aux_coef=0.01, z_coef=0.01, capacity_factor=1.0)
VARIANTS = [
    {},
    {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "tie_embeddings": False, "qk_norm": True},
    {"norm": "layernorm", "positions": "rope", "mlp": "gelu", "tie_embeddings": False},
    {"norm": "rmsnorm", "positions": "learned", "mlp": "swiglu", "qk_norm": True},
    {"norm": "layernorm", "qk_norm": True, "moe": EXPERTS, "mlp": "swiglu"},
    {"norm": "rmsnorm", "positions": "rope", "tie_embeddings": False, "moe": EXPERTS},
    {"n_kv_heads": 2, "window": 7, "norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "qk_norm": True},
    {"n_kv_heads": 1, "tie_embeddings": False},
    {"moe": MoEConfig(4, 1, renormalise=False, z_coef=0.1, shared_d_ff=8)},
]


def grouped_in_fp64(x, weight, offs):
    """torch's grouped product has no FP64."""
    return torch.cat([part @ w for part, w in zip(x.tensor_split(offs[:-1].tolist()), weight, strict=True)])


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(map(str, variant.values()))[:40] or "default")
def tapped(request, monkeypatch) -> tuple[TransformerConfig, Taps]:
    monkeypatch.setattr(F, "grouped_mm", grouped_in_fp64)
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "context_length": 24, "vocab_size": 20}
    config = TransformerConfig(**shape, backend="sdpa", init_std=0.3, **request.param)
    model = Transformer(config).initialise(torch.Generator().manual_seed(1)).double()
    with Taps(model, PLACES) as taps:
        loss, auxiliary, _ = model(torch.randint(20, (3, 25), generator=torch.Generator().manual_seed(2)))
        (loss + auxiliary).backward()
    return config, taps


def of(tap: Tap):
    q, k, v = tap.inputs
    dq, dk, dv = (tap.input_grads[i] for i in range(3))
    return q, k, v, tap.output, dq, dk, dv, tap.output_grad


def attention_residuals(q, k, v, o, dq, dk, dv, do) -> dict[str, torch.Tensor]:
    return {
        "key shift": law.key_shift_residual(dk),
        "value shift": law.value_shift_residual(dv, do),
        "qk": law.qk_gauge_residual(q, dq, k, dk),
        "qk matrix": law.qk_gauge_matrix_residual(q, dq, k, dk),
        "vo": law.vo_gauge_residual(v, dv, o, do),
        "vo matrix": law.vo_gauge_matrix_residual(v, dv, o, do),
    }


def test_attention_keeps_its_laws(tapped):
    for tap in tapped[1].at("dot_product").values():
        for name, residual in attention_residuals(*of(tap)).items():
            assert residual.shape == (3, tapped[0].kv_heads)
            assert residual.max() < ROUNDING, name


def test_linear_layers_keep_eulers_identity(tapped):
    config, taps = tapped
    for name, tap in taps.at("linear").items():
        if name == "head" and config.tie_embeddings:
            continue
        w, dw, y, dy = tap.weight, tap.weight_grad, tap.output, tap.output_grad
        assert law.linear_euler_residual(w, dw, y, dy) < ROUNDING, name
        assert law.linear_euler_residual(w, dw + 1e-6 * w, y, dy) > 1e-9, name


def test_linear_layers_keep_eulers_identity_in_their_inputs(tapped):
    config, taps = tapped
    linear, norms = taps.at("linear"), taps.at("norm")
    readers = {"blocks.1.attention_norm": ["blocks.1.attention." + part for part in "qkv"], "final_norm": ["head"]}
    if config.moe is None:
        readers["blocks.0.mlp_norm"] = ["blocks.0.mlp.input"] + ["blocks.0.mlp.gate"] * (config.mlp == "swiglu")
    for source, layers in readers.items():
        x, dx = norms[source].output, norms[source].output_grad
        outputs = [(linear[name].output, linear[name].output_grad) for name in layers]
        assert law.linear_input_residual(x, dx, outputs) < ROUNDING, source
        assert law.linear_input_residual(x, dx + 1e-6 * dx.mean() * x.sign(), outputs) > 1e-9, source
        if len(outputs) > 1:
            assert law.linear_input_residual(x, dx, outputs[:-1]) > 1e-3, source


def test_logits_and_an_untied_head_ignore_a_shift(tapped):
    config, taps = tapped
    head = taps.at("linear")["head"]
    assert law.logit_shift_residual(head.output_grad) < ROUNDING
    weight = law.logit_shift_residual(head.weight_grad.T)
    assert weight > 1e-6 if config.tie_embeddings else weight < ROUNDING


def test_a_head_hands_on_the_shift_of_its_logits_and_no_other():
    generator = torch.Generator().manual_seed(0)
    x, dlogits = (torch.randn(3, 5, n, dtype=torch.float64, generator=generator) for n in (8, 20))
    dw = dlogits.flatten(0, 1).T @ x.flatten(0, 1)
    assert law.relative(*law.head_shift(dw, x, dlogits)) < 1e-6  # the shift of one token's logits is taken in FP32
    assert law.logit_shift_residual(dw.T) > 1e-2
    dw[7, 3] += 1e-3
    torch.testing.assert_close(law.head_shift(dw, x, dlogits)[0], torch.tensor(1e-3).double(), rtol=1e-2, atol=0)


def test_routers_ignore_a_shift_but_for_the_z_loss(tapped):
    config, taps = tapped
    for name, tap in taps.at("linear").items():
        if name.endswith("router"):
            x, logits = tap.inputs[0].flatten(0, -2), tap.output.flatten(0, -2)
            kept = law.router_shift_residual(tap.weight_grad, x, logits, config.moe.z_coef)
            assert kept < ROUNDING
            assert law.router_shift_residual(tap.weight_grad) > 1e-6  # the z-loss left in


def test_norms_are_orthogonal_to_what_they_ignore(tapped):
    config, taps = tapped
    for tap in taps.at("norm").values():
        x, dx, y, dy = tap.inputs[0], tap.input_grads[0], tap.output, tap.output_grad
        centred, bias = config.norm == "layernorm", getattr(tap.module, "bias", None)
        bias = None if bias is None else bias.detach()
        assert law.norm_orthogonality_residual(x, dx, y, dy, eps=tap.module.eps, bias=bias, centred=centred) < ROUNDING
        wrong = law.norm_orthogonality_residual(x, dx, y, dy, eps=2 * tap.module.eps, bias=bias, centred=centred)
        assert wrong > 1e-10
        if centred:
            assert law.norm_shift_residual(dx) < ROUNDING


def attention_step(groups: int, key_bias: bool = False):
    """One FP64 attention with 4 query heads on ``groups`` key-value heads, its gradients by autograd."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, do = (torch.randn(2, h, 12, 8, dtype=torch.float64, generator=generator) for h in (4, groups, groups, 4))
    k = k + (torch.randn(8, dtype=torch.float64, generator=generator) if key_bias else 0.0)
    q, k, v = (x.requires_grad_() for x in (q, k.detach(), v))
    shared = [x.repeat_interleave(4 // groups, dim=1) for x in (k, v)]
    o = F.scaled_dot_product_attention(q, *shared, is_causal=True)
    o.backward(do)
    return tuple(x.detach() for x in (q, k, v, o, q.grad, k.grad, v.grad, do))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_and_multi_query_attention_keep_them_too(groups):
    for name, residual in attention_residuals(*attention_step(groups, key_bias=True)).items():
        assert residual.shape == (2, groups)
        assert residual.max() < ROUNDING, name


BROKEN_BY = {  # what each gradient enters
    "dk": {"key shift", "qk", "qk matrix"},
    "dq": {"qk", "qk matrix"},
    "dv": {"value shift", "vo", "vo matrix"},
    "do": {"value shift", "vo", "vo matrix"},
}


@pytest.mark.parametrize("part", BROKEN_BY)
def test_a_wrong_gradient_breaks_its_laws_and_no_other(part):
    names = ["q", "k", "v", "o", "dq", "dk", "dv", "do"]
    tensors = dict(zip(names, attention_step(4), strict=True))
    tensors[part] = tensors[part].clone()
    tensors[part][1, 2, 5, 3] += 1e-3
    for name, residual in attention_residuals(*tensors.values()).items():
        hit = torch.zeros(2, 4, dtype=torch.bool)
        hit[1, 2] = name in BROKEN_BY[part]
        assert torch.equal(residual > 1e-9, hit), name


def test_zeros_keep_every_law_and_nan_breaks_it():
    zeros = torch.zeros(1, 2, 3, 4)
    for residual in attention_residuals(*[zeros] * 8).values():
        assert (residual == 0).all()
    assert torch.isnan(law.key_shift_residual(torch.full_like(zeros, torch.nan))).all()


def test_heads_that_cannot_share_and_a_missing_router_input_are_named():
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key-value heads"):
        law.value_shift_residual(torch.ones(1, 3, 2, 2), torch.ones(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"z_coef=0\.1"):
        law.router_shift_residual(torch.ones(2, 2), z_coef=0.1)
