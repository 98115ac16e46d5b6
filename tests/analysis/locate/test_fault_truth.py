"""A run's injection card says which class of sites its fault hits, where."""

from pathlib import Path

import pytest

from foreshock.analysis.locate import fault_truth
from foreshock.analysis.locate.fault_truth import HEALTHY, OTHER, Truth, truth, truth_of
from foreshock.experiments.trace import Trace
from foreshock.faults.card import InjectionCard
from foreshock.faults.dropout_mismatch import DropoutMismatch
from foreshock.faults.natural_bf16 import NaturalBF16
from foreshock.faults.rope_bf16 import RopeBF16
from foreshock.faults.tied_gradient_double import TiedGradientDouble
from foreshock.faults.untied import Untied
from foreshock.models import numerics
from tests.injections import card, of_attention, of_learning_rate, of_modules

ROUTERS = ["blocks.1.mlp.router", "blocks.0.mlp.router"]


@pytest.mark.parametrize(
    ("injections", "expected"),
    [
        ([of_attention(["delta"], 2)], Truth("o delta dp ds v")),
        ([of_attention(["o", "do"], 2)], Truth("p s")),  # together they break what P and S break
        ([of_attention(["dq", "do"], 2)], Truth(None)),
        ([of_attention(["dk"], 2, layers=[1], heads=[0, 1])], Truth("dk", None, (1,), (0, 1))),
        ([of_attention(["o"], 2, phase="both")], Truth(None)),
        ([of_attention(["o"], 0)], Truth(OTHER)),
        ([of_modules(["blocks.1.mlp.input"], "y")], Truth("linear layer", "input", (1,))),
        ([of_modules(["blocks.0.mlp.shared.gate"], "dw")], Truth("linear layer", "shared_gate", (0,))),
        ([of_modules(["blocks.0.mlp.shared.gate"], "dx")], Truth(None)),
        ([of_modules(["blocks.0.mlp.gate"], "dx")], Truth("linear layer", "gate", (0,))),
        ([of_modules(["blocks.0.mlp.output"], "dx")], Truth(None)),
        ([of_modules(["blocks.0.attention.k"], "dx")], Truth("linear layer", "k", (0,))),
        ([of_modules(ROUTERS, "dy")], Truth("router", "router", (0, 1))),
        ([of_modules(ROUTERS, "dx")], Truth(None)),
        ([of_modules(ROUTERS, "dw")], Truth("router", "router", (0, 1))),
        ([of_modules(["blocks.2.attention.q_norm"], "dx")], Truth("norm", "q", (2,))),
        ([of_modules(["final_norm"], "dx")], Truth("norm", "final")),
        ([of_modules(["final_norm"], "y")], Truth(None)),
        ([of_modules(["final_norm"], "dw")], Truth(None)),
        ([of_modules(["head"], "dy")], Truth("loss kernel", "loss kernel")),
        ([of_modules(["head"], "dw")], Truth("linear layer", "head")),
        ([of_modules(["blocks.0.attention.q"], "dy")], Truth(None)),
        ([of_modules(["tokens"], "y")], Truth(None)),
        ([of_modules(["head", "final_norm"], "dx")], Truth(None)),
        ([of_learning_rate(10.0)], Truth(OTHER)),
        ([of_attention(["dq"], 2), of_learning_rate(10.0)], Truth("dq")),
        ([of_attention(["dq"], 2), of_attention(["o"], 2)], Truth(None)),
        ([], Truth(OTHER)),
        (NaturalBF16(pv_block=1).describe().injections, Truth(None)),
        (RopeBF16().describe().injections, Truth(None)),
        (DropoutMismatch().describe().injections, Truth(None)),
        (DropoutMismatch((0, 1)).describe().injections, Truth(None)),
        (TiedGradientDouble("head").describe().injections, Truth(None)),
        (Untied("embedding").describe().injections, Truth(None)),
    ],
)  # fmt: skip
def test_the_truth_of_a_fault(injections, expected):
    assert truth(InjectionCard("other", tuple(injections)), onset=1) == expected


@pytest.mark.parametrize(
    ("sites", "heads", "expected"),
    [
        (["dq"], [0, 1], (0,)),
        (["dq"], [3], (1,)),
        (["o"], [2, 1], (0, 1)),
        (["dk"], [1], (1,)),
        (["v"], [0], (0,)),
        (["q", "k"], [0, 1], (0, 1)),
        (["p"], None, None),
    ],
)
def test_a_fault_in_a_query_head_breaks_the_laws_of_its_group(sites, heads, expected):
    """Two query heads to a key-value head, whose number the laws go by."""
    fault = of_attention(sites, 2, heads=heads)
    for injections in ((fault,), (fault, of_learning_rate(10.0))):
        assert truth(InjectionCard("other", injections), 1, shared=2).heads == expected


def test_the_sites_of_key_value_heads_are_those_of_the_kernel():
    assert fault_truth.KEY_VALUE_SITES == numerics.KEY_VALUE_SITES


@pytest.mark.parametrize(
    ("model", "heads"),
    [({}, (1,)), ({"n_heads": 4, "n_kv_heads": None}, (1,)), ({"n_heads": 4, "n_kv_heads": 2}, (0,))],
)
def test_the_truth_of_a_run_knows_its_groups(model, heads):
    manifest = {"config": {"model": model}, "onset_step": 1, "injection": card(of_attention(["o"], 2, heads=[1]))}
    assert truth_of(Trace("run", Path(), manifest)).heads == heads


def test_without_onset_a_run_is_healthy():
    assert truth(InjectionCard("other"), None) == Truth(HEALTHY)


def test_the_input_of_experts_obeys_no_law():
    """It also feeds the choice of experts; their weights' law stays."""
    dx, y = (InjectionCard("other", (of_modules(["blocks.0.mlp.input"], tensor),)) for tensor in ("dx", "y"))
    assert truth(dx, 1, experts=True) == Truth(None)
    assert truth(dx, 1) == truth(y, 1, experts=True)
