"""What a monitor needs is declared in one value, and an unknown need is named."""

import pytest

from foreshock.monitors.needs import Lookback, Needs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"view": ("optimiser",)}, "needs.view='optimiser' .*; the nearest is 'optimizer'"),
        ({"taps": ("dot_products",)}, "needs.taps='dot_products' .*; the nearest is 'dot_product'"),
        ({"taps": ("x",)}, "needs.taps='x' is not allowed: one of dot_product, linear, norm$"),
    ],
)
def test_an_unknown_need_is_refused_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        Needs(**arguments)


def test_an_oracle_is_what_reads_what_the_fault_does():
    assert Needs(view=("numerics",)).oracle and not Needs(view=("optimizer",)).oracle


def test_an_impossible_lookback_is_refused():
    with pytest.raises(ValueError, match=r"monitor\.windows=0 "):
        Lookback(0, 1, str.isidentifier)
