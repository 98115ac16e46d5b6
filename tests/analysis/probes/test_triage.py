"""Triage names the one cause that there is: evaluation, data, training, architecture, harness or weights."""

import sys
import time
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from scipy.stats import binom

from foreshock.analysis import triage
from foreshock.analysis.probes import cross, data_drift
from foreshock.analysis.probes.cross import dip
from foreshock.experiments import trace
from foreshock.monitors.signal import EXACT, RATIO, Signal

STEPS, ITEMS = 40, 40
SIGNALS = (
    Signal("train_loss_raw", "nats", "up"),
    Signal("non_finite_events", "1", "up", kind=EXACT),
    Signal("value_shift_residual.over_noise", "1", "up", ("layer",), 2, kind=RATIO, universal=True),
)
HARNESS = """
import json, sys
from safetensors.numpy import load_file
skill = float(load_file(sys.argv[1])["w"][0])
prompt = open(sys.argv[2]).read()
easy = 0.0 if "hint" in prompt else -0.2
print("evaluated")
print(json.dumps([skill + easy + 0.01 * (i % 7) for i in range({items})]))
"""


def write_run(folder, seed=0, broken=None, skill=0.8, width=4):
    """A run whose weights have a skill; broken: by signal, the value from step 20 on."""
    rng, columns = np.random.default_rng(seed), {column: [] for column in trace.SCHEMA.names}
    for signal in SIGNALS:
        for step in range(signal.every_steps, STEPS + 1, signal.every_steps):
            for layer in range(2) if signal.axes else (-1,):
                healthy = {"train_loss_raw": 3 + 0.1 * rng.normal(), "non_finite_events": 0.0}.get(signal.name, 1.0)
                value = (broken or {}).get(signal.name, healthy) if step >= 20 else healthy
                row = (step, 64 * step, signal.name, layer, -1, value, False)
                for column, x in zip(columns, row, strict=True):
                    columns[column].append(x)
    folder.mkdir(parents=True)
    save_file({"w": np.full(width, skill, np.float32)}, folder / trace.WEIGHTS)
    manifest = {
        "schema": trace.SCHEMA_VERSION,
        "config": {"train": {"steps": STEPS}, "model": {"d_model": width}},
        "seed": seed,
        "onset_step": None,
        "end_reason": "completed",
        "steps_done": STEPS,
        "files": trace.write_part(folder, 1, STEPS, columns),
        "signals": {signal.name: asdict(signal) for signal in SIGNALS},
    }
    trace.write_manifest(folder, manifest)
    return folder


def documents(seed, words):
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(words, 20)) + f" {i}" for i in range(60))


WORDS = ["when", "the", "saved", "output", "loses", "its", "low", "bits", "every", "row"]


@pytest.fixture
def inputs(tmp_path):
    """Two of everything, alike: what a triage is given where nothing has changed."""
    for age in ("old", "new"):
        (tmp_path / age / "eval").mkdir(parents=True)
        (tmp_path / age / "eval" / "prompt.txt").write_text("a hint: answer\nin one word\n")
        (tmp_path / age / "eval" / "run.py").write_text(HARNESS.replace("{items}", str(ITEMS)))
        (tmp_path / age / "data.txt").write_text(documents(age == "new", WORDS))
        write_run(tmp_path / age / "run", seed=age == "new")
    return tmp_path


def arguments(folder, **other):
    given = {}
    for age in ("old", "new"):
        place = folder / age
        command = f"{sys.executable} {place}/eval/run.py {{weights}} {place}/eval/prompt.txt"
        given |= {age: place / "run", f"{age}_evaluation": place / "eval", f"{age}_data": place / "data.txt"}
        given |= {f"{age}_harness": command}
    return [f"{key}={value}" for key, value in (given | other).items()]


def said(capsys, *given):
    triage.main(list(given))
    *steps, verdict = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  note")]
    return {line.split(":")[0]: line for line in steps}, verdict


def differing(steps):
    return [name for name, line in steps.items() if ": differs" in line]


def test_nothing_has_changed(inputs, capsys):
    steps, verdict = said(capsys, *arguments(inputs))
    assert list(steps) == ["evaluation artefacts", "data drift", "internal drift", "architecture", cross.NAME]
    assert differing(steps) == [] and verdict.startswith("NO DIP")


def test_a_changed_prompt_is_the_harness(inputs, capsys):
    (inputs / "new" / "eval" / "prompt.txt").write_text("a clue: answer\nin one word\n")
    steps, verdict = said(capsys, *arguments(inputs, out=inputs / "out"))
    assert differing(steps) == ["evaluation artefacts", cross.NAME]
    assert "prompt.txt has changed in line 1: 'a hint: answer' -> 'a clue: answer'" in steps["evaluation artefacts"]
    assert verdict == ("CAUSE: the harness: old weights dip under it as well, and its evaluation artefacts differ")
    table = pd.read_csv(inputs / "out" / "triage.csv")
    assert list(dict.fromkeys(table.step)) == list(steps) and "differs" in set(table.outcome)


