"""Faults on modules: each hits what its name says, what others read of it, and nothing else."""

import pytest
import torch

from foreshock.models.bits import flip, truncate
from foreshock.models.corruption import MODULE_SITES, Corrupted, ModuleFault
from foreshock.models.moe import MoEConfig
from foreshock.models.taps import Taps
from foreshock.models.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.numeric

CONFIG = dict(d_model=16, n_layers=2, n_heads=2, d_ff=32, context_length=8, vocab_size=11, tie_embeddings=False)
TOKENS = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
LINEAR, NORM = "blocks.1.mlp.input", "blocks.1.mlp_norm"


def run(*faults: ModuleFault, **changes):
    """The loss, every gradient, and the taps of one step under these faults."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**CONFIG | changes)).initialise(torch.Generator().manual_seed(0))
    with Corrupted(model, faults), Taps(model, ("linear", "norm")) as taps:
        loss = model.loss(TOKENS)
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, taps


def fault(module=LINEAR, site="dw", rounding="truncate", bits=3, share=1.0) -> ModuleFault:
    return ModuleFault(module, site, rounding, bits, share)


def changed(*faults: ModuleFault, **changes) -> set[str]:
    healthy, faulty = run(**changes)[1], run(*faults, **changes)[1]
    return {name for name in healthy if not torch.equal(healthy[name], faulty[name])}


def test_a_wrong_weight_gradient_is_wrong_alone():
    assert changed(fault()) == {"blocks.1.mlp.input.weight"}
    healthy, faulty = run()[1][f"{LINEAR}.weight"], run(fault())[1][f"{LINEAR}.weight"]
    assert torch.equal(faulty, truncate(healthy.bfloat16(), 3).float())


def test_a_tied_head_s_wrong_weight_gradient_spares_the_embedding_s_share():
    """The tied gradient is the sum of two kernels' shares, which an untied twin of the same weights keeps apart."""
    torch.manual_seed(0)
    untied = Transformer(TransformerConfig(**CONFIG)).initialise(torch.Generator().manual_seed(0))
    tied = Transformer(TransformerConfig(**CONFIG | {"tie_embeddings": True}))
    tied.load_state_dict(untied.state_dict() | {"head.weight": untied.tokens.weight})
    untied.head.load_state_dict({"weight": untied.tokens.weight})
    untied.loss(TOKENS).backward()
    head, embedding = untied.head.weight.grad, untied.tokens.weight.grad
    with Corrupted(tied, [fault("head", bits=7)]):
        tied.loss(TOKENS).backward()
    assert torch.equal(tied.head.weight.grad, truncate(head.bfloat16(), 7).float() + embedding)
    assert not torch.equal(tied.head.weight.grad, truncate((head + embedding).bfloat16(), 7).float())


@pytest.mark.parametrize("tied", [False, True])
def test_a_forward_that_fails_leaves_the_weight_as_it_was(tied):
    model = Transformer(TransformerConfig(**CONFIG | {"tie_embeddings": tied}))
    with pytest.raises(RuntimeError), Corrupted(model, [fault("head")]):
        model.head(torch.zeros(2, 3))
    assert model.head.weight is model.get_parameter("head.weight" if not tied else "tokens.weight")


def test_a_wrong_output_is_what_everyone_after_it_reads():
    loss, _, taps = run(fault(site="y"))
    clean, _, clean_taps = run()
    assert loss != clean
    y, clean_y = taps.at("linear")[LINEAR].output, clean_taps.at("linear")[LINEAR].output
    assert torch.equal(y, truncate(clean_y.bfloat16(), 3).float())


@pytest.mark.parametrize("module", [LINEAR, "blocks.0.attention.k"])
def test_a_wrong_input_gradient_spares_its_own_weight_and_what_comes_later(module):
    wrong = changed(fault(module, "dx"))
    assert f"{module}.weight" not in wrong and "head.weight" not in wrong
    assert "tokens.weight" in wrong
    if module == "blocks.0.attention.k":  # its input is theirs too, and their gradients are not touched
        assert not wrong & {"blocks.0.attention.q.weight", "blocks.0.attention.v.weight"}


