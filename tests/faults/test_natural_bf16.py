"""The natural fault: what its YAML says, its window, what it is told to refuse, and that it leaves all else alone."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from foreshock.faults.base import Sites
from foreshock.faults.bf16_shift import BF16Shift
from foreshock.faults.natural_bf16 import NaturalBF16
from foreshock.models.arithmetic import Arithmetic
from foreshock.models.numerics import AttentionNumerics

CONF = Path(__file__).parents[2] / "conf" / "fault"
HEALTHY_SITES = Sites(batch_size=16)


def test_the_yaml_is_bf16_accumulation_without_a_cure():
    node = yaml.safe_load((CONF / "natural_bf16.yaml").read_text())
    assert node.pop("_target_") == "faults.natural_bf16.NaturalBF16"
    assert set(node) == {field.name for field in dataclasses.fields(NaturalBF16)}
    fault = NaturalBF16(**node)
    assert fault.sites(0, HEALTHY_SITES).numerics == AttentionNumerics(arithmetic=Arithmetic("bf16"))
    assert fault == NaturalBF16()


def test_inside_its_window_alone_it_changes_the_numerics_alone():
    fault = NaturalBF16(onset=3, duration=2)
    assert [step for step in range(9) if fault.sites(step, HEALTHY_SITES) is not HEALTHY_SITES] == [3, 4]
    got = fault.sites(3, HEALTHY_SITES)
    assert got != HEALTHY_SITES
    assert dataclasses.replace(got, numerics=HEALTHY_SITES.numerics) == HEALTHY_SITES


def test_every_field_reaches_the_arithmetic():
    cured = NaturalBF16(pv_block=8, stored_o="fp32", row_max="dynamic", beta=3.0)
    assert cured.corrupt.operation.arithmetic == Arithmetic("bf16", 8, "fp32", "o", "dynamic", 3.0)
    control = NaturalBF16(delta="p", row_max="offset", offset=0.5)
    assert control.corrupt.operation.arithmetic == Arithmetic("bf16", delta="p", row_max="offset", offset=0.5)


def test_fp32_accumulation_is_the_healthy_control():
    assert NaturalBF16(pv_accumulation="fp32").sites(0, HEALTHY_SITES) == HEALTHY_SITES


def test_it_adds_to_what_an_earlier_fault_left():
    earlier = BF16Shift(("o",), 7).sites(0, HEALTHY_SITES)
    both = NaturalBF16().sites(0, earlier).numerics
    assert both.faults == earlier.numerics.faults and both.arithmetic == Arithmetic("bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pv_block": 0}, "pv_block=0 is not allowed"),
        ({"row_max": "dynamic"}, "beta=None is not allowed"),
        ({"onset": -1}, "fault.onset=-1 "),
        ({"duration": 0}, "fault.duration=0 "),
    ],
)
def test_an_impossible_fault_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        NaturalBF16(**change)