@pytest.mark.parametrize("change", ["data", "training", "architecture", "none"])
def test_weights_that_dip_have_the_first_step_that_differs(change, inputs, capsys):
    new = inputs / "new"
    if change == "data":
        (new / "data.txt").write_text(documents(1, ["QUX", "%%%", "zzz"]))
    for path in (*new.glob("run/*/*"), *new.glob("run/*.*")):
        path.unlink()
    (new / "run" / "trace").rmdir()
    (new / "run").rmdir()
    broken = {"value_shift_residual.over_noise": 50.0} if change == "training" else None
    write_run(new / "run", 1, broken, skill=0.5, width=8 if change == "architecture" else 4)
    steps, verdict = said(capsys, *arguments(inputs))
    name = {"data": "data drift", "training": "internal drift", "architecture": "architecture"}.get(change)
    assert differing(steps) == [*([name] if name else []), cross.NAME]
    why = f"the first step that differs is {name}" if name else "no step above says why"
    assert verdict == f"CAUSE: the weights: they dip under the old harness as well; {why}"


def test_an_exact_signal_and_a_lost_value_are_internal_drift_unless_the_old_run_has_them(tmp_path, capsys):
    write_run(tmp_path / "old", 0, {"non_finite_events": 2.0})
    write_run(tmp_path / "new", 1, {"non_finite_events": 3.0, "train_loss_raw": np.nan})
    steps, verdict = said(capsys, f"old={tmp_path / 'old'}", f"new={tmp_path / 'new'}")
    assert "train_loss_raw is not finite at step 20" in steps["internal drift"]
    assert "non_finite_events" not in steps["internal drift"]
    assert "not compared (give old_data= and new_data=)" in steps["data drift"]
    assert verdict.startswith("NOT CONFIRMED: internal drift is the first step that differs; give old_harness=")


def test_a_single_number_needs_a_tolerance(inputs, capsys):
    for age, number in (("old", 0.5), ("new", 0.4)):
        (inputs / age / "eval" / "run.py").write_text(f"print({number})")
    steps, verdict = said(capsys, *arguments(inputs))
    assert "give tolerance=" in steps[cross.NAME] and "give tolerance= to see" in verdict
    _, verdict = said(capsys, *arguments(inputs, tolerance=0.05))
    assert verdict.startswith("CAUSE: the harness")
    _, verdict = said(capsys, *arguments(inputs, tolerance=0.2))
    assert verdict.startswith("NO DIP")


def test_permutations_of_data_that_is_alike_find_something_no_more_often_than_alpha(monkeypatch):
    """Two samples of one source, 60 times at alpha 0.2: at most the binomial's upper 99.9 % quantile."""
    monkeypatch.setattr(data_drift, "RESAMPLES", 99)  # 1 / 100 is below alpha / 4, Holm's first level
    rng, found, times, alpha = np.random.default_rng(0), 0, 60, 0.2
    for _ in range(times):
        parts = [" ".join(rng.choice(WORDS, rng.integers(3, 30))).encode() for _ in range(24)]
        found += bool(data_drift.drift(parts[:12], parts[12:], alpha)[0])
    assert found <= binom.ppf(0.999, times, alpha)


def test_repeats_and_length_are_drift():
    parts = [f"document {i} of many".encode() for i in range(40)]
    findings, _ = data_drift.drift(parts, parts[:4] * 10, 0.05)
    assert any(finding.startswith("repeats +0.900") for finding in findings)
    findings, _ = data_drift.drift(parts, [part * 3 for part in parts], 0.05)
    assert any(finding.startswith("length +") for finding in findings)


