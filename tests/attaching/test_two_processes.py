"""Two gloo processes under ``torchrun``: who writes, whose rows a reading is of, and weights to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from foreshock.experiments import trace
from tests.attaching.loops import same
from tests.attaching.two_processes import STEPS

ROOT = Path(__file__).parents[2]
HANG_S = 900
"""Much longer than any of these takes, on a busy machine too."""

OF_ALL_ROWS = {
    "grad_global_norm",
    "adam_update_rms",
    "update_to_weight",
    "weight_norm.q",
    "spectral_radius.k",
    "delta_w_norm.q.w10",
}
OF_OWN_ROWS = {"train_loss_raw", "key_shift_residual", "max_attn_logit", "gradient_curvature", "output_log_z"}


def torchrun(loop: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "tests.attaching.two_processes", loop, str(folder)]
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["ddp", "trainer", "lightning"])
def test_two_processes_train_to_the_same_bits_and_the_first_alone_writes(loop, tmp_path):
    if loop != "ddp":
        pytest.importorskip({"trainer": "transformers"}.get(loop, loop))
    ended = torchrun(loop, tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(same(first["without"], weights) for weights in (first["watched"], second["without"], second["watched"]))
    for left in (first, second):
        assert left["steps"] == STEPS and left["stopped"] is None and not left["tracebacks"]
    of_first, of_second = (by_signal(left["readings"]) for left in (first, second))
    assert of_first.keys() == of_second.keys() and of_first.keys() > OF_ALL_ROWS | OF_OWN_ROWS
    assert not {name for name in OF_ALL_ROWS if not same(of_first[name], of_second[name])}
    assert not {name for name in OF_OWN_ROWS if same(of_first[name], of_second[name])}
    assert ended.stderr.count("monitors watch") == 1
    written = trace.read(tmp_path / "trace")
    assert written.manifest["end_reason"] == "completed" and written.manifest["steps_done"] == STEPS
    losses = [float(value) for value in of_first["train_loss_raw"].values()]
    assert written.signals["train_loss_raw"].values.ravel().tolist() == losses
    lines = [json.loads(line) for line in (tmp_path / "readings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "values" in line] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_folder_that_holds_a_run_ends_both_processes(tmp_path):
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "manifest.json").write_text("{}")
    ended = torchrun("ddp", tmp_path)
    assert ended.returncode != 0 and "is not allowed: it holds a run; name a new folder" in ended.stderr


def by_signal(readings: dict[int, dict[str, Any]]) -> dict[str, dict[int, Any]]:
    """Readings by signal, and of each by step."""
    signals = {name for of_step in readings.values() for name in of_step}
    return {name: {step: of[name] for step, of in readings.items() if name in of} for name in signals}
