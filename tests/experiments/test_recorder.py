import numpy as np
import torch

from foreshock.experiments.training.recorder import Recorder
from foreshock.monitors.base import Masked

RUNS = 3


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def rows(columns):
    """Every row as a tuple, in an order of its own."""
    return sorted(zip(*(column.tolist() for column in columns.values()), strict=True), key=str)


def test_a_run_of_a_stack_has_the_rows_that_it_would_record_by_itself():
    stack, alone = Recorder(), [Recorder() for _ in range(RUNS)]
    for step in (3, 6):
        loss, spectrum = randn(RUNS) + step, Masked(randn(RUNS, 2, 4) * step, randn(RUNS, 2, 4) > 0)
        stack.add(step, 10 * step, {"loss": loss, "spectrum": spectrum})
        for run in range(RUNS):
            own = Masked(spectrum.value[run], spectrum.undefined[run])
            alone[run].add(step, 10 * step, {"loss": loss[run], "spectrum": own})
    for run in range(RUNS):
        assert rows(stack.columns(run)) == rows(alone[run].columns())
    assert stack.first_step == alone[0].first_step == 3
    assert len(rows(alone[0].columns())) == 2 * (1 + 8)


def test_a_reading_after_a_look_is_seen_by_the_next_one():
    recorder = Recorder()
    recorder.add(1, 10, {"loss": torch.tensor(1.0)})
    assert recorder.columns()["value"].tolist() == [1.0]
    recorder.add(2, 20, {"loss": torch.tensor(2.0)})
    assert recorder.columns()["value"].tolist() == [1.0, 2.0]
    recorder.clear()
    assert recorder.first_step is None
    recorder.add(4, 40, {"loss": torch.tensor(4.0)})
    assert recorder.first_step == 4 and np.array_equal(recorder.columns()["step"], [4])
