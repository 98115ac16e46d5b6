"""The objective at other weights, and at the same ones."""

import pytest
import torch

from models.moe import MoEConfig
from models.numerics import HEALTHY, AttentionNumerics, SiteFault
from models.objective import objective_at
from models.transformer import Transformer, TransformerConfig

SHAPE = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "context_length": 8, "vocab_size": 11}
MODELS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "experts": {"moe": MoEConfig(4, 2, aux_coef=0.01, z_coef=0.01, bias_update_speed=0.1)},
}
TRUNCATED = AttentionNumerics((SiteFault("o", "both", "truncate", 7),))


def setting(name: str) -> tuple[Transformer, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = Transformer(TransformerConfig(**SHAPE, **MODELS[name])).initialise(generator)
    return model, torch.randint(11, (3, 9), generator=generator)


@pytest.mark.parametrize("numerics", [HEALTHY, TRUNCATED])
@pytest.mark.parametrize("name", MODELS)
def test_at_the_model_s_own_weights_it_is_the_training_objective(name, numerics):
    model, tokens = setting(name)
    loss, auxiliary, _ = model.objective(tokens, numerics, 0.5)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    found = objective_at(model, tokens, numerics, (), 0.5, weights)
    assert torch.equal(found, loss + auxiliary)
    expected = torch.autograd.grad(loss + auxiliary, list(model.parameters()))
    for one, other in zip(torch.autograd.grad(found, list(weights.values())), expected, strict=True):
        assert torch.equal(one, other)


def test_it_follows_the_weights_that_it_is_given_and_leaves_the_model_s_alone():
    model, tokens = setting("tied")
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    other = Transformer(model.config).initialise(torch.Generator().manual_seed(7))
    weights = {name: p.detach() for name, p in other.named_parameters()}
    assert torch.equal(objective_at(model, tokens, HEALTHY, (), 1.0, weights), other.loss(tokens))
    for p, same, old in zip(model.parameters(), parameters, before, strict=True):
        assert p is same and p.grad is None and torch.equal(p, old)


def test_a_fault_s_counter_counts_training_alone():
    model, tokens = setting("tied")
    with torch.no_grad():
        model.blocks[0].attention.v.weight.fill_(torch.inf)
    objective_at(model, tokens, TRUNCATED, (), 1.0, dict(model.named_parameters()))
    assert [block.attention.nonfinite.item() for block in model.blocks] == [0, 0]
    model.loss(tokens, TRUNCATED)
    assert model.blocks[0].attention.nonfinite.item() > 0
