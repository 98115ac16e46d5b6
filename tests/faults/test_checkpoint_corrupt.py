"""A checkpoint that cannot be loaded: the reader says so, the run goes back, and the manifest has what was lost."""

import errno
from dataclasses import replace

import pytest

from foreshock.experiments.build import Run
from foreshock.experiments.training import checkpoint
from foreshock.experiments.training.loop import train
from foreshock.experiments.training.stacking import why_single
from foreshock.faults.checkpoint_corrupt import FULL_DEVICE, KINDS, LostCheckpoint
from tests.experiments.same_result import assert_same_result
from tests.experiments.test_resume import Killed, stop_at

ONSET, STEPS = 13, 24
SHORT = (f"train.steps={STEPS}", "train.held_out_every_steps=8")
SAID = {
    "truncated": "does not match its SHA-256",
    "bitflip": "does not match its SHA-256",
    "missing": "is missing",
    "unwritable": "cannot be written: No space left on device",
}


@pytest.fixture
def short_run(make_run):
    def make(*overrides: str) -> Run:
        run = make_run(*SHORT, *overrides)
        return replace(run, monitors={name: run.monitors[name] for name in ("loss", "delta_w")})

    return make


@pytest.fixture
def corrupt(short_run):
    def make(*overrides: str) -> Run:
        return short_run("fault=checkpoint_corrupt", f"fault.onset={ONSET}", *overrides)

    return make


