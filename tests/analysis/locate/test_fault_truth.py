"""A manifest's fault node says which class of sites it hits, where."""

from types import SimpleNamespace

import pytest

from foreshock.analysis.locate import fault_truth
from foreshock.analysis.locate.fault_truth import HEALTHY, OTHER, Truth, truth, truth_of
from foreshock.models import numerics

ATTENTION = {"bits": 2, "rounding": "truncate", "phase": "backward", "layers": None, "heads": None, "onset": 0}
MODULE = {"bits": 2, "rounding": "flip", "share": 0.0, "onset": 0}
ROUTERS = ["blocks.1.mlp.router", "blocks.0.mlp.router"]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"sites": ["delta"], **ATTENTION}, Truth("o delta dp ds v")),
        ({"sites": ["o", "do"], **ATTENTION}, Truth("p s")),  # together they break what P and S break
        ({"sites": ["dq", "do"], **ATTENTION}, Truth(None)),
        ({"sites": ["dk"], **ATTENTION | {"layers": [1], "heads": [0, 1]}}, Truth("dk", None, (1,), (0, 1))),
        ({"sites": ["o"], **ATTENTION | {"phase": "both"}}, Truth(None)),
        ({"sites": ["o"], **ATTENTION | {"bits": 0}}, Truth(OTHER)),
        ({"modules": ["blocks.1.mlp.input"], "site": "y", **MODULE}, Truth("linear layer", "input", (1,))),
        ({"modules": ["blocks.0.mlp.shared.gate"], "site": "dw", **MODULE}, Truth("linear layer", "shared_gate", (0,))),
        ({"modules": ["blocks.0.mlp.shared.gate"], "site": "dx", **MODULE}, Truth(None)),
        ({"modules": ["blocks.0.mlp.gate"], "site": "dx", **MODULE}, Truth("linear layer", "gate", (0,))),
        ({"modules": ["blocks.0.mlp.output"], "site": "dx", **MODULE}, Truth(None)),
        ({"modules": ["blocks.0.attention.k"], "site": "dx", **MODULE}, Truth("linear layer", "k", (0,))),
        ({"modules": ROUTERS, "site": "dy", **MODULE}, Truth("router", "router", (0, 1))),
        ({"modules": ROUTERS, "site": "dx", **MODULE}, Truth(None)),
        ({"modules": ROUTERS, "site": "dw", **MODULE}, Truth("router", "router", (0, 1))),
        ({"modules": ["blocks.2.attention.q_norm"], "site": "dx", **MODULE}, Truth("norm", "q", (2,))),
        ({"modules": ["final_norm"], "site": "dx", **MODULE}, Truth("norm", "final")),
        ({"modules": ["final_norm"], "site": "y", **MODULE}, Truth(None)),
        ({"modules": ["final_norm"], "site": "dw", **MODULE}, Truth(None)),
        ({"modules": ["head"], "site": "dy", **MODULE}, Truth("loss kernel", "loss kernel")),
        ({"modules": ["head"], "site": "dw", **MODULE}, Truth("linear layer", "head")),
        ({"modules": ["blocks.0.attention.q"], "site": "dy", **MODULE}, Truth(None)),
        ({"modules": ["tokens"], "site": "y", **MODULE}, Truth(None)),
        ({"modules": ["head", "final_norm"], "site": "dx", **MODULE}, Truth(None)),
        ({"factor": 10.0}, Truth(OTHER)),
        ({"faults": {"a": {"sites": ["dq"], **ATTENTION}, "b": {"factor": 10.0}}}, Truth("dq")),
        ({"faults": {"a": {"sites": ["dq"], **ATTENTION}, "b": {"sites": ["o"], **ATTENTION}}}, Truth(None)),
        ({"faults": {"b": {"factor": 10.0}}}, Truth(OTHER)),
        ({"pv_accumulation": "bf16", "pv_block": 1, "onset": 0}, Truth(None)),
    ],
)  # fmt: skip
def test_the_truth_of_a_fault(fault, expected):
    assert truth(fault, onset=1) == expected


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
    fault = {"sites": sites, **ATTENTION, "heads": heads}
    assert truth(fault, 1, shared=2).heads == expected
    both = {"faults": {"a": fault, "b": {"factor": 10.0}}}
    assert truth(both, 1, shared=2).heads == expected


def test_the_sites_of_key_value_heads_are_those_of_the_kernel():
    assert fault_truth.KEY_VALUE_SITES == numerics.KEY_VALUE_SITES


@pytest.mark.parametrize(
    ("model", "heads"),
    [({}, (1,)), ({"n_heads": 4, "n_kv_heads": None}, (1,)), ({"n_heads": 4, "n_kv_heads": 2}, (0,))],
)
def test_the_truth_of_a_run_knows_its_groups(model, heads):
    config = {"fault": {"sites": ["o"], **ATTENTION, "heads": [1]}, "model": model}
    assert truth_of(SimpleNamespace(manifest={"config": config}, onset=1)).heads == heads


def test_without_onset_a_run_is_healthy():
    assert truth({"_target_": "faults.none.NoFault"}, None) == Truth(HEALTHY)


def test_the_input_of_experts_obeys_no_law():
    """It also feeds the choice of experts; their weights' law stays."""
    fault = {"modules": ["blocks.0.mlp.input"], **MODULE}
    assert truth(fault | {"site": "dx"}, 1, experts=True) == Truth(None)
    assert truth(fault | {"site": "dx"}, 1) == truth(fault | {"site": "y"}, 1, experts=True)
