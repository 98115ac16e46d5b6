"""One new Python file, with one YAML where it takes one, adds a detector, a rule, a track or a report kind.

All of them lie in a folder outside the clone: commands find them by ``--config-dir`` and ``plugins``.
"""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from foreshock.analysis import report, score
from foreshock.analysis.detect.tracks.by_name import TRACKS, tracks_of
from foreshock.analysis.reports.kinds.by_name import kind_of
from foreshock.analysis.runs.conf import Conf, own_conf
from foreshock.analysis.runs.simulated import simulate_experiment
from foreshock.experiments import reproduce
from foreshock.experiments.build import ROOT, build_run
from tests.analysis.made_up_board import COUNTS, DETECTORS, FAULTS, SIGNALS
from tests.contracts.added import MONITOR

TRACK = """
from dataclasses import dataclass

import numpy as np

from foreshock.analysis.detect.bands import finite_or_inf
from foreshock.analysis.detect.tracks.base import Charted, Track


@dataclass(frozen=True)
class StartBand:
    samples: int

    def z(self, series):
        x = finite_or_inf(series)
        start = x[: self.samples]
        z = (x - start.mean(0)) / start.std(0)
        z[: self.samples] = np.nan
        return z


@dataclass(frozen=True)
class StartTrack(Charted):
    samples: int = 20
    takes_files = True

    def band(self, signal, reference):
        return StartBand(self.samples)


class SecondPrimary(StartTrack):
    primary = True


class Half(Charted):
    pass


class Neither(Track):
    pass
"""
KIND = """
from dataclasses import dataclass

import matplotlib.pyplot as plt

from foreshock.analysis.figures.drawing import save
from foreshock.analysis.reports.kinds.base import Kind


@dataclass(frozen=True)
class AlarmCounts(Kind):
    title: str = "Alarms"

    def draw(self, views, report):
        (view, *_) = views
        figure, axis = plt.subplots()
        axis.set_title(self.title)
        axis.bar(list(view.own), [sum(a is not None for a in d.alarms.values()) for d in view.own.values()])
        save(figure, report / "alarms.png")
        return [("How many runs each detector alarms in.", report / "alarms.png")]
"""
DETECTOR = """
import numpy as np


def statistic(x):
    return np.maximum.accumulate(np.where(np.isnan(x), -np.inf, x))
"""
EXPERIMENT = """
name: my_counts
title: Mine
models: ["${scale.dense}"]
align: [steps]
draw: alarm_counts
monitors: [loss, gradient_norm, last_loss]
overrides: [train.compile=false]
faults:
  lr10: {label: LR, overrides: [fault=lr_scale, fault.factor=10.0]}
detectors:
  training loss: [train_loss_ema]
  gradient norm: [grad_global_norm]
  mine: [last_loss]
baseline: training loss
figure: {}
"""
FILES = {
    "my_monitor.py": MONITOR,
    "my_track.py": TRACK,
    "my_kind.py": KIND,
    "mine.py": DETECTOR,
    "conf/track/start.yaml": "_target_: my_track.StartTrack\nsamples: 25\n",
    "conf/report_kind/alarm_counts.yaml": "_target_: my_kind.AlarmCounts\ntitle: Who alarms?\n",
    "conf/rule/slow.yaml": "chart: ewma\nweight: 0.05\n",
    "conf/monitor/last_loss.yaml": "# @package monitor.last_loss\n_target_: my_monitor.LastLoss\nevery_steps: 10\n",
    "conf/experiment/my_counts.yaml": EXPERIMENT,
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of one's own, whose modules can be imported and whose conf/ is given by ``--config-dir``."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in ("my_track", "my_kind", "my_monitor"):
        sys.modules.pop(module, None)


@pytest.fixture
def runs(tmp_path):
    return simulate_experiment(tmp_path / "made", COUNTS, SIGNALS, DETECTORS, FAULTS, baseline="late")


def test_a_detector_a_rule_and_a_track_from_outside_are_scored(mine, runs, tmp_path, capsys):
    given = [f"runs={runs}", f"out={tmp_path / 'out'}", f"config_dir={mine / 'conf'}", "plugins=[my_track]"]
    score.main([*given, "tracks=start", "rule=slow", f"detector={mine / 'mine.py'}"])
    board = pd.read_csv(tmp_path / "out" / "leaderboard.csv")
    assert set(board["track"]) == {"start"} and board.loc[board["detector"] == "mine", "kind"].eq("entrant").all()
    of_fault = board[board["fault"] == "attention"].set_index("detector")
    assert of_fault.loc["early", "detected"] == 1.0
    assert pd.isna(of_fault.loc["mine", "declined"]) and 0 < of_fault.loc["mine", "detected"] <= 1


def test_a_track_from_outside_leaves_the_order_of_the_others_and_takes_its_parameters(mine):
    tracks = tracks_of(Conf((mine / "conf",), ("my_track",)))
    assert tracks["start"].samples == 25 and tracks["start"].name == "start"
    assert [name for name in tracks if name != "start"] == list(TRACKS)


def ask_for(kind, folder, **recorded):
    """Let the index in a folder ask for a kind of report, with what it has recorded of it."""
    index = json.loads((folder / "experiment.json").read_text())
    index["experiment"]["draw"] = kind
    (folder / "experiment.json").write_text(json.dumps(index | recorded))


def test_a_kind_of_report_from_outside_is_drawn(mine, runs, capsys):
    ask_for("alarm_counts", runs)
    with pytest.raises(SystemExit):
        report.main([f"runs={runs}", f"report={runs}"])
    assert "experiment.draw='alarm_counts' is not allowed: one of central" in capsys.readouterr().err
    report.main([f"runs={runs}", f"report={runs}", "--config-dir", str(mine / "conf"), "plugins=[my_kind]"])
    assert (runs / "alarms.png").stat().st_size > 5_000
    assert "How many runs each detector alarms in." in (runs / "index.html").read_text()


def test_an_index_that_recorded_its_kind_is_drawn_without_the_folder(mine, runs, capsys):
    node = {"_target_": "my_kind.AlarmCounts", "title": "x"}
    ask_for("alarm_counts", runs, report_kind=node, plugins=["my_kind"])
    with pytest.raises(SystemExit):
        report.main([f"runs={runs}", f"report={runs}"])
    assert "is a class of plugins=[my_kind]: a file imports no modules by itself" in capsys.readouterr().err
    report.main([f"runs={runs}", f"report={runs}", "plugins=[my_kind]"])
    assert (runs / "alarms.png").stat().st_size > 5_000


@pytest.mark.parametrize("plugins", [[], ["subprocess"]])
def test_an_index_starts_no_process(runs, plugins):
    index = {"experiment": {"draw": "mine"}, "report_kind": {"_target_": "subprocess.Popen", "args": "id"}}
    with pytest.raises(ValueError, match=r"report_kind\.mine\._target_='subprocess\.Popen' is not allowed"):
        kind_of(index | {"plugins": plugins}, Conf(plugins=tuple(plugins)))


@pytest.mark.parametrize(
    ("content", "plugins", "message"),
    [
        ("_target_: my_track.StartTrack", (), r"_target_='my_track\.StartTrack' is not allowed: a class of analysis"),
        ("_target_: my_track.StratTrack", ("my_track",), r"track\.new\._target_='my_track\.StratTrack' cannot be"),
        ("_target_: no_track.Mine", ("no_track",), r"_target_='no_track\.Mine' cannot be loaded: No module"),
        ("_target_: my_track.StartBand\nsamples: 1", ("my_track",), r"a class derived from Charted or Raw is needed"),
        ("_target_: my_track.Neither", ("my_track",), r"a class derived from Charted or Raw is needed"),
        ("_target_: my_track.Half", ("my_track",), r"_target_='my_track\.Half' is not allowed: it has no band"),
        ("_target_: my_track.StartTrack\nsample: 1", ("my_track",), r"track\.new\.sample is not a key .* 'samples'"),
        ("_target_: my_track.StartTrack\nsamples: x", ("my_track",), r"track\.new\.samples='x' is not allowed"),
        ("_target_: my_track.SecondPrimary", ("my_track",), r"track=new is not allowed: reference is primary already"),
        ("_target_: my_track.StartTrack", ("my_track", "my_track"), r"plugins=.*my_track stands there twice"),
        ("samples: 1", ("my_track",), r"track\.new names no _target_ class"),
        ("[1", ("my_track",), r"new\.yaml is no YAML file"),
    ],
)  # fmt: skip
def test_a_track_that_is_none_is_one_line_by_name(mine, content, plugins, message):
    for file in (mine / "conf" / "track").iterdir():
        file.unlink()
    (mine / "conf" / "track" / "new.yaml").write_text(f"{content}\n")
    with pytest.raises(ValueError, match=message) as error:
        tracks_of(Conf((mine / "conf",), plugins))
    assert "\n" not in str(error.value)


def test_two_files_of_one_name_and_a_folder_that_is_not_there_are_named(mine):
    shutil.copy(mine / "conf" / "track" / "start.yaml", mine / "conf" / "track" / "self.yaml")
    with pytest.raises(ValueError, match=r"track=self is there twice, .*conf/track/self\.yaml and .*self\.yaml"):
        tracks_of(Conf((mine / "conf",), ("my_track",)))
    with pytest.raises(ValueError, match=r"--config-dir=.*nowhere is not allowed: there is no such folder"):
        Conf((mine / "nowhere",))


def test_an_unknown_track_is_named_with_the_nearest(mine, runs, tmp_path, capsys):
    given = [f"runs={runs}", f"out={tmp_path / 'out'}", "--config-dir", str(mine / "conf"), "plugins=my_track"]
    with pytest.raises(SystemExit):
        score.main([*given, "tracks=strat"])
    assert "tracks='strat' is not allowed: one of reference, " in (said := capsys.readouterr().err)
    assert "'start'" in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_new_experiment_with_a_monitor_and_a_kind_of_its_own_is_trained_scored_and_drawn_again(
    mine, text, tiny, tmp_path, monkeypatch, capsys
):
    """Its runs have the ids that they have without what was added."""
    given = ["data=text", f"data.path={text}", *tiny, "train.steps=40", "scale.alpha=0.5", "at_once=1"]
    given.append("scale.seeds={reference: 4, calibration: 1, test: 1, faulty: 1}")
    folders = [f"out={tmp_path / 'runs'}", f"report={tmp_path / 'report'}"]
    added = ["--config-dir", str(mine / "conf"), "plugins=[my_kind,my_monitor]"]
    monkeypatch.setattr("sys.argv", ["reproduce", *added, "experiment=my_counts", *given, *folders])
    reproduce.main()
    picture, index = tmp_path / "report" / "alarms.png", json.loads((tmp_path / "report/experiment.json").read_text())
    assert index["report_kind"]["title"] == "Who alarms?" and "my_kind" in index["plugins"]
    assert picture.stat().st_size > 5_000
    assert "mine" in set(pd.read_csv(tmp_path / "report" / "leadtime.csv")["detector"])
    picture.unlink()
    shutil.rmtree(mine / "conf")
    report.main([f"runs={tmp_path / 'runs'}", f"report={tmp_path / 'report'}", "plugins=[my_kind,my_monitor]"])
    assert picture.stat().st_size > 5_000
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run = build_run(compose("reproduce", [*given, "train.compile=false", "monitor=[loss]", "fault=none", "seed=0"]))
    assert run.run_id in {cell["run_id"] for cell in index["runs"]}


@pytest.mark.parametrize("given", [["--config-dir", "conf"], ["--config-dir=conf"], ["config_dir=conf"]])
def test_a_command_line_names_folders_and_plugins(given, mine, monkeypatch):
    monkeypatch.chdir(mine)
    conf, others = own_conf(["runs=a", *given, "plugins=[my_track, my_kind]", "tracks=start"])
    assert conf == Conf((Path("conf"),), ("my_track", "my_kind")) and others == ["runs=a", "tracks=start"]
    with pytest.raises(ValueError, match=r"--config-dir is not allowed without a folder"):
        own_conf(["--config-dir"])
    assert own_conf(["plugins=[]"]) == (Conf(), [])
