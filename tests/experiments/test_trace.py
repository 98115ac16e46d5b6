import errno
import os

import numpy as np
import pandas as pd
import pytest

from experiments import trace
from experiments.trace import TraceError

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
    for first in (1, 11, 21):
        trace.write_part(tmp_path, first, first + 9, columns(range(first, first + 10)))
    trace.write_manifest(tmp_path, MANIFEST)
    return tmp_path


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


@pytest.mark.parametrize("step", [-1, 0, 10, 13, 20, 25, 30])
def test_cutting_back_keeps_exactly_the_steps_up_to_there(folder, step):
    trace.cut_back(folder, step)
    left = pd.read_parquet(folder / "trace") if list((folder / "trace").iterdir()) else pd.DataFrame({"step": []})
    whole = pd.DataFrame(columns(range(1, 31)))
    assert sorted(left["step"]) == sorted(whole["step"][whole["step"] <= step])


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


def test_a_damaged_part_is_named(folder):
    part = sorted((folder / "trace").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(TraceError, match=part.name):
        _ = trace.read(folder).signals


def test_repeated_steps_are_an_error(folder):
    trace.write_part(folder, 31, 31, columns([30]))
    with pytest.raises(TraceError, match="missing or repeated steps"):
        _ = trace.read(folder).signals


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"schema": 99}, "schema version 99, this code reads 2"),
        ({"end_reason": "running"}, "unfinished"),
        ({"end_reason": "failed"}, "unfinished"),
    ],
)
def test_a_trace_that_cannot_be_scored_says_why(folder, manifest, message):
    trace.write_manifest(folder, MANIFEST | manifest)
    with pytest.raises(TraceError, match=message):
        trace.read(folder)


def test_a_damaged_manifest_and_an_empty_folder_are_named(folder, tmp_path):
    (folder / "manifest.json").write_text('{"schema": 1,')
    with pytest.raises(TraceError, match=r"manifest\.json is damaged"):
        trace.read(folder)
    with pytest.raises(TraceError, match="holds no run"):
        trace.read(tmp_path / "nothing")
