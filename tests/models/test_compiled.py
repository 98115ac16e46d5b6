"""Compiled blocks and loss agree with the eager model, and leave attention with its faults alone."""

from __future__ import annotations

import shutil

import pytest
import torch

from foreshock.models.compiled import CompiledObjective
from foreshock.models.moe import MoEConfig
from foreshock.models.numerics import HEALTHY, AttentionNumerics, SiteFault
from foreshock.models.transformer import Transformer, TransformerConfig
from tests.rounding_bounds import BF16

pytestmark = pytest.mark.numeric

TRUNCATED = AttentionNumerics((SiteFault("o", "backward", "truncate", 7),))
VECTORS = torch.backends.cpu.get_cpu_capability()
INDUCTOR = pytest.param(  # fuses, and so leaves out roundings to BF16: two of them
    "inductor",
    2.5 * BF16,
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
        pytest.mark.skipif(VECTORS == "DEFAULT", reason="inductor's vector code does not compile under this setting"),
    ],
)


def model_of(n_layers: int, precision: str, moe: MoEConfig | None = None) -> Transformer:
    config = TransformerConfig(
        d_model=32, n_layers=n_layers, n_heads=2, d_ff=64, context_length=16, vocab_size=50, moe=moe
    )
    return Transformer(config, precision).initialise(torch.Generator().manual_seed(0))


def step(model: Transformer, objective, numerics: AttentionNumerics) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))
    loss, auxiliary, _ = objective(batch, numerics, 1.0)
    (loss + auxiliary).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.parametrize(("backend", "tolerance"), [("aot_eager", 0.0), INDUCTOR])
def test_losses_and_gradients_agree_with_and_without_a_fault(backend, tolerance):
    """``aot_eager`` calls the kernels of the eager model on the same shapes: bit for bit."""
    model = model_of(2, "bf16")
    compiled = CompiledObjective(model, backend)
    found = {}
    for numerics in (HEALTHY, TRUNCATED):
        loss, gradient = step(model, compiled, numerics)
        again, eager = found[numerics] = step(model, model, numerics)
        torch.testing.assert_close(loss, again, rtol=tolerance / 64, atol=0)  # of a mean over 64 tokens
        for name, g in gradient.items():
            assert (g - eager[name]).norm() <= tolerance * eager[name].norm(), name
    healthy, faulty = (gradient["blocks.0.attention.q.weight"] for _, gradient in found.values())
    assert (faulty - healthy).norm() > 10 * tolerance * healthy.norm(), "the fault has to survive compilation"


def test_many_blocks_share_one_compilation():
    """Three graphs, however many blocks: before attention, after it, and the loss; none anew where a fault begins."""
    graphs = {}
    for n_layers in (2, 6):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = model_of(n_layers, "bf16")
        compiled = CompiledObjective(model, "eager")
        for numerics in (HEALTHY, TRUNCATED):
            step(model, compiled, numerics)
        graphs[n_layers] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == {2: 3, 6: 3}


def test_each_shape_of_a_micro_batch_is_compiled_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = model_of(6, "bf16")
    compiled = CompiledObjective(model, "eager")
    for sequences in (4, 3, 4, 3):
        loss, *_ = compiled(torch.zeros((sequences, 17), dtype=torch.int64), HEALTHY, 1.0)
        loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6


def test_experts_compile_too():
    model = model_of(2, "bf16", MoEConfig(n_experts=4, top_k=2, aux_coef=0.01))
    loss, _ = step(model, CompiledObjective(model, "aot_eager"), HEALTHY)
    torch.testing.assert_close(loss, step(model, model, HEALTHY)[0], rtol=1e-4, atol=0)


def test_the_model_itself_stays_eager_after_a_call_and_after_an_error():
    model = model_of(1, "fp32")
    compiled = CompiledObjective(model, "eager")
    replaced = {"before_attention", "after_attention", "mean_nll"}
    compiled(torch.zeros((1, 5), dtype=torch.int64), HEALTHY, 1.0)
    assert not replaced & (vars(model.blocks[0]).keys() | vars(model).keys())
    with pytest.raises(IndexError):
        compiled(torch.full((1, 5), 50), HEALTHY, 1.0)
    assert not replaced & (vars(model.blocks[0]).keys() | vars(model).keys())
