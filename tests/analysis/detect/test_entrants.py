"""Detectors and alarms that were not made here: what enters the board, and what is declined or refused."""

import os
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.detect import river
from foreshock.analysis.detect.alarms import conformal_threshold
from foreshock.analysis.detect.entrants import BadEntrant, entrant_of
from foreshock.analysis.detect.external import read_alarms
from foreshock.analysis.detect.isolation import Limits
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.runs.conf import CONF, conf
from foreshock.analysis.runs.load import load
from foreshock.analysis.score import main
from foreshock.analysis.scores import outcome
from tests.analysis.made_up_board import EARLY, scored

ROOT = Path(__file__).resolve().parents[3]
RISE = np.concatenate((np.zeros(60), np.full(60, 8.0)))


@pytest.mark.parametrize("name", river.RIVER)
def test_rivers_detectors_count_the_drifts_they_have_reported(name):
    noise = 0.1 * np.random.default_rng(0).normal(size=(3, len(RISE)))
    drifts = make_rule(**conf("rule", name)).statistic(noise + [[0.0], [1.0], [0.0]] * RISE)
    assert (np.diff(drifts) >= 0).all()
    assert drifts[1, 59] == 0 < drifts[1, -1]
    assert not drifts[[0, 2]].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "rule").glob("*.yaml")))
@pytest.mark.parametrize(("samples", "onset"), [(60, 30), (120, 60)])
def test_every_rule_can_fire_at_the_length_of_a_run(name, samples, onset):
    """A shift of 6 sigma is found within 60 samples in 20 of 20 runs, at the threshold that 59 healthy ones set."""

    def noise(first, count):
        return [np.random.default_rng(seed).normal(size=samples) for seed in range(first, first + count)]

    reference = noise(1000, 10)
    rule = make_rule(**conf("rule", name)).calibrate(reference)
    threshold = conformal_threshold([rule.statistic(x).max() for x in noise(2000, 59)], 0.05)
    assert sum((rule.statistic(x) > threshold).any() for x in noise(3000, 60)) <= 10  # 5 % and the threshold's luck
    for x in noise(0, 20):
        statistic = rule.statistic(x + 6.0 * (np.arange(samples) >= onset))
        assert (statistic[onset : onset + 60] > max(threshold, statistic[:onset].max())).any()


def test_kswin_counts_the_same_on_all_cores(monkeypatch):
    rule, runs = make_rule(**conf("rule", "kswin")), np.random.default_rng(1).normal(size=(4, 3000)).cumsum(axis=1)
    alone = np.stack([rule.statistic(run) for run in runs])
    assert alone[:, -1].min() > 0
    monkeypatch.setattr(river, "MANY_SAMPLES", runs.size)
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


@pytest.mark.slow
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


HOSTILE = {
    "leaver": ("import os\ndef statistic(x):\n    os._exit(3)\n", "ended itself with exit code 3"),
    "crasher": ("import os, signal\ndef statistic(x):\n    os.kill(os.getpid(), signal.SIGSEGV)\n", "by signal 11"),
    "hog": ("import numpy as np\ndef statistic(x):\n    return np.ones((1 << 30,)) + x[0]\n", "used more than 1 GiB"),
    "complex": ("def statistic(x):\n    return x + 1j\n", "dtype complex128: real numbers are needed"),
    "objects": (
        "import numpy as np\ndef statistic(x):\n    return np.array([[1]] * len(x) + [0], object)[:-1]\n",
        "dtype",
    ),
    "words": ("def statistic(x):\n    return ['high'] * len(x)\n", "dtype <U4: real numbers are needed"),
    "large": ("import numpy as np\ndef statistic(x):\n    return np.zeros(10 * len(x))\n", "one value a sample"),
    "nothing": ("def statistic(x):\n    pass\n", "shape ()"),
    "infinite": ("import numpy as np\ndef statistic(x):\n    return np.full(len(x), np.inf)\n", "not finite in"),
    "flat": (
        "def calibrate(healthy):\n    return 5\ndef statistic(x):\n    return x\n",
        "calibrate returned something",
    ),
    "raiser": (
        "def calibrate(healthy):\n    raise KeyError('a\\x1b[31m\\nb')\ndef statistic(x):\n    return x\n",
        "KeyError",
    ),
    "liar": (
        "import __main__ as m\ndef statistic(x):\n    m.Link.give = lambda self, *a: self._socket.sendall(b'z' * 99)\n"
        "    return x\n",
        "something else than numbers",
    ),
}
"""Detectors that break what they can, and what their row says."""