@pytest.mark.parametrize(("back", "first"), [("null", 0), ("5", ONSET - 5), (str(ONSET), 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_goes_back_and_comes_to_the_healthy_weights(corrupt, short_run, tmp_path, kind, back, first):
    steps: list[int] = []
    manifest = train(
        corrupt(f"fault.kind={kind}", f"fault.back_steps={back}"),
        tmp_path / "faulty",
        lambda now, *_: steps.append(now),
    )
    healthy = train(short_run(), tmp_path / "healthy")
    assert steps == [*range(1, ONSET + 1), *range(first + 1, STEPS + 1)]
    folder = tmp_path / "faulty" / manifest["run_id"]
    assert_same_result(folder, tmp_path / "healthy" / healthy["run_id"])
    assert manifest["weights_sha256"] == healthy["weights_sha256"] and healthy["events"] == []
    lost = {"back_to_step": first, "lost_steps": ONSET - first}
    assert manifest["events"] == [
        {"step": ONSET, "event": "checkpoint_lost", "kind": kind, "reason": SAID[kind], **lost}
    ]
    (entry,) = manifest["injected"]
    assert (entry["point"], entry["tensor"], entry["steps"]) == ("system", "step", 1)
    assert (entry["elements"], entry["norm"]) == (1, ONSET - first)
    assert list(folder.glob("*.pt")) == []


def test_a_control_has_a_whole_checkpoint_of_the_same_step(corrupt, short_run, tmp_path):
    control, healthy = train(corrupt("fault.back_steps=0"), tmp_path), train(short_run(), tmp_path)
    assert control["injection"]["injections"][0]["control"] and control["injected"] == []
    assert [event["lost_steps"] for event in control["events"]] == [0]
    assert_same_result(tmp_path / control["run_id"], tmp_path / healthy["run_id"])


@pytest.mark.parametrize("stops", [[4], [ONSET - 5], [ONSET], [ONSET - 4, ONSET + 1], [10, 12, ONSET, 20]])
def test_it_survives_a_real_kill(corrupt, tmp_path, stops):
    whole = train(corrupt("fault.back_steps=5"), tmp_path / "whole")
    for step in stops:
        with pytest.raises(Killed):
            train(corrupt("fault.back_steps=5"), tmp_path / "killed", stop_at(step))
    killed = train(corrupt("fault.back_steps=5"), tmp_path / "killed")
    for key in ("weights_sha256", "injected", "events"):
        assert killed[key] == whole[key], key
    assert_same_result(tmp_path / "killed" / killed["run_id"], tmp_path / "whole" / whole["run_id"])


@pytest.mark.parametrize("moment", ["keep", "go_back", "go_on"])
def test_it_survives_a_kill_between_any_two_of_its_files(corrupt, tmp_path, monkeypatch, moment):
    whole = train(corrupt("fault.back_steps=5"), tmp_path / "whole")
    save = checkpoint.save

    def killed(folder, state):
        if moment == "go_back" and state["events"]:
            raise Killed
        save(folder, state)
        if state["step"] == ONSET - 5 and moment == ("go_on" if state["events"] else "keep"):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", killed)
        train(corrupt("fault.back_steps=5"), tmp_path / "killed")
    again = train(corrupt("fault.back_steps=5"), tmp_path / "killed")
    assert again["events"] == whole["events"] and again["injected"] == whole["injected"]
    assert_same_result(tmp_path / "killed" / again["run_id"], tmp_path / "whole" / whole["run_id"])


def test_each_stop_of_a_window_goes_back_once(corrupt, short_run, tmp_path):
    steps: list[int] = []
    window = ("fault.duration=8", "fault.every=4", "fault.back_steps=6")
    manifest = train(corrupt(*window), tmp_path, lambda now, *_: steps.append(now))
    assert [(event["step"], event["back_to_step"]) for event in manifest["events"]] == [(13, 7), (17, 11)]
    assert steps == [*range(1, 14), *range(8, 18), *range(12, STEPS + 1)]
    (entry,) = manifest["injected"]
    assert (entry["elements"], entry["norm"]) == (2, pytest.approx((2 * 6**2) ** 0.5))
    assert_same_result(tmp_path / manifest["run_id"], tmp_path / train(short_run(), tmp_path)["run_id"])


def test_no_checkpoint_is_kept_longer_than_a_loss_ahead_needs_it(corrupt, tmp_path):
    """A loss before every update, each of 3 updates: no more than the 3 that are needed next."""
    kept: list[int] = []

    def count(now: int, *_: object) -> None:
        kept.append(len(list(tmp_path.glob("*/checkpoint-*.pt"))))

    manifest = train(corrupt("fault.duration=null", "fault.back_steps=3"), tmp_path, count)
    assert [event["step"] for event in manifest["events"]] == [*range(ONSET, STEPS)]
    assert max(kept) == 3
    assert not list(tmp_path.glob("*/checkpoint*"))


def test_a_fault_of_the_weights_is_as_without_the_stop(short_run, tmp_path):
    weights = ("+fault@fault.faults.bits=bf16_shift", "fault.faults.bits.onset=3")
    both = ["fault=combined", "~fault.faults.attention", "~fault.faults.learning_rate", *weights]
    lost = ["+fault@fault.faults.lost=checkpoint_corrupt", f"fault.faults.lost.onset={ONSET}"]
    stopped, alone = train(short_run(*both, *lost), tmp_path), train(short_run(*both), tmp_path)
    assert_same_result(tmp_path / stopped["run_id"], tmp_path / alone["run_id"])
    of_bits = [entry for entry in stopped["injected"] if entry["point"] != "system"]
    assert of_bits == alone["injected"] and len(stopped["injected"]) == len(of_bits) + 1


def test_the_file_is_damaged_as_it_says(tmp_path):
    data, path = bytes(range(200)), tmp_path / "file"
    LostCheckpoint("truncated", None).write(path, data)
    assert path.read_bytes() == data[:100]
    LostCheckpoint("bitflip", None).write(path, data)
    differing = [(a, b) for a, b in zip(path.read_bytes(), data, strict=True) if a != b]
    assert [a ^ b for a, b in differing] == [1]
    path.unlink()
    LostCheckpoint("missing", None).write(path, data)
    assert not path.exists()
    with pytest.raises(OSError) as full:
        LostCheckpoint("unwritable", None).write(path, data)
    assert full.value.errno == errno.ENOSPC and not path.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault.kind=bitflop"], r"fault\.kind='bitflop' is not allowed: one of truncated, bitflip"),
        (["fault.back_steps=14"], r"fault\.back_steps=14 is not allowed: 0 \(the healthy control\) to 13"),
        (["fault.back_steps=-1"], r"fault\.back_steps=-1 is not allowed"),
        (["fault.onset=0"], r"fault\.onset=0 is not allowed: before the run's first update"),
    ],
)
def test_bad_values_are_refused_by_name(corrupt, overrides, message):
    with pytest.raises(ValueError, match=message):
        corrupt(*overrides)


def test_a_system_that_cannot_refuse_a_write_is_named(corrupt, tmp_path, monkeypatch):
    assert FULL_DEVICE.exists()
    monkeypatch.setattr("foreshock.faults.checkpoint_corrupt.FULL_DEVICE", tmp_path / "full")
    with pytest.raises(ValueError, match=r"fault\.kind='unwritable' is not allowed here: this system has no .*full"):
        corrupt("fault.kind=unwritable")


def test_such_a_run_trains_by_itself(corrupt):
    assert "is applied in single runs alone" in why_single(corrupt())
