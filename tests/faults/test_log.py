"""The injection log counts what was changed, and names an injection that changed nothing."""

import math

import pytest
import torch

from foreshock.faults.base import Sites
from foreshock.faults.bf16_shift import BF16Shift
from foreshock.faults.gradient_scale import GradientScale
from foreshock.faults.log import MEASURED_STEPS, InjectionLog
from foreshock.faults.logged_numerics import LoggedNumerics
from foreshock.faults.module_shift import ModuleShift
from foreshock.faults.operation import Moment
from foreshock.faults.points import corrupt_tensors
from foreshock.models.bits import truncate
from foreshock.models.corruption import Corrupted
from foreshock.models.transformer import Transformer, TransformerConfig

HEALTHY = Sites(batch_size=8)
CONFIG = TransformerConfig(d_model=16, n_layers=2, n_heads=2, d_ff=32, context_length=8, vocab_size=11)
TOKENS = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))


def entry(log: InjectionLog) -> dict:
    (only,) = log.entries()
    return only


def test_elements_and_norm_of_a_change_add_up_over_the_measured_steps():
    log = InjectionLog()
    for log.step in range(MEASURED_STEPS + 5):
        log.add("weights", "flip", "w", torch.tensor([1.0, 2.0, math.nan]), torch.tensor([4.0, 2.0, math.nan]))
    assert entry(log) == {
        "point": "weights",
        "operation": "flip",
        "tensor": "w",
        "steps": MEASURED_STEPS,
        "elements": MEASURED_STEPS,
        "norm": pytest.approx(3.0 * MEASURED_STEPS**0.5),
    }


def test_it_goes_on_from_its_state():
    whole, first, resumed = InjectionLog(), InjectionLog(), InjectionLog()
    for log, steps in ((whole, range(4)), (first, range(2))):
        for log.step in steps:
            log.add("weights", "flip", "w", torch.zeros(2), torch.ones(2))
    resumed.load_state_dict(first.state_dict())
    for resumed.step in range(2, 4):
        resumed.add("weights", "flip", "w", torch.zeros(2), torch.ones(2))
    assert resumed.entries() == whole.entries()


def gradients_of_zero(steps: int) -> InjectionLog:
    log = InjectionLog()
    for log.step in range(steps):
        tensors = {"tokens.weight": torch.zeros(3)}
        corrupt_tensors("gradients", tensors, GradientScale(3.0).sites(0, HEALTHY).gradients, Moment(0, 0, 11), log)
    return log


def test_an_injection_that_changes_nothing_is_named():
    with pytest.raises(ValueError, match=r"fault: ScaledGradients\(group=None, factor=3.0\) at 'gradients' changed no"):
        gradients_of_zero(MEASURED_STEPS).check(ended=False)
    with pytest.raises(ValueError, match="in its first 2 steps"):
        gradients_of_zero(2).check(ended=True)
    gradients_of_zero(2).check(ended=False)


def test_a_control_is_no_injection():
    log = InjectionLog()
    operations = GradientScale(1.0).sites(0, HEALTHY).gradients
    corrupt_tensors("gradients", {"tokens.weight": torch.ones(3)}, operations, Moment(0, 0, 11), log)
    log.check(ended=True)
    assert log.entries() == []


def gradients_of(sites: Sites, log: InjectionLog | None = None) -> dict[str, torch.Tensor]:
    model = Transformer(CONFIG).initialise(torch.Generator().manual_seed(0))
    numerics = sites.numerics if log is None else LoggedNumerics(sites.numerics, (log,))
    with Corrupted(model, sites.modules, log):
        model.loss(TOKENS, numerics).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_module_s_change_is_measured_and_keeps_its_bits():
    sites, log = ModuleShift(("blocks.1.mlp.input",), "dw", 3).sites(0, HEALTHY), InjectionLog()
    healthy, faulty, logged = gradients_of(HEALTHY), gradients_of(sites), gradients_of(sites, log)
    assert all(torch.equal(faulty[name], logged[name]) for name in faulty)
    before = healthy["blocks.1.mlp.input.weight"]
    change = truncate(before.bfloat16(), 3).float() - before
    assert entry(log)["tensor"] == "blocks.1.mlp.input dw" and entry(log)["elements"] == int((change != 0).sum())
    assert entry(log)["norm"] == pytest.approx(float(change.double().norm()))


def test_attention_s_changes_are_measured_by_site_and_pass_and_keep_their_bits():
    sites, log = BF16Shift(("o", "do"), 7).sites(0, HEALTHY), InjectionLog()
    faulty, logged = gradients_of(sites), gradients_of(sites, log)
    assert all(torch.equal(faulty[name], logged[name]) for name in faulty)
    assert [(e["point"], e["operation"]) for e in log.entries()] == [
        ("numerics", "do backward"),
        ("numerics", "o backward"),
    ]
    of_a_site = CONFIG.n_layers * len(TOKENS) * CONFIG.context_length * CONFIG.d_model
    assert all(of_a_site / 2 < e["elements"] <= of_a_site and e["norm"] > 0 for e in log.entries())


def test_zero_bits_of_attention_are_no_injection():
    log = InjectionLog()
    gradients_of(BF16Shift(("o", "do"), 0).sites(0, HEALTHY), log)
    assert log.entries() == []
