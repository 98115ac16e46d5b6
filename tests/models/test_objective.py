"""The objective at other weights, and at the same ones."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from foreshock.models.moe import MoEConfig
from foreshock.models.objective import objective_at
from foreshock.models.transformer import Transformer, TransformerConfig
from tests.rounding_bounds import BF16

pytestmark = pytest.mark.numeric

SHAPE = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "context_length": 8, "vocab_size": 11}
MODELS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "experts": {"moe": MoEConfig(4, 2, aux_coef=0.01, z_coef=0.01, bias_update_speed=0.1)},
}


def setting(name: str) -> tuple[Transformer, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = Transformer(TransformerConfig(**SHAPE, **MODELS[name])).initialise(generator)
    return model, torch.randint(11, (3, 9), generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_at_the_model_s_own_weights_it_is_the_training_objective_without_rounding(name):
    """Of an attention that does not round it has the value and gradient, and of one that does the value to BF16."""
    model, tokens = setting(name)
    rounded = sum(model(tokens, balance_scale=0.5)[:2])
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    found = objective_at(model, tokens, 0.5, weights)
    assert found != rounded and abs(found / rounded - 1) < BF16
    for block in model.blocks:
        assert block.attention.dot_product.backend == "reference"  # as it was
        block.attention.dot_product.backend = "sdpa"
    with sdpa_kernel(SDPBackend.MATH):
        plain = sum(model(tokens, balance_scale=0.5)[:2])
    assert torch.equal(found, plain)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    for one, other in zip(torch.autograd.grad(found, list(weights.values())), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_twice_differentiable(name):
    """The slope of the gradient along d is the difference of the gradients at neighbouring weights."""
    model, tokens = setting(name)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    leaves, generator = list(weights.values()), torch.Generator().manual_seed(1)
    direction = [0.02 * torch.randn(w.shape, generator=generator) for w in leaves]  # as large as a weight

    def gradient_at(step: float) -> list[torch.Tensor]:
        moved = [(w + step * d).detach().requires_grad_() for w, d in zip(leaves, direction, strict=True)]
        objective = objective_at(model, tokens, 1.0, dict(zip(weights, moved, strict=True)))
        return torch.autograd.grad(objective, moved)

    gradient = torch.autograd.grad(objective_at(model, tokens, 1.0, weights), leaves, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
    product = torch.autograd.grad(slope, leaves)
    step = 2e-3  # its square, and FP32's rounding over it, are both below 1e-4
    difference = [(a - b) / (2 * step) for a, b in zip(gradient_at(step), gradient_at(-step), strict=True)]
    error = torch.stack([(p - d).norm() for p, d in zip(product, difference, strict=True)]).norm()
    assert error < 1e-3 * torch.stack([p.norm() for p in product]).norm()


def test_it_follows_the_weights_that_it_is_given_and_leaves_the_model_s_alone():
    model, tokens = setting("tied")
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    other = Transformer(model.config).initialise(torch.Generator().manual_seed(7))
    weights = {name: p.detach() for name, p in other.named_parameters()}
    at_own = objective_at(other, tokens, 1.0, dict(other.named_parameters()))
    assert torch.equal(objective_at(model, tokens, 1.0, weights), at_own)
    for p, same, old in zip(model.parameters(), parameters, before, strict=True):
        assert p is same and p.grad is None and torch.equal(p, old)


def test_in_autocast_it_is_that_of_the_same_weights_in_fp32():
    tokens = setting("tied")[1]
    found = []
    for precision in ("fp32", "bf16"):
        model = Transformer(setting("tied")[0].config, precision).initialise(torch.Generator().manual_seed(0))
        found.append(objective_at(model, tokens, 1.0, dict(model.named_parameters())))
        assert model.precision == precision  # as it was
    assert torch.equal(*found)
