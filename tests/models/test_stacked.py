from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch

from foreshock.models.moe import MoEConfig
from foreshock.models.numerics import HEALTHY, AttentionNumerics, SiteFault
from foreshock.models.stacked import StackedNumerics, StackedTransformer
from foreshock.models.stacked_taps import SliceTaps
from foreshock.models.taps import PLACES, Taps
from foreshock.models.transformer import Transformer, TransformerConfig
from tests.models.attention_in_triton import ONE_TILE, in_the_interpreter
from tests.other_order import OtherBatchedOrder
from tests.rounding_bounds import FP32, gamma, once_stored_in_bf16

pytestmark = pytest.mark.numeric

NANO = TransformerConfig(d_model=16, n_layers=2, n_heads=2, d_ff=32, context_length=8, vocab_size=19)
SWIGLU = replace(NANO, norm="rmsnorm", positions="rope", mlp="swiglu", qk_norm=True, tie_embeddings=False)
IN_TRITON = pytest.param(
    replace(NANO, d_model=32, backend="triton", tiles=ONE_TILE), marks=[*in_the_interpreter, pytest.mark.slow]
)
FAULTY = AttentionNumerics(tuple(SiteFault(site, "backward", "truncate", 6) for site in ("o", "do")))
ONE_HEAD = AttentionNumerics((SiteFault("q", "both", "truncate", 7, layers=(1,), heads=(0,)),))
NUMERICS = (HEALTHY, FAULTY, FAULTY, ONE_HEAD)
ROUNDINGS = 300
"""On the longest way: 24 tokens, 19 logits, two layers with products of 16, 16, 8, 16 and 32 terms, norms."""


def models(config: TransformerConfig) -> list[Transformer]:
    return [Transformer(config).initialise(torch.Generator().manual_seed(seed)) for seed in range(len(NUMERICS))]


@pytest.fixture
def tokens_NBT1() -> torch.Tensor:
    return torch.randint(19, (len(NUMERICS), 3, 9), generator=torch.Generator().manual_seed(0))


def backward(stack: StackedTransformer, tokens_NBT1: torch.Tensor, numerics=NUMERICS) -> torch.Tensor:
    losses_N, _, _ = stack(tokens_NBT1, StackedNumerics(numerics))
    losses_N.sum().backward()
    stack.take_gradients()
    return losses_N.detach()


def gradients_of(stack: StackedTransformer) -> torch.Tensor:
    """(N, all weights)."""
    return torch.cat(stack.gradients, dim=1)


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """In the norm, as two orders of sums leave tensors that are made of what attention stores in BF16."""
    return bool((one - other).norm() <= once_stored_in_bf16(ROUNDINGS) * other.norm())


@pytest.mark.parametrize("order", [nullcontext, OtherBatchedOrder], ids=["own_order", "other_order"])
@pytest.mark.parametrize("config", [NANO, SWIGLU, IN_TRITON], ids=["layernorm", "rmsnorm", "triton"])
def test_each_slice_has_the_loss_the_gradient_and_the_taps_of_its_own_model(config, tokens_NBT1, order):
    stack = StackedTransformer(models(config))
    with order(), Taps(stack, PLACES) as stacked_taps:
        losses_N = backward(stack, tokens_NBT1)
    for index, (model, numerics) in enumerate(zip(models(config), NUMERICS, strict=True)):
        with Taps(model, PLACES) as taps:
            loss, _, _ = model(tokens_NBT1[index], numerics)
            loss.backward()
        torch.testing.assert_close(losses_N[index], loss.detach(), rtol=2 * gamma(ROUNDINGS, FP32), atol=0)
        mine = dict(stack.slices[index].named_parameters())
        assert mine.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert torch.equal(mine[name], parameter), name
            assert near(mine[name].grad, parameter.grad), name
        sliced = SliceTaps(stacked_taps, stack, index)
        for place in PLACES:
            assert sliced.at(place).keys() == taps.at(place).keys()
            for name, tap in taps.at(place).items():
                part = sliced.at(place)[name]
                assert part.module is stack.slices[index].get_submodule(name)
                assert all(map(near, part.inputs, tap.inputs)), name
                assert near(part.output, tap.output) and near(part.output_grad, tap.output_grad), name
                assert part.input_grads.keys() == tap.input_grads.keys()
                assert (part.weight_grad is None) == (tap.weight_grad is None)


