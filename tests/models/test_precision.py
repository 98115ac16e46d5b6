"""BF16 autocast: what is BF16, what stays FP32, and that attention is rounded once."""

from __future__ import annotations

import pytest
import torch

from foreshock.models.moe import MoEConfig
from foreshock.models.numerics import HEALTHY, to_bf16_grid
from foreshock.models.taps import Taps
from foreshock.models.transformer import Transformer, TransformerConfig
from tests.models.attention_in_triton import ONE_TILE, in_the_interpreter

pytestmark = pytest.mark.numeric

MOE = MoEConfig(n_experts=4, top_k=2, aux_coef=0.01)


def model_of(precision: str, **changes) -> Transformer:
    fields = dict(d_model=32, n_layers=2, n_heads=2, d_ff=64, context_length=16, vocab_size=50) | changes
    return Transformer(TransformerConfig(**fields), precision).initialise(torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))


def step(model: Transformer) -> Taps:
    with Taps(model, ("linear", "norm", "dot_product")) as taps:
        loss, auxiliary, _ = model(tokens())
        (loss + auxiliary).backward()
    assert loss.dtype == torch.float32
    return taps


@pytest.mark.parametrize("changes", [{}, {"moe": MOE, "qk_norm": True, "norm": "rmsnorm", "positions": "rope"}])
def test_products_are_bf16_and_all_else_is_fp32(changes):
    model = model_of("bf16", **changes)
    taps = step(model)
    for name, tap in taps.at("linear").items():
        assert tap.output.dtype == (torch.float32 if name.endswith("router") else torch.bfloat16), name
        assert tap.weight.dtype == tap.weight_grad.dtype == torch.float32, name
    for name, tap in taps.at("norm").items():
        for tensor in (tap.inputs[0], tap.input_grads[0], tap.output, tap.output_grad):
            assert tensor.dtype == torch.float32, name
    for name, tap in taps.at("dot_product").items():
        assert {x.dtype for x in tap.inputs} == {torch.bfloat16}, name
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "backend", [{}, pytest.param({"backend": "triton", "tiles": ONE_TILE}, marks=in_the_interpreter)]
)
def test_attention_is_rounded_once(backend):
    """Its kernel does in autocast what it does on the same numbers outside: S, P and sums stay FP32."""
    for tap in step(model_of("bf16", qk_norm=True, **backend)).at("dot_product").values():
        q, k, v = (x.float().requires_grad_() for x in tap.inputs)
        o = tap.module(q, k, v, HEALTHY.layer(0), torch.zeros((), dtype=torch.int64))
        o.backward(tap.output_grad.float())
        assert torch.equal(o, tap.output.float())
        for index, x in enumerate((q, k, v)):
            assert torch.equal(x.grad, tap.input_grads[index].float())
        assert torch.equal(to_bf16_grid(tap.output_grad), tap.output_grad.float())


def test_the_loss_agrees_with_fp32():
    fp32, bf16 = (model_of(precision).loss(tokens()) for precision in ("fp32", "bf16"))
    assert fp32 != bf16
    torch.testing.assert_close(bf16, fp32, rtol=1e-3, atol=0)


def test_the_label_is_in_the_precision_of_training():
    model = model_of("bf16")
    trained = model(tokens())[0]
    with torch.no_grad():
        assert torch.equal(trained, model.loss(tokens()))
