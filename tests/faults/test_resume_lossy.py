"""A resume that forgets: it really happens, forgets what it says, and survives a real kill."""

from dataclasses import replace

import numpy as np
import pytest

from foreshock.experiments.build import Run
from foreshock.experiments.training import checkpoint
from foreshock.experiments.training.loop import train
from foreshock.experiments.training.stacking import why_single
from foreshock.faults.base import Sites
from foreshock.faults.operation import Moment
from foreshock.faults.points import corrupt_starts
from foreshock.faults.resume_lossy import PARTS, Resume, ResumeLossy
from foreshock.faults.schedule import Schedule
from tests.experiments.same_result import WEIGHTS, assert_same_result
from tests.experiments.test_resume import Killed, stop_at

ONSET, STEPS = 13, 24
SHORT = (f"train.steps={STEPS}", "train.held_out_every_steps=8", "train.schedule=cosine")
HEALTHY = Sites(batch_size=8)


@pytest.fixture(autouse=True)
def checked_at_every_step(monkeypatch):
    monkeypatch.setattr("experiments.training.loop.CHECKSUM_EVERY_STEPS", 1)


@pytest.fixture
def short_run(make_run):
    def make(*overrides: str) -> Run:
        run = make_run(*SHORT, *overrides)
        return replace(run, monitors={name: run.monitors[name] for name in ("loss", "adam_update_rms", "delta_w")})

    return make


@pytest.fixture
def lossy(short_run):
    def make(forget: str, *overrides: str) -> Run:
        window = (f"fault.onset={ONSET}", "fault.duration=1")
        return short_run("fault=resume_lossy", f"fault.forget=[{forget}]", *window, *overrides)

    return make


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ("optimizer", ["fault=adam_state_reset", "fault.duration=1"]),
        ("schedule", ["fault=schedule_restart"]),
        ("data", ["fault=data_repeat"]),
    ],
)
def test_one_part_forgotten_is_the_fault_of_that_name_bit_for_bit(lossy, short_run, tmp_path, part, fault):
    manifests = [train(run, tmp_path) for run in (lossy(part), short_run(*fault, f"fault.onset={ONSET}"), short_run())]
    of_lossy, of_single, healthy = (manifest["weights_sha256"] for manifest in manifests)
    assert of_lossy == of_single
    same = [of_lossy[str(step)] == healthy[str(step)] for step in range(1, STEPS + 1)]
    assert same == [True] * ONSET + [False] * (STEPS - ONSET)
    assert manifests[0]["events"] == [{"step": ONSET, "event": "resume", "forgotten": [part]}]
    assert manifests[1]["events"] == []


def test_the_control_is_a_real_stop_and_resume_that_changes_no_bit(lossy, short_run, tmp_path, monkeypatch):
    built, loaded = [], []
    new_engine, load = Run.new_engine, checkpoint.load
    monkeypatch.setattr(Run, "new_engine", lambda run: built.append(run) or new_engine(run))
    monkeypatch.setattr(checkpoint, "load", lambda *arguments: loaded.append(load(*arguments)) or loaded[-1])
    control = train(lossy(""), tmp_path / "control")
    assert len(built) == 2 and [state and state["step"] for state in loaded] == [None, ONSET]
    healthy = train(short_run(), tmp_path / "healthy")
    assert control["injection"]["injections"][0]["control"] and control["injected"] == []
    assert control["weights_sha256"] == healthy["weights_sha256"]
    assert_same_result(tmp_path / "control" / control["run_id"], tmp_path / "healthy" / healthy["run_id"])
    assert control["events"] == [{"step": ONSET, "event": "resume", "forgotten": []}]


def test_a_lost_random_state_draws_other_sequences_and_changes_nothing_else(lossy, tmp_path):
    run = lossy("random")
    starts, moment = run.corpus.starts(0, ONSET, 8), Moment(0, ONSET, run.corpus.vocab_size)
    sites = run.fault.sites(ONSET, HEALTHY)
    assert replace(sites, resume=(), sampling=()) == HEALTHY
    first, again = (corrupt_starts(starts, sites.sampling, run.corpus.places, moment, None) for _ in range(2))
    assert np.array_equal(first, again) and (first != starts).any()
    assert first.dtype == starts.dtype and first.min() >= 0 and first.max() < run.corpus.places.count
    later = ResumeLossy(("random",), onset=ONSET - 1, duration=1).sites(ONSET, HEALTHY)
    assert (corrupt_starts(starts, later.sampling, run.corpus.places, moment, None) != first).any()
    manifest = train(run, tmp_path)
    (entry,) = manifest["injected"]
    assert (entry["point"], entry["tensor"]) == ("sampling", "starts")


