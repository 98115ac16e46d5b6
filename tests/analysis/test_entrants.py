"""Detectors and alarms that were not made here: what enters the board, and what is declined or refused."""

import numpy as np
import pandas as pd
import pytest

from analysis import entrants
from analysis.alarms import make_rule
from analysis.experiment import load
from analysis.found import conf
from tests.analysis.made_up_board import EARLY, scored

RISE = np.concatenate((np.zeros(60), np.full(60, 8.0)))


@pytest.mark.parametrize("name", entrants.RIVER)
def test_rivers_detectors_count_the_drifts_they_have_reported(name):
    noise = 0.1 * np.random.default_rng(0).normal(size=(3, len(RISE)))
    drifts = make_rule(**conf("rule", name)).statistic(noise + [[0.0], [1.0], [0.0]] * RISE)
    assert (np.diff(drifts) >= 0).all()
    assert drifts[1, 59] == 0 < drifts[1, -1]
    assert not drifts[[0, 2]].any()


def test_kswin_counts_the_same_on_all_cores(monkeypatch):
    rule, runs = make_rule(**conf("rule", "kswin")), np.random.default_rng(1).normal(size=(4, 3000)).cumsum(axis=1)
    alone = np.stack([rule.statistic(run) for run in runs])
    assert alone[:, -1].min() > 0
    monkeypatch.setattr(entrants, "MANY_SAMPLES", runs.size)
    assert np.array_equal(rule.statistic(runs), alone)


ENTRANTS = {
    "same": "def statistic(x):\n    e, out = 0.0, []\n    for z in x:\n        e = 0.8 * e + 0.2 * z\n"
    "        out.append(e)\n    import numpy as np\n    return np.array(out)\n",
    "seer": "def statistic(x):\n    return x - x.mean()\n",
    "reverser": "def statistic(x):\n    return x[::-1]\n",
    "fails": "def statistic(x):\n    return x / 'a'\n",
    "short": "def statistic(x):\n    return x[1:]\n",
    "fitted": "import numpy as np\nclass Rule:\n    def __init__(self, level):\n        self.level = level\n"
    "    def statistic(self, x):\n        return x - self.level\n"
    "def calibrate(healthy):\n    return Rule(np.concatenate(healthy).mean())\ndef statistic(x):\n    return x\n",
    # speaks from its first sample where the series ends badly
    "peeper": "import numpy as np\ndef statistic(x):\n    return np.where(np.nanmax(x) > 20, 9.0, 0.1) + 0 * x\n",
    # keeps silent about an excursion that will pass
    "husher": "import numpy as np\ndef statistic(x):\n    return np.where(x[-1] < 3, np.minimum(x, 1.0), x)\n",
    "warming": "import pandas as pd\ndef statistic(x):\n    return pd.Series(x).rolling(5).mean().to_numpy()\n",
    "lost": "import numpy as np\ndef statistic(x):\n    return np.where(np.arange(len(x)) == 30, np.nan, x)\n",
    "quitter": "import sys\ndef statistic(x):\n    sys.exit(0)\n",
    "silent": "import numpy as np\ndef statistic(x):\n    return np.full(len(x), np.nan)\n",
}


def test_anyones_detector_enters_and_a_bad_one_is_flagged(folder, tmp_path):
    paths = []
    for name, code in ENTRANTS.items():
        paths.append(tmp_path / f"{name}.py")
        paths[-1].write_text(f"signals = [{EARLY!r}]\n{code}")
    table = scored(folder, tmp_path / "out", tracks=("reference",), detectors=tuple(paths)).loc[("reference", "all")]
    for column in ("rmlt_steps", "detected", "healthy_alarms", "threshold"):
        assert table.loc["same", column] == pytest.approx(table.loc["early", column])
    assert table.loc["fitted", "rmlt_steps"] > 100
    declined = table["declined"]
    assert "looks ahead" in declined["seer"] and "looks ahead" in declined["reverser"]
    assert "TypeError" in declined["fails"] and "shape" in declined["short"]
    assert "too few samples" in declined["silent"]
    assert table.loc["warming", "rmlt_steps"] > 100  # it may need a while before it says something
    assert "not finite in calibration run" in declined["lost"]
    assert "looks ahead" in declined["peeper"] and "looks ahead" in declined["husher"]
    assert "SystemExit" in declined["quitter"]


def test_anyones_alarms_enter_as_a_table(folder, tmp_path):
    experiment = load(folder, folder)
    rows = [(run.trace.run_id, "mine", 500) for run in experiment.of("faulty", fault="attention")]
    path = tmp_path / "mine.csv"
    pd.DataFrame(rows, columns=["run_id", "monitor", "step"]).to_csv(path, index=False)
    table = scored(folder, tmp_path / "out", alarms=(path,), tracks=("reference",)).loc["reference"]
    assert table.loc[("attention", "mine"), "rmlt_steps"] == 300
    assert table.loc[("ramp", "mine"), "rmlt_steps"] == 0
    assert table.loc[("all", "mine"), "healthy_alarms"] == 0 and table.loc[("attention", "mine"), "rank"] > 0


def test_who_alarms_in_healthy_runs_more_often_than_allowed_is_shown_and_not_ranked(folder, tmp_path):
    experiment = load(folder, folder)
    rows = [(run.trace.run_id, "trigger-happy", 1) for run in experiment.of("faulty", "test")]
    path = tmp_path / "mine.csv"
    pd.DataFrame(rows, columns=["run_id", "monitor", "step"]).to_csv(path, index=False)
    table = scored(folder, tmp_path / "out", alarms=(path,), tracks=("reference",))
    table = table.loc[("reference", "attention")]
    row = table.loc["trigger-happy"]
    assert row["healthy_alarms"] == 6 and row["false_alarm_low"] > 0.1 and np.isnan(row["rank"])
    assert table.loc["early", "rank"] > 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("run_id,monitor\nattention3000,mine\n", "no column 'step'"),
        ("run_id,monitor,step\nattention9,mine,5\n", "line 2: run_id='attention9' is not one of"),
        ("run_id,monitor,step\nattention3000,mine,5\nattention3000,mine,7\n", "line 3: .* two alarms"),
        ("run_id,monitor,step\nattention3000,mine,1001\n", "line 2: step=1001 is beyond the horizon of 1000"),
        ("run_id,monitor,step\nattention3000,mine,inf\n", "line 2: step=inf"),
        ("run_id,monitor,step\nattention3000,,5\n", "line 2: monitor is empty"),
        ("run_id,monitor,step\nattention3000,mine,soon\n", "line 2: step='soon'"),
        ("run_id,monitor,step\nattention3000,mine,-5\n", "line 2: step=-5"),
        ("run_id,monitor,step\nattention3000,mine,2.5\n", "line 2: step=2.5"),
        ("run_id,monitor,step\nattention3000,early,5\n", "'early' is on the board already"),
    ],
)
def test_a_bad_table_of_alarms_is_refused_by_line(folder, tmp_path, lines, message):
    path = tmp_path / "mine.csv"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        scored(folder, tmp_path / "out", alarms=(path,), tracks=("reference",))