def test_a_wrong_arriving_gradient_is_the_loss_kernel_s():
    _, gradients, taps = run(fault("head", "dy"))
    _, clean, clean_taps = run()
    dlogits, clean_dlogits = (t.at("linear")["head"].output_grad for t in (taps, clean_taps))
    assert torch.equal(dlogits, truncate(clean_dlogits.bfloat16(), 3).float())
    assert not torch.equal(gradients["head.weight"], clean["head.weight"])


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_norm_s_wrong_input_gradient_is_seen_by_its_tap(norm):
    wrong, clean = (run(*f, norm=norm)[2].at("norm")[NORM].input_grads[0] for f in ([fault(NORM, "dx")], []))
    assert torch.equal(wrong, truncate(clean.bfloat16(), 3).float())


@pytest.mark.parametrize("site", MODULE_SITES)
def test_one_flipped_bit_is_one_element_of_each_sequence(site):
    name = {"y": "output", "dy": "output_grad", "dw": "weight_grad"}.get(site)
    wrong, clean = (run(*f)[2].at("linear")[LINEAR] for f in ([fault(site=site, rounding="flip", share=0.0)], []))
    if name is None:
        assert changed(fault(site=site, rounding="flip", share=0.0))
        return
    wrong, clean = getattr(wrong, name), getattr(clean, name)
    places = wrong != clean
    assert places.sum() == (1 if site == "dw" else len(TOKENS))
    assert torch.equal(wrong[places], flip(clean[places].bfloat16(), 3).float())


@pytest.mark.parametrize("module", ["blocks.0.mlp.router", "blocks.1.mlp.output"])
def test_routers_and_experts_can_be_hit(module):
    moe = {"moe": MoEConfig(4, 2)}
    assert changed(fault(module), **moe) == {f"{module}.weight"}
    taps = [run(*f, **moe)[2].at("linear")[module] for f in ([fault(module, "y", "flip", share=0.0)], [])]
    assert (taps[0].output != taps[1].output).sum() == 1  # their tensors have no sequences


@pytest.mark.parametrize("site", MODULE_SITES)
def test_zero_bits_change_nothing_and_a_closed_context_leaves_no_hook(site):
    assert changed(fault(site=site, bits=0)) == set()
    model = Transformer(TransformerConfig(**CONFIG)).initialise(torch.Generator().manual_seed(0))
    clean = model.loss(TOKENS)
    with Corrupted(model, (fault(site=site),)):
        model.loss(TOKENS).backward()
    model.zero_grad()
    after = model.loss(TOKENS)
    after.backward()
    assert torch.equal(clean, after)
    assert all(torch.equal(p.grad, run()[1][name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "x"}, "site='x' .*y, dy, dx, dw"),
        ({"bits": 9}, "bits=9 "),
        ({"share": 7.0}, "share=7.0 "),
        ({"rounding": "up"}, "rounding='up' "),
    ],
)
def test_an_impossible_fault_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        fault(**change)


@pytest.mark.parametrize(
    "name", ["blocks.1.mlp.inptu", "blocks.7.mlp.input", "tokens", "blocks.0.attention.dot_product"]
)
def test_an_unknown_module_is_refused_with_the_nearest(name):
    model = Transformer(TransformerConfig(**CONFIG))
    with pytest.raises(ValueError, match=f"no '{name}'; the nearest are .*blocks"):
        Corrupted(model, (fault(name),))


def test_two_faults_on_one_tensor_are_refused_and_on_two_are_not():
    with pytest.raises(ValueError, match=f"2 faults on 'dw' of {LINEAR} meet"):
        run(fault(bits=1), fault(bits=5))
    assert changed(fault(), fault("head")) == {f"{LINEAR}.weight", "head.weight"}
