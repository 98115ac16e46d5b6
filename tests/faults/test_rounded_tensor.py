"""Tensors of modules rounded to a lower format: to the nearest number, in one place, and nothing else."""

import pytest
import torch

from foreshock.faults.log import InjectionLog
from foreshock.faults.rotary_format import RotaryFormat
from foreshock.faults.rounded_tensor import RoundedTensor
from foreshock.faults.rounding import FORMATS, nearest
from foreshock.models.corruption import Corrupted, ModuleFault
from foreshock.models.mlp import MLP
from foreshock.models.moe import MoEConfig
from foreshock.models.taps import Taps
from foreshock.models.transformer import Rotary, Transformer, TransformerConfig

CONFIG = dict(d_model=16, n_layers=2, n_heads=2, d_ff=32, context_length=8, vocab_size=11, positions="rope")
TOKENS = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
MODULES = ("tokens", "head", "blocks.0", "blocks.1.mlp", "blocks.0.attention.rotary", "blocks.0.attention.q")


def outputs_of(*changes, module: str, log=None, **config):
    """What a module gives first, the gradient at it, and every parameter's."""
    model = Transformer(TransformerConfig(**CONFIG | config)).initialise(torch.Generator().manual_seed(0))
    seen = {}

    def look(_, arguments, output):
        output = output[0] if isinstance(output, tuple) else output
        seen.setdefault("y", output.detach())
        output.register_hook(lambda gradient: seen.setdefault("dy", gradient))

    with Corrupted(model, changes, log):
        model.get_submodule(module).register_forward_hook(look)
        model.loss(TOKENS).backward()
    return seen["y"], seen["dy"], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("number_format", FORMATS)
def test_rounding_is_to_the_nearest_number(number_format):
    """At most half a unit in the last place away, in the range of normal numbers; twice is once."""
    digits = {"fp32": 24, "bf16": 8, "fp16": 11, "fp8_e4m3": 4, "fp8_e5m2": 3}[number_format]
    x = torch.linspace(-3.9, 3.9, 1001).exp()  # 0.02 to 49, normal in all of them
    rounded = nearest(x, number_format)
    assert ((rounded - x).abs() <= x * 2.0**-digits).all()
    assert torch.equal(nearest(rounded, number_format), rounded)


def test_values_by_hand():
    x = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, 1e6, -1e6, float("nan")])
    assert nearest(x, "bf16")[:2].tolist() == [1.0, 1 + 2**-7]
    assert nearest(x, "fp16")[2] == float("inf")
    assert nearest(x, "fp8_e4m3")[2:4].tolist() == [448.0, -448.0]
    assert nearest(x, "fp8_e5m2")[2:4].tolist() == [57344.0, -57344.0]
    assert all(nearest(x, name).isnan()[-1] for name in FORMATS)


@pytest.mark.parametrize("module", MODULES)
def test_an_output_is_rounded_and_nothing_before_it(module):
    log = InjectionLog()
    y, _, _ = outputs_of(RoundedTensor(module, "y", "bf16"), module=module, log=log)
    clean, _, _ = outputs_of(module=module)
    assert torch.equal(y, clean.bfloat16().float()) and not torch.equal(y, clean)
    assert log.entries()[0]["tensor"] == f"{module} y" and log.entries()[0]["elements"] > 0


@pytest.mark.parametrize("module", ["head", "blocks.1", "blocks.1.attention.rotary"])
def test_an_arriving_gradient_is_rounded_and_the_forward_is_not(module):
    y, dy, _ = outputs_of(RoundedTensor(module, "dy", "bf16"), module=module)
    clean_y, clean_dy, _ = outputs_of(module=module)
    assert torch.equal(y, clean_y) and torch.equal(dy, clean_dy.bfloat16().float())


