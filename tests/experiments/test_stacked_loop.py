"""A run in a stack against the same run by itself.

With RMSNorm and on a CPU every weight and signal is compared bit for bit, but for means of the loss over tokens, whose
sum has another order. A stacked LayerNorm rounds its gain's gradient otherwise, and AdamW divides a gradient that is
all rounding by its own size, so such runs part slowly: they are compared with a single run whose gains were moved by as
much.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from experiments import checkpoint, trace
from experiments.build import Run
from experiments.loop import train
from experiments.stacked_loop import train_stack
from monitors.adam import AdamUpdateRMS
from monitors.attention_scores import AttentionScores
from monitors.attention_update import DeltaW
from monitors.curvature import GradientCurvature
from monitors.delta_bias import DeltaBiasOracle
from monitors.optimization import Loss

WEIGHTS = "weights.safetensors"
THREE = (("fault=none", "seed=3"), ("fault=bf16_shift", "seed=4"), ("fault=lr_scale", "fault.factor=10", "seed=5"))
RMSNORM = ("model.norm=rmsnorm", "model.positions=rope", "model.mlp=swiglu", "model.qk_norm=true", "train.steps=30")
LAYERNORM = ("train.steps=30",)
OF_THE_LOSS = ("train_loss_raw", "train_loss_ema", "held_out_loss")
TWO_ULPS = 2.5e-7


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

    def folders(*overrides: str, faults=THREE, out: str = "single") -> list[Path]:
        runs = [make_run(*fault, *overrides) for fault in faults]
        return [tmp_path / out / train(run, tmp_path / out)["run_id"] for run in runs]

    return folders


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / WEIGHTS)


def distance(one: Path, other: Path) -> float:
    """The largest relative distance of a weight tensor."""
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    return max(float(np.linalg.norm(a[name] - b[name]) / np.linalg.norm(a[name])) for name in a if a[name].any())


def assert_same_bits(one: Path, other: Path) -> None:
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    a, b = trace.read(one).signals, trace.read(other).signals
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name].steps, b[name].steps), name
        assert np.array_equal(a[name].tokens, b[name].tokens), name
        assert np.array_equal(a[name].undefined, b[name].undefined), name
        if name in OF_THE_LOSS:
            np.testing.assert_allclose(a[name].values, b[name].values, rtol=TWO_ULPS, err_msg=name)
        else:
            np.testing.assert_array_equal(a[name].values, b[name].values, name)


def assert_same_runs(manifests: list[dict], out: Path, others: list[Path]) -> None:
    for manifest, other in zip(manifests, others, strict=True):
        assert_same_bits(out / manifest["run_id"], other)
        ends = ("end_reason", "steps_done", "tokens_done", "onset_step", "signals", "left_out_monitors")
        here, there = trace.read_manifest(out / manifest["run_id"]), trace.read_manifest(other)
        assert {key: here[key] for key in ends} == {key: there[key] for key in ends}


def test_each_run_of_a_stack_has_the_bits_of_a_single_one(make_stack, singles, tmp_path):
    faults = (*THREE, ("fault=none", "train.learning_rate=3e-3", "train.weight_decay=0.0", "seed=4"))
    manifests = train_stack(make_stack(*RMSNORM, faults=faults), tmp_path)
    alone = singles(*RMSNORM, faults=faults)
    assert_same_runs(manifests, tmp_path, alone)
    assert distance(alone[1], alone[3]) > 1e-3  # one seed, another fault and rate: a mix-up would show


def test_stacked_layer_norms_part_no_further_than_by_their_rounding(make_stack, singles, tmp_path, monkeypatch):
    manifests = train_stack(make_stack(*LAYERNORM), tmp_path)
    alone = singles(*LAYERNORM)
    initial = Run.new_model

    def nudged(run):
        """The gains one unit in the last place off."""
        model = initial(run)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(1 + 2**-23 if name.endswith("norm.weight") else 1)
        return model

    monkeypatch.setattr(Run, "new_model", nudged)
    moved = singles(*LAYERNORM, out="moved")
    for manifest, single, twin in zip(manifests, alone, moved, strict=True):
        assert 0 < distance(single, tmp_path / manifest["run_id"]) < 10 * distance(single, twin)
        one, stacked, other = (trace.read(f).signals for f in (single, tmp_path / manifest["run_id"], twin))
        assert one.keys() == stacked.keys()
        for name, series in one.items():
            assert np.array_equal(series.undefined, stacked[name].undefined), name
            near, far = (np.nanmax(np.abs(signals[name].values - series.values)) for signals in (stacked, other))
            assert near <= 50 * far, name  # of some 250 signals of three runs two part by more than 10 times as far


def test_a_run_does_not_depend_on_its_company(make_stack, tmp_path):
    for name, faults in (("three", THREE), ("two", THREE[:0:-1])):
        train_stack(make_stack(*LAYERNORM, faults=faults), tmp_path / name)
    for run in make_stack(*LAYERNORM, faults=THREE[1:]):
        assert_same_bits(tmp_path / "three" / run.run_id, tmp_path / "two" / run.run_id)


@pytest.mark.parametrize("stops", [[3], [10], [25], [7, 19, 28]])
def test_a_stopped_stack_resumes_to_the_same_bits(make_stack, tmp_path, stops):
    whole = [tmp_path / "whole" / one["run_id"] for one in train_stack(make_stack(*LAYERNORM), tmp_path / "whole")]
    for step in stops:
        with pytest.raises(Killed):
            train_stack(make_stack(*LAYERNORM), tmp_path / "out", stop_at(step))
        assert {trace.read_manifest(tmp_path / "out" / folder.name)["end_reason"] for folder in whole} == {"failed"}
    manifests = train_stack(make_stack(*LAYERNORM), tmp_path / "out")
    assert_same_runs(manifests, tmp_path / "out", whole)


def test_runs_that_were_killed_at_different_checkpoints_resume_each_from_its_own(make_stack, tmp_path, monkeypatch):
    whole = [tmp_path / "whole" / one["run_id"] for one in train_stack(make_stack(*LAYERNORM), tmp_path / "whole")]
    saved = checkpoint.save

    def killed_at_20(folder, state):
        if state["step"] == 20 and folder.name == whole[1].name:
            raise Killed
        saved(folder, state)

    monkeypatch.setattr(checkpoint, "save", killed_at_20)
    with pytest.raises(Killed):
        train_stack(make_stack(*LAYERNORM), tmp_path / "out")
    monkeypatch.setattr(checkpoint, "save", saved)
    steps = [checkpoint.load(tmp_path / "out" / folder.name, torch.device("cpu"))["step"] for folder in whole]
    assert steps == [20, 10, 10]
    assert_same_runs(train_stack(make_stack(*LAYERNORM), tmp_path / "out"), tmp_path / "out", whole)


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
    assert_same_runs(manifests, tmp_path, singles(*overrides, faults=faults))


def test_a_finished_run_is_skipped_by_its_stack(make_stack, tmp_path):
    runs = make_stack(*LAYERNORM)
    (first,) = train_stack(runs[:1], tmp_path)
    weights = tmp_path / first["run_id"] / WEIGHTS
    before = weights.stat().st_mtime_ns
    again, *others = train_stack(make_stack(*LAYERNORM), tmp_path)
    assert again["wall_s"] == first["wall_s"] and all(other["end_reason"] == "completed" for other in others)
    assert weights.stat().st_mtime_ns == before


def test_monitors_that_know_nothing_of_stacks_watch_run_by_run_to_the_same_bits(make_stack, tmp_path, monkeypatch):
    overrides = (*RMSNORM, "train.steps=20", "train.checkpoint_every_steps=8")
    whole = [tmp_path / "whole" / one["run_id"] for one in train_stack(make_stack(*overrides), tmp_path / "whole")]
    for unaware in (Loss, AttentionScores, DeltaW, AdamUpdateRMS, GradientCurvature, DeltaBiasOracle):
        monkeypatch.delattr(unaware, "stackable")
    with pytest.raises(Killed):
        train_stack(make_stack(*overrides), tmp_path / "out", stop_at(12))
    assert_same_runs(train_stack(make_stack(*overrides), tmp_path / "out"), tmp_path / "out", whole)


def test_a_stack_trains_in_pieces_to_the_same_bits(make_stack, tmp_path):
    whole = [tmp_path / "whole" / one["run_id"] for one in train_stack(make_stack(*LAYERNORM), tmp_path / "whole")]
    for step in (1, 2):
        manifests = train_stack(make_stack(*LAYERNORM, "train.piece_s=1e-6"), tmp_path / "out")
        assert [(one["end_reason"], one["steps_done"]) for one in manifests] == [("interrupted", step)] * 3
    assert_same_runs(train_stack(make_stack(*LAYERNORM), tmp_path / "out"), tmp_path / "out", whole)
