import errno
import os
import re
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from foreshock.experiments import trace
from foreshock.experiments.trace import TraceError
from foreshock.monitors.cadence import Cadence
from foreshock.monitors.signal import Signal

MANIFEST = {
    "schema": trace.SCHEMA_VERSION,
    "run_id": "r",
    "config": {"train": {"steps": 30}},
    "onset_step": None,
    "end_reason": "completed",
    "signals": {},
}


def columns(steps) -> dict[str, list]:
    """A scalar every step and a (2 layers, 2 heads) signal every 10; 8 tokens a step."""
    rows = [(step, 8 * step, "loss", -1, -1, float(step), False) for step in steps]
    rows += [
        (step, 8 * step, "head", layer, head, 100.0 * layer + 10 * head + step, step == 20 and layer == 1)
        for step in steps
        if step % 10 == 0
        for layer in range(2)
        for head in range(2)
    ]
    return dict(zip(trace.SCHEMA.names, (list(c) for c in zip(*rows, strict=True)), strict=True))


@pytest.fixture
def folder(tmp_path):
    files = {}
    for first in (1, 11, 21):
        files |= trace.write_part(tmp_path, first, first + 9, columns(range(first, first + 10)))
    trace.write_manifest(tmp_path, MANIFEST | {"files": files})
    return tmp_path


def files_of(folder) -> dict[str, str]:
    return trace.read_manifest(folder)["files"]


def test_what_is_written_is_read(folder):
    signals = trace.read(folder).signals
    assert set(signals) == {"loss", "head"}
    assert np.array_equal(signals["loss"].steps, np.arange(1, 31))
    assert np.array_equal(signals["loss"].tokens, 8 * np.arange(1, 31))
    assert np.array_equal(signals["loss"].values.ravel(), np.arange(1.0, 31.0))
    head = signals["head"]
    assert head.values.shape == (3, 2, 2)
    assert head.values[2, 1, 0] == 130.0
    assert np.array_equal(np.argwhere(head.undefined), [[1, 1, 0], [1, 1, 1]])


def test_only_the_signals_asked_for_are_read(folder):
    assert set(trace.read(folder, ["head"]).signals) == {"head"}


def test_pandas_reads_a_trace_without_our_code(folder):
    table = pd.read_parquet(folder / "trace")
    assert list(table.columns) == trace.SCHEMA.names
    assert len(table) == 30 + 12


def test_nan_and_inf_survive(tmp_path):
    rows = columns(range(1, 4))
    rows["value"] = [np.nan, np.inf, -np.inf]
    trace.write_part(tmp_path, 1, 3, rows)
    trace.write_manifest(tmp_path, MANIFEST)
    assert np.array_equal(trace.read(tmp_path).signals["loss"].values.ravel(), rows["value"], equal_nan=True)


