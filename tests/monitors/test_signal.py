"""A signal describes itself whole, and the manifest gives it back."""

import json
from dataclasses import asdict

import pytest

from foreshock.monitors.law import KEY_SHIFT, Law
from foreshock.monitors.signal import Signal, read_signal, with_ratio

RESIDUAL = Signal("key_shift_residual", "1", "up", ("layer", "head"), 10, family="conservation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bad": "sideways"}, "signal x: bad='sideways' .*up, down, both"),
        ({"bad": "up", "every_steps": 0}, "monitor.every_steps=0 "),
        ({"bad": "up", "axes": ("head",)}, r"signal x: axes=\('head',\) is not allowed"),
        ({"bad": "up", "kind": "exakt"}, "signal x: kind='exakt' .*; the nearest is 'exact'"),
        ({"bad": "up", "law": Law("norm", "q")}, "signal x: law='norm q' is not allowed with kind='level'"),
        ({"bad": "up", "universal": True}, "signal x: universal=True is not allowed with kind='level'"),
    ],
)
def test_an_impossible_signal_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Signal("x", "1", **arguments)


def test_a_law_of_no_known_kind_is_refused():
    with pytest.raises(ValueError, match=r"law\.kind='linear' .*; the nearest is 'linear layer'"):
        Law("linear", "q")


def test_a_residual_and_its_ratio_differ_in_what_they_are_held_against():
    residual, ratio = with_ratio(RESIDUAL, Law("attention", KEY_SHIFT), universal=True)
    assert residual == RESIDUAL and ratio.name == "key_shift_residual.over_noise"
    assert ratio.kind == "ratio_to_predicted_noise" and ratio.universal and str(ratio.law) == "key shift"
    assert (ratio.axes, ratio.every_steps, ratio.family) == (RESIDUAL.axes, 10, "conservation")


def test_a_signal_is_defined_where_its_name_begins_or_where_it_says():
    assert RESIDUAL.reference == "key_shift_residual"
    assert Signal("a.b.w50", "1", "up").reference == "a"
    assert Signal("held_out_loss", "nats/token", "up", reference="val_loss").reference == "val_loss"


@pytest.mark.parametrize("signal", [RESIDUAL, *with_ratio(RESIDUAL, Law("attention", KEY_SHIFT), universal=True)])
def test_what_a_manifest_keeps_is_the_signal(signal):
    assert read_signal(json.loads(json.dumps(asdict(signal)))) == signal


def test_a_description_with_something_else_is_no_signal():
    with pytest.raises(TypeError, match="constant_when_healthy"):
        read_signal(asdict(RESIDUAL) | {"constant_when_healthy": False})