def test_a_weight_s_gradient_is_rounded_alone():
    _, _, gradients = outputs_of(RoundedTensor("tokens", "dw", "bf16"), module="tokens", tie_embeddings=False)
    _, _, clean = outputs_of(module="tokens", tie_embeddings=False)
    assert {name for name in clean if not torch.equal(clean[name], gradients[name])} == {"tokens.weight"}
    assert torch.equal(gradients["tokens.weight"], clean["tokens.weight"].bfloat16().float())


@pytest.mark.parametrize("module", ["blocks.1.mlp.router", "blocks.0.mlp", "blocks.1"])
def test_routers_and_what_gives_a_routing_beside_it_can_be_rounded(module):
    moe = {"moe": MoEConfig(4, 2)}
    y, _, _ = outputs_of(RoundedTensor(module, "y", "fp8_e5m2"), module=module, **moe)
    clean, _, _ = outputs_of(module=module, **moe)
    assert torch.equal(y, nearest(clean, "fp8_e5m2"))


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_norm_s_statistics_are_rounded_as_in_fp64(norm):
    """FP32 may round a statistic over a tie, to the neighbour: within a unit of BF16, 2^-7, of the exact one."""
    name = "blocks.1.mlp_norm"
    model = Transformer(TransformerConfig(**CONFIG | {"norm": norm})).initialise(torch.Generator().manual_seed(0))
    with Corrupted(model, [RoundedTensor(name, "statistics", "bf16")]), Taps(model, ("norm",)) as taps:
        model.loss(TOKENS).backward()
    tap = taps.at("norm")[name]
    x = tap.inputs[0].double()
    mean = x.mean(-1, keepdim=True) if norm == "layernorm" else torch.zeros(()).double()
    epsilon = tap.module.eps
    scale = ((x - mean).square().mean(-1, keepdim=True) + epsilon).rsqrt()
    expected = (x - mean.bfloat16().double()) * scale.bfloat16().double()
    bound = expected.abs() * 2**-7 + mean.abs() * scale * 2**-7
    assert ((tap.output.double() - expected).abs() <= bound + 1e-6).all()
    exact = (x - mean) * scale
    assert (tap.output.double() - expected).abs().median() < 1e-3 * (tap.output.double() - exact).abs().median()


@pytest.mark.parametrize("module", MODULES)
def test_fp32_is_healthy_bit_for_bit(module):
    log = InjectionLog()
    y, dy, gradients = outputs_of(RoundedTensor(module, "y", "fp32"), module=module, log=log)
    clean_y, clean_dy, clean = outputs_of(module=module)
    assert torch.equal(y, clean_y) and torch.equal(dy, clean_dy) and log.entries() == []
    assert all(torch.equal(gradients[name], clean[name]) for name in clean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("head", "y", "int8"), "fault.format='int8' is not allowed: one of bf16, fp16"),
        (("head", "w", "bf16"), "site='w' is not allowed: one of y, dy, dx, dw, statistics"),
        (("head", "statistics", "bf16"), "fault.site='statistics' is not allowed for 'head': it is no norm"),
        (("blocks.0", "dw", "bf16"), "fault.site='dw' is not allowed for 'blocks.0': it has no weight of its own"),
        (("tokens", "dx", "bf16"), "fault.site='dx' is not allowed for 'tokens': its input is token ids"),
        (("positions", "y", "bf16"), "the model has no 'positions'; the nearest are"),
        (("blocks.0.attention.dot_product", "y", "bf16"), "the model has no 'blocks.0.attention.dot_product'"),
    ],
)
def test_an_impossible_place_is_refused_by_name(change, message):
    model = Transformer(TransformerConfig(**CONFIG | {"positions": "learned"}))
    with pytest.raises(ValueError, match=message):
        Corrupted(model, [RoundedTensor(*change)])


def test_two_changes_of_one_tensor_meet():
    model = Transformer(TransformerConfig(**CONFIG))
    for other in (ModuleFault("final_norm", "y", "truncate", 3), RoundedTensor("final_norm", "statistics", "fp16")):
        with pytest.raises(ValueError, match="2 faults on 'y' of final_norm meet"):
            Corrupted(model, [RoundedTensor("final_norm", "y", "bf16"), other])