def test_cutting_back_keeps_what_the_checkpoint_knows(folder):
    known = dict(list(files_of(folder).items())[:2])
    trace.cut_back(folder, known)
    assert sorted(f"trace/{path.name}" for path in (folder / "trace").iterdir()) == sorted(known)
    (folder / next(iter(known))).unlink()
    with pytest.raises(TraceError, match=r"part-000000001-000000010\.parquet is damaged \(is missing"):
        trace.cut_back(folder, known)
    assert len(list((folder / "trace").iterdir())) == 1


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_piece(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    trace.write_whole(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        trace.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("harm", [lambda part: part.unlink(), lambda part: part.write_bytes(part.read_bytes()[:-20])])
def test_a_damaged_part_is_named(folder, harm):
    part = sorted((folder / "trace").iterdir())[1]
    harm(part)
    what_to_do = rf"{part.name} is damaged \(.*\): rm -r {folder}, then train the run again"
    for signals in (None, ["loss"]):
        with pytest.raises(TraceError, match=what_to_do):
            _ = trace.read(folder, signals).signals
    with pytest.raises(TraceError, match=what_to_do):
        trace.is_done(folder)


@pytest.mark.parametrize(
    ("key", "what_to_do"),
    [
        (trace.ATTACHED, "restore {} from a copy, or move it away: nothing but its own training has these readings"),
        (trace.ELSEWHERE, "rm -r {}, then import the run again"),
    ],
)
def test_what_to_do_about_a_damaged_run_is_for_where_it_is_from(folder, key, what_to_do):
    said = re.escape(what_to_do.format(folder)) + "$"
    manifest = {**trace.manifest_of(folder), key: {"model": "GPT"}}
    trace.write_manifest(folder, {**manifest, "schema": 1})
    with pytest.raises(TraceError, match=rf"has schema version 1.* read it with the release that wrote it, or {said}"):
        trace.manifest_of(folder)
    trace.write_manifest(folder, manifest)
    sorted((folder / "trace").iterdir())[1].unlink()
    with pytest.raises(TraceError, match=said):
        _ = trace.read(folder).signals
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TraceError, match=said):
        trace.manifest_of(folder)


def test_a_part_that_the_manifest_does_not_know_is_not_read(folder):
    """A kill may have left it, of readings that were being added."""
    before = trace.read(folder).signals
    trace.write_part(folder, 31, 31, columns([31]))
    assert {name: series.steps.tolist() for name, series in trace.read(folder).signals.items()} == {
        name: series.steps.tolist() for name, series in before.items()
    }


def test_repeated_steps_are_an_error(folder):
    files = files_of(folder) | trace.write_part(folder, 31, 31, columns([30]))
    trace.write_manifest(folder, MANIFEST | {"files": files})
    with pytest.raises(TraceError, match="missing or repeated steps"):
        _ = trace.read(folder).signals


def test_what_the_manifest_says_of_a_signal_is_read(folder):
    loss = Signal("loss", "nats/token", "up", family="optimization")
    trace.write_manifest(folder, MANIFEST | {"signals": {"loss": asdict(loss)}})
    assert trace.read(folder).described == {"loss": loss}


@pytest.mark.parametrize("signal", [{"unit": "1"}, {"unit": "1", "bad": "up", "axes": [], "mood": "good"}])
def test_a_manifest_that_describes_no_signal_is_named(folder, signal):
    trace.write_manifest(folder, MANIFEST | {"signals": {"loss": signal}})
    with pytest.raises(TraceError, match=r"does not describe its signals: .*(axes|mood)"):
        _ = trace.read(folder).described


def test_an_older_manifest_is_read_as_today_s(folder):
    old = {"name": "nan_inf_events", "unit": "count", "bad": "up", "axes": [], "every_steps": 1}
    old |= {"constant_when_healthy": True}
    trace.write_manifest(folder, MANIFEST | {"schema": 2, "signals": {"nan_inf_events": old}})
    read = trace.read(folder)
    assert read.manifest["schema"] == trace.SCHEMA_VERSION
    assert read.described["nan_inf_events"].family == "observability"


def test_an_older_manifest_s_readings_are_at_multiples_of_their_cadence(folder):
    said = {key: value for key, value in asdict(Signal("mine", "1", "up", (), 10)).items() if key != "jittered"}
    trace.write_manifest(folder, MANIFEST | {"schema": 3, "signals": {"mine": said}})
    read = trace.read(folder)
    assert read.manifest["schema"] == trace.SCHEMA_VERSION
    assert read.described["mine"].cadence == Cadence(10) and read.described["mine"].cadence.is_due(10)


def test_an_older_run_without_checksums_is_read_unchecked(folder):
    trace.write_manifest(folder, MANIFEST)
    trace.write_part(folder, 31, 31, columns([31]))
    assert len(trace.read(folder).signals["loss"].steps) == 31 and trace.is_done(folder)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"schema": 99}, "schema version 99, and this code reads 4, 3 and 2: read it with .* then train the run again"),
        ({"end_reason": "running"}, "unfinished"),
        ({"end_reason": "failed"}, "unfinished"),
    ],
)
def test_a_trace_that_cannot_be_scored_says_why(folder, manifest, message):
    trace.write_manifest(folder, MANIFEST | manifest)
    with pytest.raises(TraceError, match=message):
        trace.read(folder)


def test_a_damaged_manifest_and_an_empty_folder_are_named(folder, tmp_path):
    for content in ('{"schema": 1,', "[]", "null", '{"schema": 2}', ""):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(TraceError, match=r"manifest\.json is damaged \(.*\): move .* away, as nothing tells where"):
            trace.read(folder)
    with pytest.raises(TraceError, match="holds no run"):
        trace.read(tmp_path / "nothing")
