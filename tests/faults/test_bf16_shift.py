"""The paper's fault: its defaults, its window, and what it refuses."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from foreshock.faults.base import Sites
from foreshock.faults.bf16_shift import BF16Shift
from foreshock.models.numerics import HEALTHY_LAYER, AttentionNumerics, SiteFault

CONF = Path(__file__).parents[2] / "conf" / "fault"
HEALTHY_SITES = Sites(batch_size=16, lr_scale=0.5)


def from_yaml() -> BF16Shift:
    node = yaml.safe_load((CONF / "bf16_shift.yaml").read_text())
    assert node.pop("_target_") == "faults.bf16_shift.BF16Shift"
    return BF16Shift(tensors=tuple(node.pop("sites")), **node)


def test_the_yaml_is_the_paper_s_fault():
    """Saved O and incoming dO, 7 bits, toward zero, in the backward of every layer and head, from the first update."""
    expected = tuple(SiteFault(site, "backward", "truncate", 7, None, None) for site in ("o", "do"))
    assert from_yaml().sites(0, HEALTHY_SITES).numerics.faults == expected
    assert from_yaml().onset == 0 and 10**9 in from_yaml().window


def test_the_yaml_names_every_field():
    keys = set(yaml.safe_load((CONF / "bf16_shift.yaml").read_text())) - {"_target_"}
    assert keys == {field.metadata.get("key", field.name) for field in dataclasses.fields(BF16Shift)}


@pytest.mark.parametrize(
    ("onset", "duration", "faulty"), [(0, None, range(0, 9)), (3, None, range(3, 9)), (3, 2, range(3, 5))]
)
def test_outside_its_window_it_returns_the_very_healthy_sites(onset, duration, faulty):
    fault = BF16Shift(("o",), 7, onset=onset, duration=duration)
    assert [step for step in range(9) if fault.sites(step, HEALTHY_SITES) is not HEALTHY_SITES] == list(faulty)
    assert fault.onset == onset


def test_inside_its_window_it_changes_the_numerics_alone():
    got = BF16Shift(("o",), 7).sites(0, HEALTHY_SITES)
    assert got != HEALTHY_SITES
    assert dataclasses.replace(got, numerics=HEALTHY_SITES.numerics) == HEALTHY_SITES


def test_it_is_pure():
    fault, twin = (BF16Shift(("o", "do"), 7, onset=2, duration=5) for _ in range(2))
    forward = [fault.sites(step, HEALTHY_SITES) for step in range(9)]
    backward = [fault.sites(step, HEALTHY_SITES) for step in reversed(range(9))][::-1]
    assert forward == backward == [twin.sites(step, HEALTHY_SITES) for step in range(9)]
    assert fault == twin and hash(fault) == hash(twin)
    assert Sites(batch_size=16, lr_scale=0.5) == HEALTHY_SITES


def test_it_adds_to_what_an_earlier_fault_left():
    earlier = AttentionNumerics((SiteFault("q", "forward", "truncate", 3),))
    got = BF16Shift(("o",), 7).sites(0, dataclasses.replace(HEALTHY_SITES, numerics=earlier))
    assert got.numerics.faults == (*earlier.faults, SiteFault("o", "backward", "truncate", 7))


def test_every_field_reaches_the_sites():
    fault = BF16Shift(("q", "p"), 3, "round_half_up", "both", layers=(1,), heads=(0, 2))
    assert fault.corrupt.operation.faults == tuple(
        SiteFault(site, "both", "round_half_up", 3, (1,), (0, 2)) for site in ("q", "p")
    )


def test_zero_bits_are_the_healthy_control():
    numerics = BF16Shift(("o", "do"), 0).sites(0, HEALTHY_SITES).numerics
    assert all(numerics.layer(index) is HEALTHY_LAYER for index in range(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": ()}, r"sites=\[\]"),
        ({"tensors": ("O",)}, "site='O'"),
        ({"tensors": ("o", "o")}, "two faults on site 'o'"),
        ({"tensors": ("o", "do"), "phase": "forward"}, "site='do' has no forward value"),
        ({"bits": 9}, "bits=9 "),
        ({"bits": -1}, "bits=-1 "),
        ({"rounding": "nearest"}, "rounding='nearest'"),
        ({"phase": "back"}, "phase='back'"),
        ({"layers": ()}, r"layers=\[\]"),
        ({"heads": (1, 1)}, r"heads=\[1, 1\]"),
        ({"onset": -1}, "fault.onset=-1 "),
        ({"duration": 0}, "fault.duration=0 "),
    ],
)
def test_an_impossible_fault_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        BF16Shift(**{"tensors": ("o",), "bits": 7} | change)