def test_rotary_phases_are_those_of_bf16_by_hand_and_come_back():
    model = Transformer(TransformerConfig(**CONFIG))
    rotary = model.blocks[1].attention.rotary
    exact, log = (rotary.cos, rotary.sin), InjectionLog()
    with Corrupted(model, [RotaryFormat("bf16")], log):
        frequency = torch.tensor([1.0, 0.1, 0.01, 0.001]).bfloat16()  # 10000^(-2i / 8)
        angle = torch.stack([(torch.tensor(t).bfloat16() * frequency).float() for t in range(8)]).repeat(1, 2)
        assert torch.equal(rotary.cos, angle.cos()) and torch.equal(rotary.sin, angle.sin())
        assert not torch.equal(rotary.cos, exact[0])
    assert rotary.cos is exact[0] and rotary.sin is exact[1]
    names = {f"blocks.{layer}.attention.rotary.{table}" for layer in (0, 1) for table in ("cos", "sin")}
    assert {entry["tensor"] for entry in log.entries()} == names
    with Corrupted(model, [RotaryFormat("fp32")]):
        assert rotary.cos is exact[0]


def test_beyond_256_positions_alias_in_bf16():
    cos, sin = Rotary(8, 520, 10000.0).tables(torch.bfloat16)
    assert torch.equal(cos[512], cos[513]) and torch.equal(sin[512], sin[513])
    assert not torch.equal(cos[254], cos[255])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=rope_bf16"], "fault.format='bf16' has no effect on model.positions='learned'"),
        (["fault=rope_bf16", "model.positions=rope", "fault.format=fp8"], "fault.format='fp8' is not allowed"),
        (["fault=rounded_module", "fault.modules=[]"], r"modules=\[\] is not allowed"),
        (["fault=rounded_module", "fault.modules=[blocks.0.mlp.router]"], "the model has no 'blocks.0.mlp.router'"),
    ],
)
def test_an_impossible_fault_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)


def elements_changed(model_config, change) -> int:
    log, model = InjectionLog(), Transformer(model_config, "bf16").initialise(torch.Generator().manual_seed(0))
    tokens = torch.randint(model_config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    with Corrupted(model, [change], log):
        model.loss(tokens).backward()
    return sum(entry["elements"] for entry in log.entries())


@pytest.mark.parametrize("model", ["mha_nano", "moe_nano"])
@pytest.mark.parametrize("site", ["y", "dy", "dx", "dw"])
def test_what_is_bf16_already_is_refused_and_nothing_else(make_run, model, site):
    """Every module of a model under BF16 autocast: a refused change is none, and all that are not norms' are changes.

    The gradient at a norm's output is that of whatever reads it, one product or several: the log tells.
    """
    run = make_run(f"model={model}", "model.positions=rope", "train.precision=bf16")
    refused = set()
    for name, module in Transformer(run.model_config).named_modules():
        change = RoundedTensor(name, site, "bf16")
        try:
            change.find(Transformer(run.model_config))
        except ValueError:
            continue
        try:
            change.check_fits(run.model_config, run.train)
        except ValueError as error:
            assert f"fault.format='bf16' has no effect on {site!r} of {name}: it is BF16 already" in str(error)
            assert elements_changed(run.model_config, change) == 0
            refused.add(name)
        else:
            if not isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm, MLP)):
                assert elements_changed(run.model_config, change) > 0
    assert "head" in refused and "blocks.0.mlp.input" in refused


def test_the_same_rounding_is_allowed_in_fp32_and_a_lower_format_in_bf16(make_run):
    rounded = ["fault=rounded_module", "fault.modules=[head]"]
    make_run(*rounded, "fault.format=bf16")
    make_run(*rounded, "fault.format=fp8_e4m3", "train.precision=bf16")
    with pytest.raises(ValueError, match=r"fault.format='bf16' has no effect on 'y' of head"):
        make_run(*rounded, "fault.format=bf16", "train.precision=bf16")