MEDDLERS = {
    "patcher": "import sys\nsys.path.append({root!r})\nimport analysis.scores.outcome, analysis.scores.contest\n"
    "analysis.scores.outcome.score = analysis.scores.contest.score = lambda **what: 1 / 0\n",
    "mover": "import os\nos.chdir('/')\nos.environ.clear()\n",
    "printer": "import os, sys\nprint('hello')\nos.write(2, b'hello')\nsys.stdin.read()\n",
    "looker": "import gc, sys\nseen = [o for o in gc.get_objects() if type(o).__module__.startswith('analysis')]\n"
    "assert not seen and not any(m.startswith(('analysis', 'experiments')) for m in sys.modules)\n"
    "import os\nassert not any(word in repr((sys.argv[:4], os.environ)) for word in ('attention', 'calibration'))\n",
}
"""Detectors that reach for what is not theirs, and then do as the chart ``same``."""


@pytest.mark.slow
def test_a_hostile_detector_has_a_reason_and_changes_no_other_row(folder, tmp_path, capfd):
    codes = {name: code for name, (code, _) in HOSTILE.items()}
    codes |= {name: code.format(root=str(ROOT)) + ENTRANTS["same"] for name, code in MEDDLERS.items()}
    paths = []
    for name, code in codes.items():
        paths.append(tmp_path / f"{name}.py")
        paths[-1].write_text(f"signals = [{EARLY!r}]\n{code}")
    here, before = os.getcwd(), outcome.score
    alone = scored(folder, tmp_path / "alone", tracks=("reference",))
    limits = Limits(memory_gib=1.0)
    with_them = scored(folder, tmp_path / "out", tracks=("reference",), detectors=tuple(paths), limits=limits)
    assert os.getcwd() == here and outcome.score is before
    assert "hello" not in "".join(capfd.readouterr())
    rows = with_them.loc[("reference", "all")]
    for name, (_, reason) in HOSTILE.items():
        assert reason in rows.loc[name, "declined"], name
        assert rows.loc[name, "declined"].isprintable()
    for name in MEDDLERS:
        assert pd.isna(rows.loc[name, "declined"]), rows.loc[name, "declined"]
        assert rows.loc[name, "rmlt_steps"] == pytest.approx(rows.loc["early", "rmlt_steps"])
    # Ranks, and p-values adjusted for how many compete, are of all rows; each row's own numbers are its own.
    own = [
        "threshold",
        "healthy_alarms",
        "detected",
        "rmlt_steps",
        "rmlt_low",
        "rmlt_high",
        "share_of_possible_lead",
        "delay_steps",
    ]
    pd.testing.assert_frame_equal(with_them.loc[alone.index, own], alone[own], check_exact=True, check_dtype=False)


@pytest.mark.slow
def test_rows_that_are_declined_leave_every_byte_of_the_others(folder, tmp_path):
    path = tmp_path / "leaver.py"
    path.write_text(HOSTILE["leaver"][0])
    scored(folder, tmp_path / "alone", tracks=("reference",))
    scored(folder, tmp_path / "out", tracks=("reference",), detectors=(path,))
    for file in sorted((tmp_path / "alone").glob("*.csv")):
        before, after = (pd.read_csv(tmp_path / place / file.name, dtype=str) for place in ("alone", "out"))
        if "detector" in after:
            after = after[after["detector"] != "leaver"].reset_index(drop=True)
        pd.testing.assert_frame_equal(after[before.columns], before)


@pytest.mark.parametrize("work", ["while True: pass", "time.sleep(1000)", "signal.pause()"])
@pytest.mark.parametrize("function", ["statistic", "calibrate"])
def test_a_detector_that_never_returns_is_ended_and_the_reason_says_the_limit(tmp_path, work, function):
    path = tmp_path / "endless.py"
    path.write_text(f"import signal, time\ndef {function}(x):\n    {work}\n")
    if function == "calibrate":
        path.write_text(path.read_text() + "def statistic(x):\n    return x\n")
    with entrant_of(path, Limits(time_s=60.0)) as entrant:
        entrant.rule.worker._left_s = 0.3  # of the 60, so that the test need not wait
        with pytest.raises(BadEntrant, match=r"did not return within 60 s \(time_limit_s\)"):
            entrant.rule.calibrate([RISE]).statistic(RISE)
        with pytest.raises(BadEntrant):  # it stays ended
            entrant.rule.statistic(RISE)


