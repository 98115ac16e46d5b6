"""A fault that acts at steps 5, 15, 25 ... alone: jittered readings meet it, multiples of 10 never do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from foreshock.experiments import trace
from foreshock.experiments.training import identity
from foreshock.experiments.training.loop import train, train_stack
from foreshock.experiments.training.missing_readings import is_complete, without_readings
from foreshock.monitors import cadence
from foreshock.monitors.cadence import Cadence
from tests.experiments.same_result import assert_same_result
from tests.experiments.test_resume import Killed, stop_at

LONG, SHORT = 300, 60
INCREMENT = "delta_w_norm.q.w10"
ALL = ("attention_laws", "delta_w", "gradient_norm", "update_to_weight")
JITTERED = ["attention_laws", "gradient_norm", "update_to_weight"]
READ_EVERY_10 = ("monitor.delta_w.windows=[10]", *(f"monitor.{name}.every_steps=10" for name in ALL))
FROM_STEP_5_EVERY_10TH = ("fault.onset=4", "fault.every=10")
"""The fifth update is the first faulty one."""
FAULTS = {
    "gradient_norm": ("grad_global_norm", "fault=gradient_scale", "fault.group=null", "fault.factor=1000"),
    "attention_laws": ("key_shift_residual.over_noise", "fault=bf16_shift", "fault.bits=7"),
    "update_to_weight": ("update_to_weight", "fault=lr_scale", "fault.factor=100"),
}
"""By monitor, a signal of it and a fault that it sees."""


def jittered(steps: int) -> list[int]:
    return [step for step in range(1, steps + 1) if Cadence(10, jittered=True).is_due(step)]


def multiples(steps: int) -> list[int]:
    return list(range(10, steps + 1, 10))


@contextmanager
def without_jitter() -> Iterator[None]:
    """As runs were read once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (cadence, identity):
            patch.setattr(module, "JITTER_STEPS", (0,))
        yield


@pytest.fixture
def watched(make_run):
    """Builds a run of so many steps that some monitors watch, at a cadence of 10 unless the overrides say otherwise."""

    def build(steps, names=ALL, *overrides):
        run = make_run(f"train.steps={steps}", *READ_EVERY_10, *overrides)
        return replace(run, monitors={name: run.monitors[name] for name in names})

    return build


def faulty_and_other(series: trace.Series) -> tuple[np.ndarray, np.ndarray]:
    """The largest layer and head of the readings at steps 5, 15, 25 ... and of all others."""
    largest, acts = series.values.reshape(len(series.steps), -1).max(1), series.steps % 10 == 5
    return largest[acts], largest[~acts]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "attention_laws" else pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_of_every_tenth_step_is_read_as_it_acts(watched, tmp_path, name):
    signal, *fault = FAULTS[name]
    run = watched(LONG, [name], *fault, *FROM_STEP_5_EVERY_10TH)
    train(run, tmp_path)
    series = trace.read(tmp_path / run.run_id).signals[signal]
    assert series.steps.tolist() == jittered(LONG)
    faulty, others = faulty_and_other(series)
    assert len(faulty) >= 2 and faulty.min() > 3 * others.max()
    with without_jitter():
        blind = watched(LONG, [name], *fault, *FROM_STEP_5_EVERY_10TH)
        train(blind, tmp_path / "blind")
    unmet = trace.read(tmp_path / "blind" / run.run_id).signals[signal]
    assert unmet.steps.tolist() == multiples(LONG)
    assert unmet.values.max() < faulty.min() / 3


def test_increments_and_the_label_stay_at_multiples_and_the_manifest_says_which(watched, tmp_path):
    run = watched(SHORT)
    train(run, tmp_path)
    read = trace.read(tmp_path / run.run_id)
    for name, series in read.signals.items():
        described = read.described[name]
        if name == "held_out_loss":
            assert series.steps.tolist() == [0, *multiples(SHORT)] and not described.jittered
        else:
            assert described.jittered == (not name.startswith("delta_w"))
            assert series.steps.tolist() == (jittered(SHORT) if described.jittered else multiples(SHORT)), name


def test_a_stack_is_read_at_the_same_steps(watched, tmp_path):
    runs = [watched(SHORT, ALL, "train.stack=2", f"seed={seed}") for seed in (3, 4)]
    train_stack(runs, tmp_path)
    for run in runs:
        signals = trace.read(tmp_path / run.run_id).signals
        assert signals["update_to_weight"].steps.tolist() == signals["grad_global_norm"].steps.tolist()
        assert signals["update_to_weight"].steps.tolist() == jittered(SHORT)
        assert signals[INCREMENT].steps.tolist() == multiples(SHORT)


@pytest.mark.parametrize("stops", [[10], [26], [40, 57]])
def test_a_killed_run_goes_on_to_the_same_readings(watched, tmp_path, stops):
    """Step 10 is that before a reading, 26 and 57 are of readings."""
    often = "train.checkpoint_every_steps=2"
    whole = train(watched(SHORT), tmp_path / "whole")
    for stop in stops:
        with pytest.raises(Killed):
            train(watched(SHORT, ALL, often), tmp_path / "out", stop_at(stop))
    assert train(watched(SHORT, ALL, often), tmp_path / "out")["run_id"] == whole["run_id"]
    assert_same_result(tmp_path / "out" / whole["run_id"], tmp_path / "whole" / whole["run_id"])


@pytest.fixture
def read_once(watched, tmp_path):
    """A finished run that was read at multiples throughout."""
    with without_jitter():
        run = watched(SHORT)
        train(run, tmp_path)
    return tmp_path / run.run_id


def test_a_run_that_was_read_at_multiples_lacks_what_is_jittered_and_reads_that_again(watched, read_once, tmp_path):
    run = watched(SHORT)
    assert read_once.name == run.run_id, "readings name no run"
    assert trace.read(read_once).signals["update_to_weight"].steps.tolist() == multiples(SHORT)
    assert without_readings(run, trace.manifest_of(read_once)) == JITTERED
    train(run, tmp_path)
    assert is_complete(read_once, run)
    train(run, tmp_path / "whole")
    assert_same_result(read_once, tmp_path / "whole" / run.run_id)


def test_every_step_and_other_cadences_are_not_read_again(watched, tmp_path):
    """A cadence of 1 or 3 has no jitter: those readings are what they were."""
    others = ("monitor.gradient_norm.every_steps=1", "monitor.attention_laws.every_steps=3")
    names = ("attention_laws", "delta_w", "gradient_norm")
    with without_jitter():
        train(watched(SHORT, names, *others), tmp_path)
    assert is_complete(tmp_path / watched(SHORT).run_id, watched(SHORT, names, *others))


@pytest.mark.parametrize("stop", [10, 31])
def test_a_run_that_was_begun_at_multiples_goes_on_and_ends_with_jittered_readings(watched, tmp_path, stop):
    """The reading at step 11 compares with the weights of step 10, which the checkpoint did not keep for it."""
    often = "train.checkpoint_every_steps=2"
    with without_jitter(), pytest.raises(Killed):
        train(watched(SHORT, ALL, often), tmp_path, stop_at(stop + 1))
    run = watched(SHORT, ALL, often)
    train(run, tmp_path)
    assert is_complete(tmp_path / run.run_id, run)
    train(run, tmp_path / "whole")
    assert_same_result(tmp_path / run.run_id, tmp_path / "whole" / run.run_id)
