"""Live rules on a saved run's readings raise the alarms of ``analysis.detect``, at the same steps."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from foreshock.alarms.budget import Budget
from foreshock.alarms.rules import SIGNS, Exact, NonFinite, Published, Rule, Self, Universal, student_threshold
from foreshock.analysis.detect.alarms import chart_statistics, first_alarm, oriented, worst
from foreshock.analysis.detect.bands import Exact as OfflineExact
from foreshock.analysis.detect.bands import SelfBand, finite_or_inf
from foreshock.analysis.detect.charts import Shewhart
from foreshock.analysis.detect.published import published_rule
from foreshock.analysis.detect.tracks.universal import universal_threshold
from foreshock.analysis.runs import reduced
from foreshock.analysis.runs.align import Aligned
from foreshock.experiments import trace
from foreshock.experiments.build import ROOT
from foreshock.experiments.trace import Series
from foreshock.monitors.signal import EXACT, Signal
from tests.alarms.readings import told_again

FOLDER = ROOT / "results" / "reference_set" / "moe"


@pytest.fixture(scope="module")
def runs():
    """A run each of two faults and a healthy one: their rows of the table, which takes long to read whole."""
    records = json.loads(reduced.content(FOLDER, reduced.RUNS))
    manifests = {run: reduced.merged(records["shared"], own) for run, own in records["runs"].items()}
    kinds = {str(manifest["config"]["fault"]): run for run, manifest in manifests.items()}
    kinds = dict(sorted(kinds.items())[:3])
    assert len(kinds) == 3
    table = pq.read_table(FOLDER / reduced.SIGNALS, filters=[("run", "in", list(kinds.values()))])
    column = pc.dictionary_encode(table["signal"])
    table = table.set_column(table.column_names.index("signal"), "signal", column)
    traces = []
    for run in kinds.values():
        series = trace.series_of(table.filter(pc.equal(table["run"], run)), run)
        traces.append(reduced.ReducedTrace(run, FOLDER, trace.as_of_today(manifests[run], FOLDER), series))
    return traces


def aligned(run, name):
    series = run.signals[name]
    return Aligned(series.steps, series.values, series.undefined)


def live(rule: Rule, run) -> dict[str, int]:
    """By signal, the first step that breaks a rule, or is not finite."""
    names = [name for name in run.signals if rule.applies(run.described[name])]
    first: dict[str, int] = {}
    lost = NonFinite()
    for step, readings in told_again(run, names):
        for name in rule.judge(readings).keys() | lost.judge(readings).keys():
            first.setdefault(name, step)
    assert names
    return {name: first.get(name) for name in names}


def compared(rule: Rule, runs, statistic, limit) -> int:
    """Every signal's first alarm, live and offline; how many there are."""
    alarms = 0
    for run in runs:
        for name, step in live(rule, run).items():
            series, signal = aligned(run, name), run.described[name]
            offline = first_alarm(statistic(signal, series), series.positions, limit(signal, series, run))
            assert step == offline, (run.run_id, name)
            alarms += offline is not None
    return alarms


def test_universal(runs):
    signals = runs[0].described.values()
    count = sum(signal.universal for signal in signals)

    def limit(signal, series, run):
        cells = series.values[0].size
        return universal_threshold(cells * (run.horizon // signal.every_steps), 0.05 / count)

    def alarms(horizon, runs):
        rule = Universal(Budget(0.05, horizon), signals)
        return compared(rule, runs, lambda signal, series: worst(finite_or_inf(series)), limit)

    assert sum(alarms(run.horizon, [run]) for run in runs) > 0


def test_self(runs):
    def statistic(signal, series):
        return chart_statistics([oriented(SelfBand().z(series), signal.bad)], [Shewhart()] * len(SIGNS[signal.bad]))[0]

    def limit(signal, series, run):
        cells = series.values[0].size * len(SIGNS[signal.bad])
        return student_threshold(0.05 / (run.horizon // signal.every_steps) / (count * cells))

    alarms = 0
    for run in runs:
        signals = [run.described[name] for name in run.signals]
        rule = Self(Budget(0.05, run.horizon), signals)
        count = sum(map(rule.applies, signals))
        alarms += compared(rule, [run], statistic, limit)
    assert alarms > 10


def test_published(runs):
    def statistic(signal, series):
        return published_rule(signal).broken_at(series).astype(float)

    assert sum(compared(Published(), [run], statistic, lambda *_: 0.5) for run in runs) > 0


def test_exact(runs):
    def statistic(signal, series):
        return worst(OfflineExact().z(series))

    run, name = runs[0], "nan_inf_events"
    steps = np.arange(1, 21)
    counts = np.where(steps < 9, 0.0, 3.0)[:, None, None]
    described = {name: Signal(name, "count", "up", kind=EXACT)}
    run = reduced.ReducedTrace("mine", FOLDER, run.manifest, {name: Series(steps, steps, counts, counts < 0)})
    run.__dict__["described"] = described
    assert compared(Exact(), [run], statistic, lambda *_: 0.0) == 1 and live(Exact(), run) == {name: 9}


def test_a_value_that_is_not_finite_alarms_on_both(runs):
    run = runs[0]
    name = next(name for name in run.signals if run.described[name].universal)
    run.signals[name].values[7, 0, 0] = np.nan
    assert live(Universal(Budget(0.05, run.horizon), run.described.values()), run)[name] is not None
    assert np.isinf(finite_or_inf(aligned(run, name))[7, 0, 0])
