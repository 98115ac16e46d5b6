"""A run in a stack against the same run by itself, and against itself after a stop.

A stack that is stopped and goes on takes the same sums: bits. A single run, or a stack of another size, takes them in
another order, and may part from it by ``PARTING``. What one step rounds is bounded closely in
``tests/models/test_stacked.py``, which tells a fault of one bit apart; here it is which run, fault, rate and view.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from foreshock.experiments import trace
from foreshock.experiments.build import Run
from foreshock.experiments.training import checkpoint
from foreshock.experiments.training.loop import train, train_stack
from foreshock.monitors.adam import AdamUpdateRMS
from foreshock.monitors.attention_scores import AttentionScores
from foreshock.monitors.attention_update import DeltaW
from foreshock.monitors.curvature import GradientCurvature
from foreshock.monitors.delta_bias import DeltaBiasOracle
from foreshock.monitors.optimization import Loss
from tests.experiments.reading_bounds import error_bound
from tests.other_order import OtherBatchedOrder
from tests.rounding_bounds import FP32, gamma, once_stored_in_bf16

pytestmark = pytest.mark.numeric

WEIGHTS = "weights.safetensors"
THREE = (("fault=none", "seed=3"), ("fault=bf16_shift", "seed=4"), ("fault=lr_scale", "fault.factor=10", "seed=5"))
RMSNORM = ("model.norm=rmsnorm", "model.positions=rope", "model.mlp=swiglu", "model.qk_norm=true", "train.steps=30")
LAYERNORM = ("train.steps=30",)
TEN_STEPS = "train.steps=10"
IS_ROUNDING = ("residual", "attention_recomputed", "delta_bias_oracle")
"""In the names of signals that two orders of sums draw anew."""
ROUNDINGS = 500
"""On the longest way: 128 tokens, 41 logits, two layers with products of 16, 8, 16, 16 and 32 terms and their norms."""
PARTING = 2 * math.sqrt(math.sqrt(2**5) * once_stored_in_bf16(ROUNDINGS))
"""How far two orders of sums may part in a step, to what it moves: 0.15. Of 10 to 30 steps, which may part further, it
is held to the same share of what they moved together, as later gradients keep their signs more often than not.

