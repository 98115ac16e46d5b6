"""One run a dose: the table from made-up readings by hand, and the committed table from the committed readings."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.doses import main
from foreshock.analysis.scores.doses import (
    DELTA_2,
    DELTA_W,
    GRADIENT_NORM,
    HELD_OUT,
    LAWS,
    dose_table,
    doses_of,
    laws_threshold,
)  # fmt: skip

GPT2 = Path(__file__).parents[3] / "results/gpt2_124m-doses"


def a_run(bits: int, *, loss_from_100: float, entropy_from_100: float, law: float) -> pd.DataFrame:
    """200 steps: loss 2, entropies 1.0 and gradient norm 1 up to step 100, and what is given from there on."""
    late = np.arange(10, 201, 10) >= 100
    columns = {
        HELD_OUT: np.where(late, loss_from_100, 2.0),
        DELTA_W: np.where(late, entropy_from_100, 1.0),
        DELTA_2: np.where(late, entropy_from_100, 1.0),
        **dict.fromkeys(LAWS, np.full(20, 1.0)),
        LAWS[0]: np.full(20, law),
    }
    rows = [
        (signal, step, value)
        for signal, values in columns.items()
        for step, value in zip(range(10, 201, 10), values, strict=True)
    ]
    rows += [(GRADIENT_NORM, step, 1.0 if step < 100 else 1.0 + bits) for step in range(1, 201)]
    table = pd.DataFrame(rows, columns=["signal", "step", "max"])
    return table.assign(bits=bits, min=table["max"], mean=table["max"])


@pytest.fixture
def readings() -> pd.DataFrame:
    return pd.concat(
        [
            a_run(0, loss_from_100=2.0, entropy_from_100=1.0, law=1.5),
            a_run(3, loss_from_100=3.0, entropy_from_100=0.5, law=60.0),
        ]
    )


def test_the_table_by_hand(readings):
    healthy, faulty = dose_table(doses_of(readings), 5.0).to_dict("records")
    assert (faulty["diverges"], faulty["laws_alarm"], faulty["delta_w_half_of_healthy"]) == (100, 10, 100)
    assert faulty["gradient_norm_twice_healthy"] == 124  # of 50 samples the upper half is 4, the median 2.5
    assert (faulty["first_law_reading"], faulty["held_out_loss"], faulty["healthy_held_out_loss"]) == (60.0, 3.0, 2.0)
    assert all(pd.isna(healthy[name]) for name in ("diverges", "laws_alarm", "gradient_norm_twice_healthy"))


def test_a_table_without_a_healthy_run_or_a_signal_is_refused(readings, tmp_path, capsys):
    with pytest.raises(ValueError, match="no run of 0 bits"):
        doses_of(readings[readings["bits"] == 3])
    with pytest.raises(ValueError, match="the run of 3 bits has no signal 'held_out_loss'"):
        doses_of(readings[(readings["bits"] == 0) | (readings["signal"] != HELD_OUT)])
    readings.drop(columns="min").to_parquet(tmp_path / "readings.parquet")
    with pytest.raises(SystemExit):
        main([f"readings={tmp_path / 'readings.parquet'}", f"out={tmp_path}"])
    assert "no column 'min'" in capsys.readouterr().err


def test_the_committed_table_and_figure_come_from_the_committed_readings(tmp_path):
    main([f"readings={GPT2 / 'readings.parquet'}", f"out={tmp_path}"])
    assert (tmp_path / "doses.csv").read_text() == (GPT2 / "doses.csv").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 50_000


def test_the_threshold_counts_every_look():
    """160 readings of 6 laws in 144 heads: 138,240 looks share 5 %."""
    assert laws_threshold(1600, 10, 144) == pytest.approx(5.09, abs=0.005)
