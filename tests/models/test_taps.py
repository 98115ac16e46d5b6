"""Taps see what they say, and change no bit of training."""

import pytest
import torch

from foreshock.models.moe import MoEConfig
from foreshock.models.taps import PLACES, Taps
from foreshock.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.numeric

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "context_length": 16, "vocab_size": 20}
MODELS = {
    "dense": {},
    "sdpa": {"backend": "sdpa"},
    "rope": {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "tie_embeddings": False},
    "experts": {"moe": MoEConfig(4, 2, aux_coef=0.01, z_coef=0.01, capacity_factor=1.0)},
}


def model_of(name: str) -> Transformer:
    return Transformer(TransformerConfig(**SHAPE, **MODELS[name])).initialise(torch.Generator().manual_seed(1))


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randint(20, (3, 17), generator=torch.Generator().manual_seed(seed))


def trained(name: str, tapped: bool) -> list[torch.Tensor]:
    model = model_of(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad(set_to_none=True)
        with Taps(model, PLACES if tapped else ()):
            loss, auxiliary, _ = model(batch(step))
            (loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_no_tap_changes_a_bit_of_training(name):
    for tapped, plain in zip(trained(name, True), trained(name, False), strict=True):
        assert torch.equal(tapped, plain)


@pytest.mark.parametrize("name", MODELS)
def test_every_place_has_its_tensors_and_their_gradients(name):
    model = model_of(name)
    with Taps(model, PLACES) as taps:
        loss, auxiliary, _ = model(batch())
        (loss + auxiliary).backward()
    assert list(taps.at("dot_product")) == [f"blocks.{layer}.attention.dot_product" for layer in range(2)]
    for tap in taps.at("dot_product").values():
        assert [x.shape for x in tap.inputs] == [(3, 2, 16, 16)] * 3
        assert tap.output.shape == tap.output_grad.shape == (3, 2, 16, 16)
        assert [tap.input_grads[i].shape for i in range(3)] == [(3, 2, 16, 16)] * 3
    for linear in taps.at("linear").values():
        assert linear.weight_grad.shape == linear.weight.shape
        assert linear.output_grad.shape == linear.output.shape
    assert ("blocks.0.mlp.router" in taps.at("linear")) == (name == "experts")
    assert (taps.at("linear")["blocks.0.mlp.output"].weight.ndim == 3) == (name == "experts")
    for norm in taps.at("norm").values():
        assert norm.input_grads[0].shape == norm.output_grad.shape


def test_a_weight_and_its_gradient_are_those_before_clip_and_update():
    model = model_of("rope")
    before = model.blocks[0].mlp.input.weight.detach().clone()
    with Taps(model, ["linear"]) as taps:
        model.loss(batch()).backward()
    gradient = model.blocks[0].mlp.input.weight.grad.clone()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    tap = taps.at("linear")["blocks.0.mlp.input"]
    assert torch.equal(tap.weight, before) and torch.equal(tap.weight_grad, gradient)
    assert not torch.equal(model.blocks[0].mlp.input.weight, before)


def test_an_input_gradient_comes_through_the_tapped_branch_alone():
    model = model_of("sdpa").double()
    with Taps(model, ["norm"]) as taps:
        model.loss(batch()).backward()
    tap = taps.at("norm")["blocks.1.mlp_norm"]
    x = tap.inputs[0].clone().requires_grad_()
    module = model.blocks[1].mlp_norm
    torch.nn.functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps).backward(tap.output_grad)
    torch.testing.assert_close(tap.input_grads[0], x.grad, rtol=1e-12, atol=1e-15)


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = model_of("dense")
    with pytest.raises(RuntimeError, match="boom"), Taps(model, PLACES):
        model.loss(batch())
        raise RuntimeError("boom")
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def test_an_evaluation_is_not_a_step():
    model = model_of("dense")
    with Taps(model, ["dot_product"]) as taps, torch.no_grad():
        model.loss(batch())
    assert all(tap.output is None for tap in taps.at("dot_product").values())
    tap = taps.at("dot_product")["blocks.0.attention.dot_product"]
    with pytest.raises(ValueError, match="reads the output of a tapped module, and the step has none"):
        tap.out  # noqa: B018  (asking is what raises)
    with pytest.raises(ValueError, match="reads the gradient at a tapped output, and the step has none"):
        tap.dout  # noqa: B018


def test_unknown_places_and_unasked_taps_are_named():
    with pytest.raises(ValueError, match="tap place 'softmax' is not allowed: one of dot_product, linear, norm"):
        Taps(model_of("dense"), ["softmax"])
    with pytest.raises(ValueError, match="nobody asked to tap 'norm'"):
        Taps(model_of("dense"), ["linear"]).at("norm")
