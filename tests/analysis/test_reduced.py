"""Runs reduced to what scoring needs score as they did."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis import reduced
from foreshock.analysis.detect.detection import Detection
from foreshock.analysis.runs.index import read_index
from foreshock.analysis.runs.load import load
from foreshock.analysis.runs.reduced import RUNS, merged
from foreshock.analysis.scores.contest import contest
from foreshock.analysis.scores.sensitivity import label_sensitivity, other_labels
from foreshock.experiments import trace
from foreshock.experiments.build import ROOT
from foreshock.monitors.signal import read_signal
from tests.analysis.made_up_board import EARLY, LATE, scored


@pytest.mark.slow
def test_a_reduced_folder_scores_as_its_runs_do(folder, tmp_path):
    experiment = load(folder, folder)
    small = tmp_path / "small"
    reduced.write(experiment.index, [run.trace for run in experiment.runs], other_labels(experiment), small)
    size = sum(path.stat().st_size for path in small.iterdir())
    assert size < 0.2 * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    whole, again = (scored(one, tmp_path / "out", tracks=("reference",)) for one in (folder, small))
    own = whole["kind"] != "entrant"  # a count of drifts may jump with the last bit
    measured = ["threshold", "size_over_threshold"]
    pd.testing.assert_frame_equal(whole[own].drop(columns=measured), again[own].drop(columns=measured), rtol=0.02)
    # a joint threshold is in spreads of path maxima, about 0.3 z here, and each maximum moves by up to 1/32 z
    slack = {"rtol": 0.04, "atol": 2 / 32 / 0.3}
    pd.testing.assert_frame_equal(whole.loc[own, measured], again.loc[own, measured], **slack)
    a, b = (label_sensitivity(contest(load(one, one), "reference")) for one in (folder, small))
    pd.testing.assert_frame_equal(a, b, rtol=0.02)


def test_rounding_is_to_the_nearest_multiple_and_keeps_what_is_not_finite():
    values = np.array([1.0, 1.1, 1.13, -3.14159, np.inf, -np.inf, np.nan, 0.3])
    quantum = np.array([0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.0])
    found = reduced.rounded(values, quantum)
    assert found.dtype == np.float32
    assert found[:4].tolist() == [1.0, 1.0, 1.25, -3.25]  # 0.3 is lowered to a quarter
    assert np.array_equal(found[4:7], values[4:7].astype(np.float32), equal_nan=True) and found[7] == np.float32(0.3)


def test_rounding_moves_z_scores_by_a_small_part_of_a_standard_deviation(folder, tmp_path):
    """By 1/64 for the value, and as much again for the band, whose centre and scale are of rounded values."""
    experiment, small = load(folder, folder), tmp_path / "small"
    reduced.write(experiment.index, [run.trace for run in experiment.runs], other_labels(experiment), small)
    again = load(small, small)
    for signal in (EARLY, LATE):  # what the detectors read
        before, after = (Detection(one).sides(signal) for one in (experiment, again))
        z, moved = (np.concatenate([one[run].series[0] for run in before]) for one in (before, after))
        assert np.max(np.abs(moved - z) / (1 + np.abs(z))) < 4 / 64


def test_manifests_are_put_together_again():
    records = [{"a": 1, "b": {"c": 2, "d": i}, "e": i, "f": {"g": 1}} for i in range(3)]
    shared = reduced.common(records)
    assert shared == {"a": 1, "b": {"c": 2}, "f": {"g": 1}}
    assert [merged(shared, reduced.without(record, shared)) for record in records] == records


def test_every_flipped_bit_of_a_reduced_folder_is_an_error(folder, tmp_path):
    experiment, small = load(folder, folder), tmp_path / "small"
    reduced.write(experiment.index, [run.trace for run in experiment.runs], other_labels(experiment), small)
    generator = np.random.default_rng(0)
    for path in sorted(small.iterdir()):
        data = path.read_bytes()
        for place in generator.integers(8 * len(data), size=40):
            turned = bytearray(data)
            turned[place // 8] ^= 1 << place % 8
            path.write_bytes(turned)
            with pytest.raises(trace.TraceError, match=rf"^{small}/.* is damaged .*: git checkout -- {small}, or .*$"):
                read_index(small), reduced.read(small)
        path.unlink()
        if path.name != reduced.CHECKSUMS:  # without which it is an older folder, and read unchecked
            with pytest.raises(trace.TraceError, match=f"{path.name} .*(is missing|does not exist)"):
                read_index(small), reduced.read(small)
        path.write_bytes(data)
    assert load(small, small).runs


@pytest.mark.parametrize("half", ["dense", "moe"])
def test_the_committed_runs_describe_their_signals_as_today(half):
    records = json.loads((ROOT / "results" / "reference_set" / half / RUNS).read_text())
    manifest = trace.as_of_today(records["shared"], Path(RUNS))
    assert records["shared"]["schema"] == 3 and manifest["schema"] == trace.SCHEMA_VERSION
    for name, signal in manifest["signals"].items():
        meaning = read_signal(signal)
        assert meaning.name == name and meaning.family != "unknown" and not meaning.jittered, name


@pytest.mark.parametrize("half", ["dense", "moe"])
def test_the_committed_runs_have_checksums(half):
    committed = ROOT / "results" / "reference_set" / half
    assert set(json.loads((committed / reduced.CHECKSUMS).read_text())) == {
        path.name for path in committed.iterdir() if path.name != reduced.CHECKSUMS
    }


def test_a_reduced_folder_of_another_schema_is_refused(folder, tmp_path, monkeypatch):
    experiment = load(folder, folder)
    monkeypatch.setattr(trace, "COLUMNS_VERSION", 1)
    reduced.write(experiment.index, [run.trace for run in experiment.runs], other_labels(experiment), tmp_path / "old")
    monkeypatch.undo()
    with pytest.raises(trace.TraceError, match="schema version 1, this code reads 2"):
        reduced.read(tmp_path / "old")