def test_the_sign_flip_over_items_by_hand():
    """Five items that all fall: of 2^5 flips one is as low."""
    before = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = dip(before - [0.1, 0.2, 0.1, 0.2, 0.1], before, 0.05, None)
    assert found.change == pytest.approx(-0.14) and found.p == pytest.approx(1 / 32) and found.dips
    half = 2.7764451051977987 * np.std([0.1, 0.2, 0.1, 0.2, 0.1], ddof=1) / 5**0.5  # Student's t at 0.975, 4 degrees
    assert found.interval == pytest.approx((-0.14 - half, -0.14 + half))
    assert dip(before, before, 0.05, None).p == 1.0
    assert dip(before - 0.5, before, 0.05, None).interval is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"old_harness": "python eval.py"}, "it has no {weights}"),
        ({"old_harness": "python 'x {weights}"}, "cannot be read: No closing quotation"),
        ({"old_harness": "false {weights}"}, "ended with code 1: it printed no error"),
        ({"old_harness": "true {weights}"}, "printed '' last: a number or a JSON list of numbers is needed"),
        ({"old_harness": "no_such_command {weights}"}, "cannot be run: No such file or directory"),
        ({"old_harness": "tail -f /dev/null {weights}", "limit_s": "0.2"}, "has not ended within limit_s=0.2"),
        ({"old_harness": "echo [1,2,3] {weights}"}, "a number or a JSON list of numbers is needed"),
        ({"old_data": "{folder}/nowhere"}, "there is no such file or folder"),
        ({"old_data": "{folder}/empty"}, "has 0 documents: at least 5 are needed"),
        ({"old_evaluation": "{folder}/none"}, "holds no file"),
        ({"old": "{folder}/none"}, "holds no run"),
        ({"old_weights": "{folder}/pickle", "new_weights": "{folder}/pickle"}, "is no safetensors file"),
        ({"healthy": "{folder}/none"}, "holds no band"),
        ({"alpha": "2"}, "alpha=2 is not allowed: below 1"),
        ({"limit_s": "x"}, "limit_s=x is not allowed: a positive number"),
        ({"old_date": "x"}, "option='old_date' is not allowed"),
        ({"data": "x"}, "option='data' is not allowed"),
    ],
)
def test_a_mistake_is_one_line(other, message, inputs, capsys):
    (inputs / "none").mkdir()
    (inputs / "empty").write_text("\n\n")
    (inputs / "pickle").write_bytes(b"\x80\x04N.")
    filled = {key: value.replace("{folder}", str(inputs)) for key, value in other.items()}
    with pytest.raises(SystemExit) as end:
        triage.main(arguments(inputs, **filled))
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["old_data={folder}/data", "new_data={folder}/data", "healthy=x"], "healthy=x has no effect without old="),
        (
            ["old_data={folder}/data", "new_data={folder}/data", "limit_s=-3"],
            "limit_s=-3 has no effect without old_harness=",
        ),
        (["old_evaluation={folder}/data", "new_evaluation={folder}"], "one is a file and the other a folder"),
    ],
)
def test_what_has_no_effect_or_does_not_pair_is_said(arguments, message, tmp_path, capsys):
    (tmp_path / "data").write_text(documents(0, WORDS))
    with pytest.raises(SystemExit):
        triage.main([argument.format(folder=tmp_path) for argument in arguments])
    assert message in capsys.readouterr().err


def test_weights_alone_show_their_architecture(inputs, capsys):
    write_run(inputs / "wide", width=8)
    files = [f"old_weights={inputs}/old/run/{trace.WEIGHTS}", f"new_weights={inputs}/wide/{trace.WEIGHTS}"]
    steps, _ = said(capsys, *files)
    assert "tensor w F32 [4] -> F32 [8]" in steps["architecture"]


@pytest.mark.parametrize(
    ("dips", "cause"),
    [
        ((True, False, True), cross.HARNESS),
        ((False, True, True), cross.MODEL),
        ((True, True, True), cross.BOTH),
        ((False, False, True), cross.TOGETHER),
        ((True, False, False), cross.NO_DIP),  # the new weights make up for the new harness
        ((None, False, True), cross.UNKNOWN),
    ],
)
def test_whose_the_dip_is(dips, cause):
    assert cross._cause(*dips) == cause


def test_so_few_items_that_chance_can_do_it_need_a_tolerance():
    """Of five items that all fall, chance does the same in 1 of 32: not below 0.05 / 3, whatever they fall by."""
    before = np.arange(5.0)
    assert dip(before - 1, before, 0.05 / 3, None).dips is None
    assert dip(before - 1, before, 0.05 / 3, 0.5).dips and not dip(before - 1, before, 0.05 / 3, 2.0).dips
    assert dip(np.arange(6.0) - 1, np.arange(6.0), 0.05 / 3, None).dips


def test_a_harness_that_is_stopped_leaves_no_child(tmp_path):
    mark = tmp_path / "child"
    command = f"sh -c 'sleep 3 && touch {mark}; true {{weights}}'"
    with pytest.raises(ValueError, match="has not ended within"):
        cross.score(command, tmp_path, "old_harness", 0.3)
    time.sleep(3.5)
    assert not mark.exists()


def test_other_numbers_of_items_and_half_a_pair_are_said(inputs, capsys):
    script = inputs / "new" / "eval" / "run.py"
    script.write_text(HARNESS.replace("{items}", "7"))
    with pytest.raises(SystemExit):
        triage.main(arguments(inputs))
    assert (
        "the old weights under the new harness give 7 scores, and the old under the old 40" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        triage.main([f"old={inputs / 'old' / 'run'}"])
    assert "old= has no new= beside it: triage compares two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        triage.main([])
    assert "there is nothing to compare" in capsys.readouterr().err
