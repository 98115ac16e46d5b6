"""Thresholds from healthy runs: what they promise, their file, and the live rule that follows it."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import foreshock
from foreshock.__main__ import COMMANDS
from foreshock.alarms.panel import FILE
from foreshock.alarms.settings import AlarmRules
from foreshock.analysis import calibrate
from foreshock.analysis.detect.alarms import chart_statistics, conformal_threshold, first_alarm, oriented
from foreshock.analysis.detect.bands import ReferenceBand, SelfBand
from foreshock.analysis.detect.calibration import _joint_limits, calibrated
from foreshock.analysis.detect.charts import EWMA
from foreshock.analysis.runs.align import Aligned
from foreshock.experiments import trace
from foreshock.monitors.signal import Signal
from tests.alarms.readings import panel, reading, told_again
from tests.attaching.loops import gpt

SIGNALS = (
    Signal("train_loss_raw", "nats", "up", family="optimization"),
    Signal("attn_entropy", "nats", "both", ("layer", "head"), 2, family="model_behavior"),
)
STEPS = 60
CHART = {"chart": "ewma", "weight": 0.2}


def write_run(folder, seed: int, jump: float = 0.0, onset: int | None = None, end_reason: str = "completed", skips=()):
    """An ended run of noise; from ``onset`` on both signals are higher by ``jump``; skips: steps without a reading."""
    rng, columns = np.random.default_rng(seed), {name: [] for name in trace.SCHEMA.names}
    for signal in SIGNALS:
        for step in range(signal.every_steps, STEPS + 1, signal.every_steps):
            if step in skips:
                continue
            cells = [(-1, -1)] if not signal.axes else [(layer, head) for layer in range(2) for head in range(2)]
            for layer, head in cells:
                value = rng.normal() + (jump if onset is not None and step > onset else 0.0)
                row = (step, 64 * step, signal.name, layer, head, value, False)
                for name, x in zip(columns, row, strict=True):
                    columns[name].append(x)
    folder.mkdir(parents=True)
    files = trace.write_part(folder, 1, STEPS, columns)
    manifest = {
        "schema": trace.SCHEMA_VERSION,
        "config": {"train": {"steps": STEPS}},
        "attached": {"model": "GPT2", "parameters": 9, "blocks": 2},
        "onset_step": onset,
        "end_reason": end_reason,
        "steps_done": STEPS,
        "files": files,
        "signals": {signal.name: asdict(signal) for signal in SIGNALS},
    }
    trace.write_manifest(folder, manifest)
    return trace.read(folder) if end_reason == "completed" else None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, [write_run(folder / f"run-{seed:02d}", seed) for seed in range(20)]


def aligned(run, name):
    series = run.signals[name]
    return Aligned(series.steps, series.values, series.undefined)


def statistic(run, signal, band):
    sides = oriented(band.z(aligned(run, signal.name)), signal.bad)
    return chart_statistics([sides], [EWMA(0.2)] * len(sides))[0]


def test_each_threshold_is_conformal_on_path_maxima(runs):
    made = calibrated(runs[1], alpha=0.1, chart=CHART, joint=False)
    assert made.runs == tuple(f"run-{seed:02d}" for seed in range(20)) and not made.reference_runs
    for signal in SIGNALS:
        maxima = [np.nanmax(statistic(run, signal, SelfBand())) for run in runs[1]]
        assert made.signals[signal.name].limit == conformal_threshold(maxima, 0.1)
    assert made.per_million_steps == pytest.approx(2 * 1e6 * 0.1 / STEPS)


@pytest.mark.parametrize("track", ["self", "reference"])
def test_joint_thresholds_hold_for_all_signals_together(runs, track):
    made = calibrated(runs[1], alpha=0.3, track=track, chart=CHART)
    assert len(made.runs) == 10 and len(made.reference_runs) == 10 and not set(made.runs) & set(made.reference_runs)
    reference = [run for run in runs[1] if run.run_id in made.reference_runs]
    above = set()
    for signal in SIGNALS:
        before = [aligned(run, signal.name) for run in reference]
        band = SelfBand() if track == "self" else ReferenceBand.fit(signal.name, before)
        for run in runs[1]:
            if run.run_id in made.runs and np.nanmax(statistic(run, signal, band)) > made.signals[signal.name].limit:
                above.add(run.run_id)
    assert len(above) == 2  # the threshold has rank ceil(11 x 0.7) = 8 among 10


def test_a_restless_signal_does_not_set_the_limits_of_others():
    rng = np.random.default_rng(0)
    quiet = {f"quiet-{i}": (rng.normal(3, 0.2, 10).tolist(), rng.normal(3, 0.2, 10).tolist()) for i in range(8)}
    quiet |= {"constant": ([3.0] * 10, [3.0] * 10)}
    restless = {"restless": (rng.normal(60, 40, 10).tolist(), rng.normal(60, 40, 10).tolist())}
    without, beside = _joint_limits(quiet, 0.1), _joint_limits(quiet | restless, 0.1)
    assert all(abs(beside[name] / without[name] - 1) < 0.2 for name in quiet)


def test_joint_scales_take_ten_runs_and_name_the_way_out(runs):
    with pytest.raises(ValueError, match=r"10 of them for bands and scales.*; joint=false needs 9 runs"):
        calibrated(runs[1][:18], alpha=0.1, chart=CHART)
    assert len(calibrated(runs[1][:19], alpha=0.1, chart=CHART).runs) == 9
    name, ratio = calibrated(runs[1], alpha=0.1, chart=CHART).widest
    assert name in {signal.name for signal in SIGNALS} and 1 <= ratio < 2


@pytest.mark.parametrize("track", ["self", "reference"])
def test_the_live_rule_alarms_where_the_offline_one_does(runs, track, tmp_path):
    made = calibrated(runs[1], alpha=0.2, track=track, chart=CHART)
    made.write(tmp_path / "thresholds.json")
    faulty = [write_run(tmp_path / f"faulty-{i}", 100 + i, jump=4.0, onset=45) for i in range(4)]
    reference = [run for run in runs[1] if run.run_id in made.reference_runs]
    alarms = 0
    for run in faulty:
        watched = panel(*SIGNALS, settings=AlarmRules((), thresholds=tmp_path / "thresholds.json"))
        events = [e for step, readings in told_again(run, list(made.signals)) for e in watched.read(step, readings)]
        for signal in SIGNALS:
            before = [aligned(other, signal.name) for other in reference]
            band = SelfBand() if track == "self" else ReferenceBand.fit(signal.name, before)
            series = aligned(run, signal.name)
            offline = first_alarm(statistic(run, signal, band), series.positions, made.signals[signal.name].limit)
            live = next((event.step for event in events if event.signal == signal.name), None)
            assert live == offline
            alarms += live is not None
        assert all(e.expected_false_alarms_per_million_steps == pytest.approx(1e6 * 0.2 / STEPS) for e in events)
    assert alarms >= 3


@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (4, {"alpha": 0.1, "joint": False}, "4 calibration runs cannot support alpha=0.1: the smallest is 0.2"),
        (14, {"alpha": 0.1}, "10 of them for bands and scales, cannot support alpha=0.1: the smallest is 0.2"),
        (6, {"alpha": 0.1}, "6 of them for bands and scales, cannot support alpha=0.1: at least 11 runs are needed"),
        (6, {"alpha": 0.2, "track": "reference", "joint": False}, "cannot support alpha=0.2: the smallest is 0.3333"),
        (16, {"alpha": 0.2, "track": "floor"}, "no ratio to predicted noise"),
        (16, {"alpha": 2.0}, "alpha=2.0 is not allowed"),
    ],
)  # fmt: skip
def test_too_few_runs_name_the_smallest_alpha(runs, count, options, said):
    with pytest.raises(ValueError) as raised:
        calibrated(runs[1][:count], chart=CHART, **options)
    assert said in str(raised.value)


def test_the_command_writes_what_attach_reads(runs, tmp_path, capsys):
    write_run(tmp_path / "mixed" / "faulty", 7, jump=3.0, onset=5)
    for seed in range(20):
        write_run(tmp_path / "mixed" / f"healthy-{seed:02d}", seed)
    out = tmp_path / "thresholds.json"
    calibrate.main([f"runs={tmp_path / 'mixed'}", f"out={out}", "alpha=0.2"])
    saved = json.loads(out.read_text())
    assert saved["alpha"] == 0.2 and saved["horizon_steps"] == STEPS and saved["track"] == "self"
    assert "faulty" not in saved["runs"] and len(saved["runs"]) == 10
    assert set(saved["signals"]) == {signal.name for signal in SIGNALS}
    assert saved["model"]["blocks"] == 2 and saved["horizon_run"] in (*saved["runs"], *saved["reference_runs"])
    printed = capsys.readouterr().out
    assert "2 signals on the self track, ewma; 10 runs set thresholds at alpha=0.2" in printed
    assert "joint=true raises a signal's limit up to 1" in printed


@pytest.mark.parametrize("track", ["self", "reference"])
def test_runs_may_lack_a_few_steps_that_a_scaler_threw_away(tmp_path, track):
    runs = [write_run(tmp_path / f"run-{seed:02d}", seed, skips=(2 + 2 * seed,)) for seed in range(20)]
    made = calibrated(runs, alpha=0.2, track=track, chart=CHART)
    assert set(made.signals) == {signal.name for signal in SIGNALS} and not made.declined
    if track == "reference":
        assert made.signals["train_loss_raw"].positions[:2] == (1, 3) and 60 in made.signals["train_loss_raw"].positions
    runs[3] = write_run(tmp_path / "other", 3, skips=range(2, 60, 3))
    with pytest.raises(ValueError, match="run other was read at other steps"):
        calibrated(runs, alpha=0.2, chart=CHART)


def test_an_alarmed_run_is_refused_and_an_unfinished_one_left_out(tmp_path, capsys):
    assert calibrate.ALARMS == FILE
    folder, out = tmp_path / "runs", f"out={tmp_path / 'thresholds.json'}"
    for seed in range(20):
        write_run(folder / f"run-{seed:02d}", seed)
    write_run(folder / "crashed", 30, end_reason="failed")
    alarm = {"severity": "SEV2", "rule": "self", "signal": "train_loss_raw", "step": 9}
    own = {"severity": "SEV1", "rule": "watch", "signal": "writer_failed", "step": 9}
    (folder / "run-07" / "alarms.jsonl").write_text(json.dumps(alarm) + "\n" + json.dumps(own) + "\n")
    calibrate.main([f"runs={folder}", out, "alpha=0.2"])
    assert "left out, since they did not complete: crashed (failed)\n" in (printed := capsys.readouterr().out)
    assert f"{STEPS} steps, the length of run-00" in printed
    (folder / "run-07" / "alarms.jsonl").write_text(json.dumps(alarm | {"severity": "SEV1"}) + "\n")
    with pytest.raises(SystemExit):
        calibrate.main([f"runs={folder}", out, "alpha=0.2"])
    said = capsys.readouterr().err
    assert "run-07: SEV1 train_loss_raw at step 9" in said and "allow_alarms=true" in said
    calibrate.main([f"runs={folder}", out, "alpha=0.2", "allow_alarms=true"])


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    assert COMMANDS["calibrate"][0] == "analysis.calibrate"
    for arguments, said in (
        ([f"runs={tmp_path}", "out=x.json"], f"error: runs={tmp_path} holds no finished healthy run\n"),
        (["out=x.json"], "error: runs= is missing: foreshock calibrate runs=DIR out=FILE.json\n"),
        (["run=x"], "error: option='run' is not allowed"),
        (["runs=x", "out=y", "chart=adwin"], "error: chart='adwin' is not allowed: one of shewhart, ewma, cusum, glr"),
    ):
        with pytest.raises(SystemExit):
            calibrate.main(arguments)
        assert capsys.readouterr().err.startswith(said)


def test_a_changed_file_is_read_without_a_restart(runs, tmp_path):
    path = tmp_path / "thresholds.json"
    made = calibrated(runs[1], alpha=0.2, chart=CHART)
    high = {name: signal.model_copy(update={"limit": 1e6}) for name, signal in made.signals.items()}
    made.model_copy(update={"signals": high}).write(path)
    watched = panel(*SIGNALS, settings=AlarmRules((), thresholds=path))
    told = list(told_again(write_run(tmp_path / "faulty", 3, jump=9.0, onset=40), ["train_loss_raw"]))
    assert not [event for step, readings in told[:45] for event in watched.read(step, readings)]
    path.write_text("{")
    (event,) = [event for step, readings in told[45:46] for event in watched.read(step, readings)]
    assert event.signal == "thresholds_unreadable" and "is no file of foreshock calibrate" in event.message
    made.write(path)
    (event,) = [event for step, readings in told[46:48] for event in watched.read(step, readings)]
    assert (event.rule, event.step, event.signal) == ("calibrated", 47, "train_loss_raw")


def test_a_signal_that_leaves_the_file_is_judged_by_its_own_past(runs, tmp_path):
    path = tmp_path / "thresholds.json"
    made = calibrated(runs[1], alpha=0.2, chart=CHART)
    high = {name: signal.model_copy(update={"limit": 1e6}) for name, signal in made.signals.items()}
    made.model_copy(update={"signals": high}).write(path)
    watched = panel(*SIGNALS, settings=AlarmRules(("self",), warmup_steps=0, thresholds=path))
    rng = np.random.default_rng(0)

    def steps(first, last, value=0.0):
        loss = SIGNALS[0]
        return [e for s in range(first, last) for e in watched.read(s, [reading(loss, s, value + rng.normal())])]

    assert not steps(1, 40) and not steps(40, 42, 1e3)
    made.model_copy(update={"signals": {"attn_entropy": high["attn_entropy"]}}).write(path)
    assert not steps(42, 80)
    (event,) = steps(80, 81, 1e3)
    assert (event.rule, event.signal) == ("self", "train_loss_raw")


@pytest.mark.parametrize(
    ("other", "values", "said"),
    [
        (replace(SIGNALS[0], jittered=True), (1.0,), "jittered is True, and was False"),
        (replace(SIGNALS[1], every_steps=2), (1.0, 2.0, 3.0), "layers and heads is (1, 3), and was (2, 2)"),
    ],
)
def test_a_signal_that_is_read_otherwise_is_declined_and_left_to_the_rule_self(runs, tmp_path, other, values, said):
    calibrated(runs[1], alpha=0.2, chart=CHART).write(tmp_path / "thresholds.json")
    watched = panel(other, settings=AlarmRules(("self",), warmup_steps=0, thresholds=tmp_path / "thresholds.json"))
    (event,) = watched.read(2, [reading(other, 2, *values)])
    assert event.signal == "threshold_not_used" and said in event.message
    rng = np.random.default_rng(0)
    for i in range(2, 40):
        assert not watched.read(2 * i, [reading(other, 2 * i, *rng.normal(size=len(values)))])
    (event,) = watched.read(80, [reading(other, 80, *[1e6] * len(values))])
    assert event.rule == "self"


def test_thresholds_of_another_model_are_refused(runs, tmp_path):
    path = tmp_path / "thresholds.json"
    calibrated(runs[1], alpha=0.2, chart=CHART).write(path)
    panel(*SIGNALS, settings=AlarmRules((), thresholds=path), model={"model": "DDP", "parameters": 9, "blocks": 2})
    with pytest.raises(ValueError, match="is of another model: blocks is 3, and was 2 there"):
        panel(*SIGNALS, settings=AlarmRules((), thresholds=path), model={"parameters": 9, "blocks": 3})
    model = gpt()
    with pytest.raises(ValueError, match="is of another model: parameters is"):
        foreshock.attach(model, torch.optim.AdamW(model.parameters()), quiet=True, alarms=path)


def test_readings_of_another_cadence_are_declined_aloud(runs, tmp_path):
    calibrated(runs[1], alpha=0.2, chart=CHART).write(tmp_path / "thresholds.json")
    other = Signal("train_loss_raw", "nats", "up", every_steps=5, family="optimization")
    watched = panel(other, settings=AlarmRules((), thresholds=tmp_path / "thresholds.json"))
    (event,) = watched.read(5, [reading(other, 5, 1.0)])
    assert event.signal == "threshold_not_used" and "every_steps is 5, and was 1" in event.message
    assert not watched.read(10, [reading(other, 10, 1.0)])