def test_a_fault_of_one_bit_is_further_off_than_another_order_of_sums(tokens_NBT1):
    """Wherever it reaches a gradient: what is called near above tells it apart."""
    for site, reached in (("o", "qk"), ("do", "qkv")):
        one_bit = AttentionNumerics((SiteFault(site, "backward", "truncate", 1),))
        gradients = []
        for numerics in (HEALTHY, one_bit):
            model = models(NANO)[0]
            model(tokens_NBT1[0], numerics)[0].backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        for layer, part in product(range(2), reached):
            name = f"blocks.{layer}.attention.{part}.weight"
            assert not near(gradients[1][name], gradients[0][name]), (site, name)


def test_a_fault_reaches_its_own_slices_alone(tokens_NBT1):
    healthy = (HEALTHY,) * len(NUMERICS)
    stack = StackedTransformer(models(NANO))
    backward(stack, tokens_NBT1, healthy)
    before = gradients_of(stack)
    backward(stack, tokens_NBT1)
    assert (gradients_of(stack) != before).any(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("config", [NANO, IN_TRITON], ids=["reference", "triton"])
def test_what_is_not_finite_stays_in_its_slice(config, tokens_NBT1):
    stack = StackedTransformer(models(config))
    losses_N, gradients = backward(stack, tokens_NBT1), gradients_of(stack)
    for weights in stack.weights:
        weights[1].fill_(torch.nan)
    broken_N = backward(stack, tokens_NBT1)
    assert torch.isfinite(broken_N).tolist() == [True, False, True, True]
    others = [0, 2, 3]
    assert torch.equal(broken_N[others], losses_N[others]) and torch.equal(
        gradients_of(stack)[others], gradients[others]
    )
    counted = [model.blocks[0].attention.nonfinite.item() for model in stack.slices]
    assert counted[1] > 0 and [counted[index] for index in others] == [0, 0, 0]


def test_a_slice_is_a_transformer_in_the_stack_s_memory(tokens_NBT1):
    stack = StackedTransformer(models(NANO))
    changed = models(NANO)[3]
    stack.slices[0].load_state_dict(changed.state_dict())
    losses_N, _, _ = stack(tokens_NBT1[:1].expand(4, -1, -1), StackedNumerics((HEALTHY,) * 4))
    assert losses_N[0] == losses_N[3] != losses_N[1]
    torch.testing.assert_close(
        stack.slices[0].loss(tokens_NBT1[0]), losses_N[0], rtol=2 * gamma(ROUNDINGS, FP32), atol=0
    )


def test_the_sdpa_backend_stacks_too(tokens_NBT1):
    config, healthy = replace(NANO, backend="sdpa"), (HEALTHY,) * len(NUMERICS)
    losses_N = backward(StackedTransformer(models(config)), tokens_NBT1, healthy)
    for loss, model, tokens in zip(losses_N, models(config), tokens_NBT1, strict=True):
        torch.testing.assert_close(loss, model.loss(tokens).detach(), rtol=2 * gamma(ROUNDINGS, FP32), atol=0)


def test_models_of_different_shapes_and_experts_do_not_stack():
    with pytest.raises(ValueError, match="one configuration"):
        StackedTransformer([*models(NANO), *models(SWIGLU)])
    experts = replace(NANO, moe=MoEConfig(n_experts=4, top_k=2))
    with pytest.raises(ValueError, match=r"model\.moe is not allowed in a stack"):
        StackedTransformer(models(experts))