def test_the_limit_is_on_all_answers_together(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import time\ndef statistic(x):\n    time.sleep(0.1)\n    return x\n")
    with entrant_of(path, Limits(time_s=60.0)) as entrant:
        entrant.rule.worker._left_s = 5.0
        with pytest.raises(BadEntrant, match="did not return within"):
            for _ in range(60):
                entrant.rule.statistic(RISE)


def test_nothing_outlives_a_detector(folder, tmp_path):
    """Neither its process, nor what it started, nor its folder."""
    path, trace = tmp_path / "parent.py", tmp_path / "left.txt"
    path.write_text(
        f"import os, subprocess\nchild = subprocess.Popen(['sleep', '1000'])\nopen({str(trace)!r}, 'a').write("
        "f'{os.getpid()} {child.pid} {os.getcwd()}\\n')\ndef statistic(x):\n    return x\n"
    )
    with entrant_of(path) as entrant:
        assert entrant.rule.statistic(RISE).tolist() == RISE.tolist()
        own, child, place = trace.read_text().split()
        assert os.path.isdir(place) and not os.listdir(place) and os.getpid() != int(own)
    assert not os.path.exists(place)
    with pytest.raises(ProcessLookupError):
        os.kill(int(own), 0)
    state, patience = Path(f"/proc/{child}/stat"), time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < patience:
        time.sleep(0.05)  # it is ended, and the system takes its time
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("statistic = 5\n", "it has no function statistic"),
        ("signals = 5\ndef statistic(x):\n    return x\n", "signals=5 is not allowed: a list of signal names"),
        ("signals = 'loss'\ndef statistic(x):\n    return x\n", "signals='loss' is not allowed"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("import os\nos._exit(0)\n", "ended itself with exit code 0"),
        ("while True:\n    pass\n", "did not return within 1 s"),
        ("def statistic(x\n", "SyntaxError"),
    ],
)
def test_a_file_that_is_no_detector_is_refused_in_one_line(tmp_path, code, reason):
    path, limits = tmp_path / "mine.py", Limits(1.0 if "within 1 s" in reason else 60.0)
    path.write_text(code)
    with pytest.raises(ValueError, match=re.escape(reason)) as error, entrant_of(path, limits):
        pass
    assert str(error.value).startswith(f"detector={path} cannot be loaded: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments", [["time_limit_s=0"], ["memory_limit_gib=-1"], ["time_limit_s=soon"], ["time_limit_s=inf"]]
)
def test_a_limit_is_a_number_above_0(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["runs=nowhere", "out=nowhere", *arguments])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {arguments[0].split('=')[0]}=") and "is not allowed" in said


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
    table = scored(folder, tmp_path / "out", alarms=(path,), tracks=("reference",)).loc[("reference", "attention")]
    row = table.loc["trigger-happy"]
    assert row["healthy_alarms"] == 6 and row["false_alarm_low"] > 0.1 and np.isnan(row["rank"])
    assert table.loc["early", "rank"] > 0


@pytest.mark.parametrize("content", [bytes(range(256)), "run_id,monitor,step\n".encode("utf-16"), b"a,b\n\0\xff"])
def test_a_table_of_alarms_that_is_no_text_is_named(tmp_path, content):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"alarms=.*mine\.csv (is no CSV|has no column)") as error:
        read_alarms([path], [])
    assert "\n" not in str(error.value)


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
        ("run_id,monitor,step\nattention3000,never,5\n", "line 2: monitor='never' is a control's name"),
        ("run_id,monitor,step\nreference0,mine,5\n", "mine.csv lists no run that is scored"),
        ("", "mine.csv is empty"),
        ('run_id,monitor,step\n"attention3000,mine,5\n', "mine.csv is no CSV"),
    ],
)
def test_a_bad_table_of_alarms_is_refused_by_line(folder, tmp_path, lines, message):
    path = tmp_path / "mine.csv"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        scored(folder, tmp_path / "out", alarms=(path,), tracks=("reference",))
