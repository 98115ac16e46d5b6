"""Dropout: which elements, by what factor, at which places, and in training alone."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from foreshock.experiments.build import build_run
from foreshock.experiments.training.stacking import why_single
from foreshock.models.dropout import Draw, Dropout, dropping
from foreshock.models.stacked import StackedTransformer
from foreshock.models.transformer import Transformer, TransformerConfig
from tests.faults.engine_steps import differing, stepped

RATE = 0.25
SHAPE = {
    "backend": "sdpa",
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "d_ff": 32,
    "context_length": 8,
    "vocab_size": 11,
}
TOKENS = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
DRAW = Draw(seed=0, step=3, part=1)


def model(rate: float) -> Transformer:
    return Transformer(TransformerConfig(**SHAPE, dropout=rate)).initialise(torch.Generator().manual_seed(0))


def test_it_drops_the_share_and_divides_what_it_keeps():
    place = Dropout(RATE, 0)
    with dropping(place, DRAW):
        y = place(torch.full((400, 100), 3.0))
    kept = y != 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 3.0) / (1 - RATE))
    # a binomial share of n has a standard deviation of sqrt(p (1 - p) / n)
    assert float(kept.double().mean()) == pytest.approx(1 - RATE, abs=6 * math.sqrt(RATE * (1 - RATE) / 40_000))


@pytest.mark.parametrize("other", [Draw(1, 3, 1), Draw(0, 4, 1), Draw(0, 3, 2), Draw(0, 3, 1, again=True)])
def test_a_mask_is_a_function_of_seed_step_micro_batch_and_place(other):
    x, places = torch.ones(50, 50), [Dropout(RATE, place) for place in range(2)]
    first = places[0].kept(x, DRAW)
    assert torch.equal(first, places[0].kept(x.double(), DRAW))
    assert not torch.equal(first, places[0].kept(x, other)) and not torch.equal(first, places[1].kept(x, DRAW))
    # two independent masks agree in a share of p^2 + (1 - p)^2
    agreed, alike = RATE**2 + (1 - RATE) ** 2, float(first.eq(places[0].kept(x, other)).double().mean())
    assert alike == pytest.approx(agreed, abs=6 * math.sqrt(agreed * (1 - agreed) / 2500))


def test_the_places_are_behind_embeddings_attention_and_mlp():
    names = {name: module.place for name, module in model(RATE).named_modules() if isinstance(module, Dropout)}
    assert names == {
        "dropout": 0,
        "blocks.0.attention_dropout": 1,
        "blocks.0.mlp_dropout": 2,
        "blocks.1.attention_dropout": 3,
        "blocks.1.mlp_dropout": 4,
    }
    assert not [module for module in model(0.0).modules() if isinstance(module, Dropout)]


def test_a_forward_is_that_of_the_masks_by_hand():
    """In FP64: every place's output multiplied by its mask, through hooks of a model without dropout."""
    with_masks, by_hand = model(RATE).double(), model(0.0).double()
    masks = [module for module in with_masks.modules() if isinstance(module, Dropout)]

    def masked(place):
        return lambda module, arguments, output: output * place.kept(output, DRAW) / (1 - RATE)

    by_hand.blocks[0].register_forward_pre_hook(
        lambda module, arguments: (masked(masks[0])(module, (), arguments[0]), *arguments[1:])
    )
    for block, (attention, mlp) in zip(by_hand.blocks, (masks[1:3], masks[3:]), strict=True):
        block.attention.o.register_forward_hook(masked(attention))
        block.mlp.register_forward_hook(masked(mlp))
    with dropping(with_masks, DRAW):
        loss = with_masks.loss(TOKENS)
    # the head's loss is taken of FP64 logits; each place rounds twice
    torch.testing.assert_close(loss, by_hand.loss(TOKENS), rtol=1e-12, atol=0)


def test_nothing_is_dropped_outside_of_training():
    assert torch.equal(model(RATE).loss(TOKENS), model(0.0).loss(TOKENS))


def test_training_drops_in_every_micro_batch_and_the_held_out_loss_does_not(make_run):
    run = make_run("model.dropout=0.5", "train.micro_batch=4")
    engine, weights, _ = stepped(run, 3)
    _, without, _ = stepped(make_run("train.micro_batch=4"), 3)
    assert differing(weights[0], without[0])
    plain = make_run("train.micro_batch=4").new_engine()
    plain.model.load_state_dict(engine.model.state_dict())
    sites = [run.healthy_sites()]
    assert torch.equal(engine.held_out_loss(sites), plain.held_out_loss(sites))
    assert all(module.draw is None for module in engine.model.modules() if isinstance(module, Dropout))


def test_a_resumed_run_draws_the_masks_of_the_whole_one(make_run):
    run = make_run("model.dropout=0.2")
    whole, _, _ = stepped(run, 6)
    first, _, _ = stepped(run, 3)
    resumed, sites = run.new_engine(), [run.healthy_sites()]
    resumed.load([first.state_of(0)])
    for step in range(3, 6):
        resumed.step(step, sites)
    assert not differing(*(dict(engine.model.named_parameters()) for engine in (whole, resumed)))


@pytest.mark.parametrize("overrides", [[], ["train.micro_batch=4"]])
def test_the_objective_at_the_step_s_weights_has_the_gradient_of_the_step(make_run, overrides):
    """Of its last micro-batch, with the same masks; the model's attention rounds, the objective's does not."""
    run = make_run("model.dropout=0.3", "train.clip=null", "model.backend=sdpa", *overrides)
    engine = run.new_engine()
    weights = {name: p.detach().clone().requires_grad_() for name, p in engine.model.named_parameters()}
    view = engine.step(0, [run.healthy_sites()])
    loss = view.objective_at(weights)
    if not overrides:  # the whole batch
        assert float(loss.detach()) == pytest.approx(float(view.loss), rel=1e-5)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for (name, parameter), gradient in zip(engine.model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert torch.equal(loss, view.objective_at(weights))


def test_a_rate_of_0_is_the_identity_of_a_model_without_the_key(make_config):
    config = OmegaConf.to_container(make_config(), resolve=True)
    run = build_run(config)
    del config["model"]["dropout"]
    assert build_run(config).run_id == run.run_id != build_run(make_config("model.dropout=0.1")).run_id


def test_a_run_with_dropout_trains_by_itself(make_run):
    assert why_single(make_run("train.stack=2")) is None
    assert why_single(make_run("train.stack=2", "model.dropout=0.1")).startswith("model.dropout=0.1 is not allowed")
    with pytest.raises(ValueError, match=r"model.dropout=0.25 is not allowed in a stack"):
        StackedTransformer([model(RATE)])


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_an_impossible_rate_is_refused_by_name(rate):
    with pytest.raises(ValueError, match=f"model.dropout={rate} is not allowed: 0 to below 1"):
        model(rate)


def test_it_does_not_go_with_a_compiled_forward(make_run):
    with pytest.raises(ValueError, match=r"train.compile=True is not allowed with model.dropout=0.1"):
        make_run("model.dropout=0.1", "train.compile=true", "train.watched_sequences=2")