def test_the_log_has_the_state_that_was_forgotten(lossy, tmp_path):
    run = lossy("optimizer")
    manifest, engine = train(run, tmp_path), run.new_engine()
    for step in range(ONSET):
        engine.step(step, [run.healthy_sites()])
    names = {weight: name for name, weight in engine.model.named_parameters()}
    state = {
        f"{names[weight]} {key}": tensor.double().norm().item()
        for weight, moments in engine.optimizer.state.items()
        for key, tensor in moments.items()
    }
    logged = {entry["tensor"]: entry["norm"] for entry in manifest["injected"] if entry["point"] == "resume"}
    assert logged.keys() == state.keys() and logged["tokens.weight step"] == ONSET
    for name, norm in state.items():
        assert logged[name] == pytest.approx(norm, rel=1e-12), name


@pytest.mark.parametrize("forget", ["", ",".join(PARTS)])
@pytest.mark.parametrize("stops", [[4], [ONSET], [ONSET + 1], [11, ONSET, 14, 21]])
def test_it_survives_a_kill_before_at_and_after_its_own_stop(lossy, tmp_path, forget, stops):
    whole = train(lossy(forget), tmp_path / "whole")
    for step in stops:
        with pytest.raises(Killed):
            train(lossy(forget), tmp_path / "killed", stop_at(step))
    killed = train(lossy(forget), tmp_path / "killed")
    for key in ("weights_sha256", "injected", "events"):
        assert killed[key] == whole[key], key
    assert_same_result(tmp_path / "killed" / killed["run_id"], tmp_path / "whole" / whole["run_id"])


@pytest.mark.slow
def test_pieces_of_one_step_come_to_the_same_bits(lossy, tmp_path):
    forget = ",".join(PARTS)
    whole = train(lossy(forget), tmp_path / "whole")
    while (piece := train(lossy(forget, "train.piece_s=1e-9"), tmp_path / "pieces"))["end_reason"] != "completed":
        pass
    assert piece["events"] == whole["events"] and piece["injected"] == whole["injected"]
    assert_same_result(tmp_path / "pieces" / piece["run_id"], tmp_path / "whole" / whole["run_id"])


def test_what_was_forgotten_stays_forgotten_until_the_next_resume():
    fault = ResumeLossy(("schedule", "data"), onset=10, duration=15, every=5, window_phase=2)
    assert [fault.last_resume(step) for step in (11, 12, 16, 17, 22, 24, 40)] == [None, 12, 12, 17, 22, 22, 22]
    assert fault.sites(11, HEALTHY) is HEALTHY
    assert fault.sites(17, HEALTHY) == replace(
        HEALTHY, resume=(Resume(("schedule", "data")),), schedule=Schedule(17), data_step=0
    )
    assert fault.sites(40, HEALTHY) == replace(HEALTHY, schedule=Schedule(22), data_step=18)


def test_what_no_later_step_reads_leaves_later_steps_healthy():
    fault = ResumeLossy(("optimizer",), onset=10, duration=1)
    assert fault.sites(10, HEALTHY) == replace(HEALTHY, resume=(Resume(("optimizer",)),))
    assert fault.sites(11, HEALTHY) is HEALTHY


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault.forget=[weights]"], r"fault\.forget=\['weights'\] is not allowed: each of optimizer, schedule, data"),
        (["fault.forget=[data,data]"], r"fault\.forget=\['data', 'data'\] is not allowed: .* once at most"),
        (["fault.onset=0"], r"fault\.onset=0 is not allowed: before the run's first update"),
        (
            ["fault.forget=[schedule]", "train.schedule=constant", "train.warmup_steps=0"],
            "a schedule that begins again changes nothing",
        ),
    ],
)
def test_bad_values_are_refused_by_name(short_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        short_run("fault=resume_lossy", f"fault.onset={ONSET}", *overrides)


def test_two_resumes_at_one_step_meet(short_run):
    two = ("+fault@fault.faults.a=resume_lossy", "+fault@fault.faults.b=resume_lossy")
    forget = ("fault.faults.a.forget=[optimizer]", "fault.faults.b.forget=[]")
    onsets = (f"fault.faults.a.onset={ONSET}", f"fault.faults.b.onset={ONSET}")
    with pytest.raises(ValueError, match=r"Resume\(.*\) and Resume\(.*\) meet"):
        short_run("fault=combined", "~fault.faults.attention", "~fault.faults.learning_rate", *two, *forget, *onsets)


def test_such_a_run_trains_by_itself(lossy):
    assert "is applied in single runs alone" in why_single(lossy("optimizer"))


def test_a_balancing_bias_is_remembered(lossy, short_run, tmp_path):
    experts = ("model=moe_nano", "model.moe.n_experts=4", "model.moe.bias_update_speed=0.01")
    control, healthy = train(lossy("", *experts), tmp_path), train(short_run(*experts), tmp_path)
    weights = [(tmp_path / manifest["run_id"] / WEIGHTS).read_bytes() for manifest in (control, healthy)]
    assert weights[0] == weights[1]