A gradient errs by e = ``once_stored_in_bf16`` in the norm, sqrt(2^5) times as far where 5 bits are truncated, for a
number that falls over an edge then jumps 2^5 times as far, and 2^5 times fewer do. AdamW divides by |g|, so that of
normal gradients a share of about e changes sign, each by two updates: 2 sqrt(e) of the update, in the norm.
"""


class Killed(BaseException):
    pass


def stop_at(step: int):
    def progress(now, *_):
        if now == step:
            raise Killed

    return progress


@pytest.fixture
def make_stack(make_run):
    def make(*overrides: str, faults=THREE):
        return [make_run(*fault, *overrides, "train.stack=3") for fault in faults]

    return make


@pytest.fixture
def singles(make_run, tmp_path):
    """Folders of the same runs, each trained by itself."""

    def folders(*overrides: str, faults=THREE) -> list[Path]:
        runs = [make_run(*fault, *overrides) for fault in faults]
        return [tmp_path / "single" / train(run, tmp_path / "single")["run_id"] for run in runs]

    return folders


def weights_of(folder: Path) -> np.ndarray:
    return np.concatenate([weight.ravel() for _, weight in sorted(load_file(folder / WEIGHTS).items())])


def movement(run: Run, folder: Path) -> float:
    """How far training has moved all weights of a run."""
    before = run.new_model().state_dict()
    after = {name: torch.from_numpy(weight) for name, weight in load_file(folder / WEIGHTS).items()}
    return math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in after))


def assert_same_readings(one: Path, other: Path) -> None:
    """At the same steps, and defined at the same ones."""
    a, b = (trace.read(folder).signals for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        for field in ("steps", "tokens", "undefined"):
            assert np.array_equal(getattr(a[name], field), getattr(b[name], field)), (name, field)
        assert np.array_equal(np.isfinite(a[name].values), np.isfinite(b[name].values)), name


def assert_same_bits(one: Path, other: Path) -> None:
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    assert_same_readings(one, other)
    a, b = (trace.read(folder).signals for folder in (one, other))
    for name in a:
        np.testing.assert_array_equal(a[name].values, b[name].values, name)


def assert_near(run: Run, one: Path, other: Path) -> None:
    """Of two folders of a run: as near as another order of sums leaves them."""
    assert_same_readings(one, other)
    assert np.linalg.norm(weights_of(one) - weights_of(other)) < PARTING * movement(run, one)
    here, there = (trace.read(folder).signals for folder in (one, other))
    for name in (name for name in here if not any(part in name for part in IS_ROUNDING)):
        values = np.nan_to_num(here[name].values)
        assert abs(np.nan_to_num(there[name].values) - values).max() <= PARTING * abs(values).max(), name
    for name in ("train_loss_raw", "grad_global_norm", "held_out_loss"):  # of the first weights, which are the same
        first = once_stored_in_bf16(ROUNDINGS) if name == "grad_global_norm" else 2 * gamma(ROUNDINGS, FP32)
        np.testing.assert_allclose(there[name].values[0], here[name].values[0], rtol=first, err_msg=name)


def assert_same_ends(one: Path, other: Path) -> None:
    ends = ("end_reason", "steps_done", "tokens_done", "onset_step", "signals", "left_out_monitors")
    here, there = trace.read_manifest(one), trace.read_manifest(other)
    assert {key: here[key] for key in ends} == {key: there[key] for key in ends}


def assert_same_runs(manifests: list[dict], out: Path, others: list[Path]) -> None:
    for manifest, other in zip(manifests, others, strict=True):
        assert_same_bits(out / manifest["run_id"], other)
        assert_same_ends(out / manifest["run_id"], other)


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(nullcontext, id="own_order"),
        pytest.param(OtherBatchedOrder, id="other_order", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("model", [RMSNORM, LAYERNORM], ids=["rmsnorm", "layernorm"])
def test_each_run_of_a_stack_is_the_run_by_itself(make_run, make_stack, singles, tmp_path, model, order):
    overrides = (*model, TEN_STEPS)
    faults = (*THREE, ("fault=none", "train.learning_rate=3e-3", "train.weight_decay=0.0", "seed=4"))
    with order():
        manifests = train_stack(make_stack(*overrides, faults=faults), tmp_path)
    alone, runs = singles(*overrides, faults=faults), [make_run(*fault, *overrides) for fault in faults]
    for run, manifest, single in zip(runs, manifests, alone, strict=True):
        assert_near(run, single, tmp_path / manifest["run_id"])
        assert_same_ends(single, tmp_path / manifest["run_id"])
        for other in alone:  # a mix-up would show, of one seed with another fault and rate too
            parted = np.linalg.norm(weights_of(single) - weights_of(other))
            assert other == single or parted > 4 * PARTING * movement(run, single)


def test_a_run_does_not_depend_on_its_company(make_stack, tmp_path):
    overrides = (*LAYERNORM, TEN_STEPS)
    for name, faults in (("three", THREE), ("two", THREE[:0:-1])):
        train_stack(make_stack(*overrides, faults=faults), tmp_path / name)
    for run in make_stack(*overrides, faults=THREE[1:]):
        assert_near(run, tmp_path / "three" / run.run_id, tmp_path / "two" / run.run_id)


@pytest.mark.parametrize(
    "stops", [[3], *(pytest.param(stops, marks=pytest.mark.slow) for stops in ([10], [25])), [7, 19, 28]]
)
def test_a_stopped_stack_resumes_to_the_same_bits(make_stack, tmp_path, stops):
    whole = [tmp_path / "whole" / one["run_id"] for one in train_stack(make_stack(*LAYERNORM), tmp_path / "whole")]
    for step in stops:
        with pytest.raises(Killed):
            train_stack(make_stack(*LAYERNORM), tmp_path / "out", stop_at(step))
        assert {trace.read_manifest(tmp_path / "out" / folder.name)["end_reason"] for folder in whole} == {"failed"}
    manifests = train_stack(make_stack(*LAYERNORM), tmp_path / "out")
    assert_same_runs(manifests, tmp_path / "out", whole)


@pytest.mark.slow
def test_runs_that_were_killed_at_different_checkpoints_resume_each_from_its_own(make_stack, tmp_path, monkeypatch):
    overrides = (*LAYERNORM, "train.steps=22")
    whole = [tmp_path / "whole" / one["run_id"] for one in train_stack(make_stack(*overrides), tmp_path / "whole")]
    saved = checkpoint.save

    def killed_at_20(folder, state):
        if state["step"] == 20 and folder.name == whole[1].name:
            raise Killed
        saved(folder, state)

    monkeypatch.setattr(checkpoint, "save", killed_at_20)
    with pytest.raises(Killed):
        train_stack(make_stack(*overrides), tmp_path / "out")
    monkeypatch.setattr(checkpoint, "save", saved)
    steps = [checkpoint.load(tmp_path / "out" / folder.name, torch.device("cpu"))["step"] for folder in whole]
    assert steps == [20, 10, 10]
    train_stack(make_stack(*overrides), tmp_path / "out")  # as stacks of one run and of two
    for run, one in zip(make_stack(*overrides), whole, strict=True):
        assert_near(run, one, tmp_path / "out" / one.name)
        assert_same_ends(one, tmp_path / "out" / one.name)


@pytest.mark.parametrize(
    ("fault", "end_reason"),
    [(("fault.factor=1e30", "fault.onset=5"), "non_finite"), (("fault.factor=3000", "fault.onset=12"), "diverged")],
)
def test_a_run_that_ends_early_disturbs_no_other(make_stack, singles, tmp_path, fault, end_reason):
    faults = (THREE[0], ("fault=lr_scale", *fault, "seed=5"), THREE[1])
    overrides = (*RMSNORM, "train.stop_drawup_nats=0.5")
    manifests = train_stack(make_stack(*overrides, faults=faults), tmp_path)
    assert [manifest["end_reason"] for manifest in manifests] == ["completed", end_reason, "completed"]
    assert manifests[1]["steps_done"] < 30
    alone, runs = singles(*overrides, faults=faults), make_stack(*overrides, faults=faults)
    for index, manifest in enumerate(manifests):
        assert_same_ends(alone[index], tmp_path / manifest["run_id"])
        if index != 1:
            assert_near(runs[index], alone[index], tmp_path / manifest["run_id"])


def test_a_finished_run_is_skipped_by_its_stack(make_stack, tmp_path):
    runs = make_stack(*LAYERNORM)
    (first,) = train_stack(runs[:1], tmp_path)
    weights = tmp_path / first["run_id"] / WEIGHTS
    before = weights.stat().st_mtime_ns
    again, *others = train_stack(make_stack(*LAYERNORM), tmp_path)
    assert again["wall_s"] == first["wall_s"] and all(other["end_reason"] == "completed" for other in others)
    assert weights.stat().st_mtime_ns == before


def test_monitors_that_know_nothing_of_stacks_watch_run_by_run(make_stack, tmp_path):
    """Training has the same bits; readings are of the same tensors, in another order of sums."""
    overrides = (*RMSNORM, "train.steps=20", "train.checkpoint_every_steps=8")
    whole = [tmp_path / "whole" / one["run_id"] for one in train_stack(make_stack(*overrides), tmp_path / "whole")]
    unaware = (Loss, AttentionScores, DeltaW, AdamUpdateRMS, GradientCurvature, DeltaBiasOracle)

    def unaware_stack():
        runs = make_stack(*overrides)
        for monitor in (one for run in runs for one in run.monitors.values() if isinstance(one, unaware)):
            monitor.needs = replace(monitor.needs, stackable=False)
        return runs

    with pytest.raises(Killed):
        train_stack(unaware_stack(), tmp_path / "out", stop_at(12))
    train_stack(unaware_stack(), tmp_path / "out")
    for one in whole:
        other = tmp_path / "out" / one.name
        assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
        assert_same_readings(one, other)
        assert_same_ends(one, other)
        here, there = (trace.read(folder).signals for folder in (one, other))
        for name, series in here.items():
            bound = error_bound(name) * np.nan_to_num(abs(series.values)).max()
            np.testing.assert_allclose(there[name].values, series.values, rtol=0, atol=bound, err_msg=name)


@pytest.mark.slow
def test_a_stack_trains_in_pieces_to_the_same_bits(make_stack, tmp_path):
    whole = [tmp_path / "whole" / one["run_id"] for one in train_stack(make_stack(*LAYERNORM), tmp_path / "whole")]
    for step in (1, 2):
        manifests = train_stack(make_stack(*LAYERNORM, "train.piece_s=1e-6"), tmp_path / "out")
        assert [(one["end_reason"], one["steps_done"]) for one in manifests] == [("interrupted", step)] * 3
    assert_same_runs(train_stack(make_stack(*LAYERNORM), tmp_path / "out"), tmp_path / "out", whole)
