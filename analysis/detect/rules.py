"""The rules of ``conf/rule``: a chart by name, with parameters that are checked."""

from __future__ import annotations

from typing import Any

from foreshock.analysis.detect.charts import CHARTS, AlarmRule, Persistent
from foreshock.analysis.detect.river import RIVER, RiverDetector, check_river
from foreshock.experiments.validation import Parameter, check_arguments, check_named, parameters_of

OF_EVERY_RULE: dict[str, Parameter] = {"chart": (str, ...), "persistence": (int, 1)}
"""The parameters that a rule has whatever its chart."""


def make_rule(chart: str, persistence: int = 1, **parameters: Any) -> AlarmRule:
    """The chart of a ``conf/rule`` file, which must stay above its threshold for ``persistence`` samples.

    Raises ValueError on an unknown chart, and on wrong parameters by name.
    """
    check_arguments("rule", OF_EVERY_RULE, {"chart": chart, "persistence": persistence}, "rule")
    if persistence != 1:
        return Persistent(make_rule(chart, **parameters), persistence)
    check_named([chart], (*CHARTS, *RIVER), "rule.chart")
    if chart in RIVER:
        check_river(chart, parameters)
        return RiverDetector(chart, parameters)
    make = CHARTS[chart]
    return make(**check_arguments(chart, parameters_of(make), parameters, "rule"))
