"""A budget is never overspent, whatever the cadence and however long the run."""

import math

import pytest

from foreshock.alarms.budget import Budget
from foreshock.analysis.detect.tracks.universal import universal_threshold


def spent(budget: Budget, steps: list[int], every: int, looks: int = 4, signals: int = 3) -> float:
    """Over all signals and looks."""
    pairs = zip([0, *steps], steps, strict=False)
    return sum(signals * looks * budget.a_look(now, before, every, looks, signals) for before, now in pairs)


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_an_open_budget_stays_below_alpha(every):
    total = spent(Budget(0.05), list(range(every, 200 * every, every)), every)
    assert 0 < total < 0.05
    assert spent(Budget(0.05), [10**12], every) < 0.05


def test_an_open_budget_spends_the_same_at_jittered_steps():
    even, uneven = spent(Budget(0.05), [10, 20, 30], 10), spent(Budget(0.05), [11, 26, 30], 10)
    assert math.isclose(even, uneven, rel_tol=1e-9)


def test_a_planned_budget_is_spent_at_its_horizon():
    assert math.isclose(spent(Budget(0.05, 1000), list(range(10, 1001, 10)), 10), 0.05)
    assert Budget(0.05, 1000).per_million_steps(10) == pytest.approx(50)


def test_a_planned_budget_gives_the_number_of_the_universal_track():
    from scipy.special import ndtri

    level = Budget(0.05, 2500).a_look(20, 10, 10, 8, 1)
    assert -ndtri(level / 2) == pytest.approx(universal_threshold(250 * 8, 0.05), rel=1e-12)


def test_the_rate_of_an_open_budget_is_its_slope():
    budget = Budget(0.05)
    slope = spent(budget, [5000, 5001], 1) - spent(budget, [5000], 1)
    assert budget.per_million_steps(5000) == pytest.approx(1e6 * slope, rel=1e-3)


@pytest.mark.parametrize(("fields", "name"), [((0.0,), "alpha"), ((1.0,), "alpha"), ((0.1, 0), "horizon_steps")])
def test_what_is_not_allowed_is_named(fields, name):
    with pytest.raises(ValueError, match=name):
        Budget(*fields)
