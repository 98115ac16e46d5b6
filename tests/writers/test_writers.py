"""Each writer, read back by the tool that it writes for; one whose package is missing is skipped."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import foreshock
from foreshock.alarms.event import Event
from foreshock.alarms.reading import HostReading
from foreshock.monitors.signal import Signal
from foreshock.writers import JsonLines, MLflow, TensorBoard, WeightsAndBiases
from foreshock.writers.base import scalars
from tests.attaching.loops import gpt, same, train

LOSS = Signal("train_loss_raw", "nats", "up")
ENTROPY = Signal("attn_entropy", "nats", "both", ("layer", "head"))
EVENT = Event(
    run="r", step=2, rule="exact", signal="nan_inf_events", severity="SEV0", runbook="docs/runbooks/numerics.md"
)


def host(signal, values, undefined=()):
    x = np.array(values, float)
    mask = np.zeros(x.shape, bool)
    for place in undefined:
        mask[place] = True
    return HostReading.of(signal, 1, x, mask)


def fill(writer) -> None:
    """Two steps, an alarm, and the end."""
    writer.open()
    writer.add(1, {"train_loss_raw": 3.0, "attn_entropy/max": 1.5})
    writer.add(2, {"train_loss_raw": 2.5})
    writer.alarm(EVENT)
    writer.close()


def test_scalars_are_the_reading_or_three_numbers_of_its_layers_and_heads():
    found = scalars([host(LOSS, [[2.0]]), host(ENTROPY, [[1.0, 2.0], [6.0, 9.0]], undefined=[(1, 1)])])
    assert found == {"train_loss_raw": 2.0, "attn_entropy/min": 1.0, "attn_entropy/mean": 3.0, "attn_entropy/max": 6.0}
    assert scalars([host(LOSS, [[1.0]], undefined=[(0, 0)])]) == {}
    assert np.isnan(scalars([host(ENTROPY, [[1.0, np.nan]])])["attn_entropy/max"])


def test_json_lines(tmp_path):
    fill(JsonLines(tmp_path / "deep" / "readings.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "deep" / "readings.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "values": {"train_loss_raw": 3.0, "attn_entropy/max": 1.5}}
    assert lines[2]["alarm"]["signal"] == "nan_inf_events" and len(lines) == 3


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'foreshock[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fill(TensorBoard(tmp_path))
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(x.step, x.value) for x in read.Scalars("foreshock/train_loss_raw")] == [(1, 3.0), (2, 2.5)]
    assert read.Tags()["scalars"] == ["foreshock/train_loss_raw", "foreshock/attn_entropy/max"]
    assert "foreshock/alarm/SEV0/text_summary" in read.Tags()["tensors"]


FULL, LAST = 1, 4
"""Of the pieces of a record: the only one, and the last of several."""


def records(log: bytes) -> Iterator[bytes]:
    """Those of a file of wandb's that are whole: LevelDB's log format, behind 7 bytes of wandb's own."""
    block, header, record, at = 32768, struct.Struct("<IHB"), b"", 7
    while True:
        left = block - at % block
        at += left if left < header.size else 0  # no piece begins where its header would not fit
        if at + header.size > len(log):
            return
        _, size, kind = header.unpack_from(log, at)
        at += header.size
        record += log[at : at + size]
        at += size
        if at > len(log):
            return
        if kind in (FULL, LAST):
            yield record
            record = b""


def written_by_wandb(log) -> tuple[list[dict], list[str]]:
    """The metrics and the alerts' titles of an offline run, once wandb's own process has written its end."""
    from wandb.proto import wandb_internal_pb2

    rows, alerts, ended, deadline = [], [], False, time.monotonic() + 30
    while not ended and time.monotonic() < deadline:
        rows, alerts = [], []
        for data in records(log.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            ended = ended or kind == "exit"
            if kind == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            if kind == "alert":
                alerts.append(record.alert.title)
        time.sleep(0.1)
    assert ended
    return rows, alerts


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install 'foreshock[wandb]'")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = WeightsAndBiases("foreshock-test", mode="offline", dir=tmp_path, settings=wandb.Settings(console="off"))
    fill(writer)
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows, alerts = written_by_wandb(log)
    assert [row.get("foreshock/train_loss_raw") for row in rows[:2]] == [3.0, 2.5]
    assert rows[0]["foreshock/step"] == 1 and rows[2]["foreshock/alarms/SEV0"] == 1
    assert alerts == ["SEV0 nan_inf_events"]


def test_mlflow_in_a_local_store(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="pip install 'foreshock[mlflow]'")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlruns'}"
    writer = MLflow("foreshock-test", tracking_uri=uri)
    fill(writer)
    client = MlflowClient(uri)
    run = client.get_run(writer.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["foreshock/alarms/SEV0"] == 1
    history = client.get_metric_history(writer.run_id, "foreshock/train_loss_raw")
    assert [(x.step, x.value) for x in history] == [(1, 3.0), (2, 2.5)]
    path = client.download_artifacts(writer.run_id, "alarms.jsonl", str(tmp_path))
    with open(path) as file:
        assert json.loads(file.read())["signal"] == "nan_inf_events"


@pytest.mark.parametrize(
    ("make", "extra"), [(TensorBoard, "tensorboard"), (WeightsAndBiases, "wandb"), (MLflow, "mlflow")]
)
def test_a_missing_package_names_its_extra(make, extra, monkeypatch, tmp_path):
    for name in ("torch.utils.tensorboard", "wandb", "mlflow.entities", "mlflow.tracking"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'foreshock\[{extra}\]'"):
        make(str(tmp_path))


class Opened:
    """Says whether it is open."""

    is_open: bool | None = None

    def open(self):
        self.is_open = True

    def add(self, step, values): ...

    def alarm(self, event): ...

    def close(self):
        self.is_open = False


class Closed(Opened):
    def open(self):
        raise OSError("no server")


def test_a_writer_is_opened_once_nothing_can_refuse_and_closed_where_the_next_cannot_open(tmp_path):
    model, (first, second) = gpt(), (Opened(), Opened())
    optimizer = torch.optim.AdamW(model.parameters())
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run"):
        foreshock.attach(model, optimizer, out=tmp_path, writers=[first], quiet=True)
    with pytest.raises(OSError, match="no server"):
        foreshock.attach(model, optimizer, writers=[second, Closed()], quiet=True)
    assert (first.is_open, second.is_open) == (None, False)


class Failing:
    def open(self): ...

    def add(self, step, values):
        if step == 3:
            raise OSError("connection lost")

    def alarm(self, event): ...

    def close(self): ...


def test_a_watch_writes_and_goes_on_without_a_writer_that_fails(tmp_path):
    without = train(gpt(), False)
    lines = JsonLines(tmp_path / "readings.jsonl")
    watched = train(gpt(), True, profile="icu", writers=[Failing(), lines])
    assert same(without.left, watched.left) and watched.watch.stopped is None
    event = next(event for event in watched.watch.alarms if event.signal == "writer_failed")
    assert event.step == 3 and "Failing is switched off: OSError: connection lost" in event.message
    written = [json.loads(line) for line in (tmp_path / "readings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written if "values" in line] == list(range(1, 8))
    assert os.path.getsize(tmp_path / "readings.jsonl") > 0
