"""Exports of other trackers become traces that ``experiments.trace`` reads, or one line says what is wrong."""

import json
import re
import sys

import numpy as np
import pytest

from foreshock.experiments import trace
from foreshock.experiments.build import ROOT
from foreshock.experiments.elsewhere.traces import ELSEWHERE
from foreshock.experiments.files import sha256
from foreshock.experiments.import_runs import main

WIDE = (
    "global_step,train/loss,eval/loss,grad_norm,lr,note\n0,5.0,5.1,1.0,0.1,a\n10,4.0,,nan,0.1,b\n20,3.5,4.1,inf,0.1,c\n"
)


@pytest.fixture
def imported(tmp_path):
    """Import files of these contents; the traces by run id."""

    def run(kind, contents, *options, names=None):
        paths = []
        for i, content in enumerate(contents):
            path = tmp_path / (names[i] if names else f"run{i}.csv")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            paths.append(str(path))
        main([kind, *paths, f"out={tmp_path / 'out'}", *options])
        return {folder.name: trace.read(folder) for folder in sorted((tmp_path / "out").iterdir())}

    return run


@pytest.fixture
def refused(imported, capsys):
    """The one line with which an import ends; nothing is written."""

    def run(kind, contents, *options, names=None):
        with pytest.raises(SystemExit) as end:
            imported(kind, contents, *options, names=names)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def columns_file(tmp_path, text):
    path = tmp_path / "columns.yaml"
    path.write_text(text)
    return f"columns={path}"


def test_a_wide_csv_becomes_a_trace_of_todays_schema(imported, capsys):
    runs = imported("csv", [WIDE], "cell=twins", "seed=7")
    run = runs["run0"]
    assert set(run.signals) == {"train_loss_raw", "held_out_loss", "grad_global_norm", "learning_rate"}
    loss = run.signals["held_out_loss"]
    assert loss.steps.tolist() == [0, 20] and loss.values.ravel().tolist() == [5.1, 4.1]
    norm = run.signals["grad_global_norm"]
    assert np.isnan(norm.values[1, 0, 0]) and np.isposinf(norm.values[2, 0, 0]) and not norm.undefined.any()
    described = run.described["grad_global_norm"]
    assert (described.family, described.unit, described.bad, described.every_steps) == ("optimization", "1", "up", 10)
    assert run.described["held_out_loss"].every_steps == 20
    said = run.manifest[ELSEWHERE]
    assert (said["cell"], said["file"], said["format"], run.manifest["seed"]) == ("twins", "run0.csv", "csv", 7)
    assert said["sha256"] == sha256(WIDE.encode()) and said["columns"]["train_loss_raw"] == "train/loss"
    assert run.manifest["schema"] == trace.SCHEMA_VERSION and run.horizon == 20
    shown = capsys.readouterr().out
    assert "train/loss -> train_loss_raw: 3 readings, steps 0 to 20, every 10" in shown and "not read: note" in shown


def test_a_long_csv_with_several_runs_and_their_cells_seeds_roles_and_tokens(imported):
    rows = [
        f"{run},{step},{name},{value},c{run},{seed},test,{64 * step}"
        for run, seed in (("a", 3), ("b", 4))
        for name, value in (("loss", 2.5), ("grad_norm", 1.5))
        for step in (0, 5, 10)
    ]
    runs = imported("csv", ["run_id,step,metric,value,cell,seed,role,tokens\n" + "\n".join(rows)])
    assert set(runs) == {"a", "b"}
    assert [run.manifest["seed"] for run in runs.values()] == [3, 4]
    assert runs["b"].manifest[ELSEWHERE]["cell"] == "cb" and runs["b"].manifest[ELSEWHERE]["role"] == "test"
    assert runs["a"].signals["grad_global_norm"].tokens.tolist() == [0, 320, 640]


def test_a_faulty_role_has_an_onset_and_a_healthy_one_has_none(imported):
    runs = imported("csv", [WIDE, WIDE.replace("global_step", "step")], "role=faulty")
    assert [run.onset for run in runs.values()] == [0, 0]


def test_json_lines_of_wandb_with_what_is_no_reading_left_out(imported):
    lines = [
        {"_step": 0, "train/loss": 3.0, "_runtime": 1.5, "hist": {"bins": [1]}},
        {"_step": 1, "train/loss": "NaN"},
        {"_step": 2, "eval/loss": 2.0},
    ]
    runs = imported("wandb", ["\n".join(map(json.dumps, lines))], names=["history.jsonl"])
    signals = runs["history"].signals
    assert signals["train_loss_raw"].steps.tolist() == [0, 1] and np.isnan(signals["train_loss_raw"].values[1, 0, 0])
    assert signals["held_out_loss"].steps.tolist() == [2]


def test_the_log_of_a_hugging_face_trainer_where_training_and_evaluation_share_a_step(imported):
    history = [
        {"step": 10, "loss": 3.0, "grad_norm": 1.0, "epoch": 0.1},
        {"step": 10, "eval_loss": 3.2, "epoch": 0.1},
        {"step": 20, "loss": 2.0, "grad_norm": 0.9, "epoch": 0.2},
        {"step": 20, "train_runtime": 9.0, "train_loss": 2.5},
    ]
    state = json.dumps({"log_history": history, "global_step": 20})
    runs = imported("trainer_state", [state], names=["mine/checkpoint-20/trainer_state.json"])
    signals = runs["mine"].signals
    assert signals["train_loss_raw"].values.ravel().tolist() == [3.0, 2.0]  # not the summary's train_loss
    assert signals["held_out_loss"].steps.tolist() == [10]


def test_algoperf_takes_cell_and_seed_from_the_path_and_the_loss_of_the_minibatch(imported):
    rows = "global_step,grad_norm,loss,train/loss,validation/loss\n0,1,5,,\n0,,,5.2,5.3\n100,1.1,4,,\n"
    path = "external_tuning/mine/study_3/wmt_jax/trial_2/measurements.csv"
    (run,) = imported("algoperf", [rows], names=[path]).values()
    assert run.run_id == "wmt_jax-mine-external_tuning-trial_2-study_3"
    assert run.manifest["seed"] == 3 and run.manifest[ELSEWHERE]["cell"] == "wmt_jax mine external_tuning trial_2"
    assert run.signals["train_loss_raw"].values.ravel().tolist() == [5.0, 4.0]
    assert run.signals["held_out_loss"].values.ravel().tolist() == [5.3]


def test_event_files_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path / "mine"))
    for step, value in ((0, 3.0), (5, 2.5), (10, 2.25)):
        summary = Summary(value=[Summary.Value(tag="train/loss", simple_value=value)])
        writer.add_event(Event(wall_time=float(step), step=step, summary=summary))
    writer.close()
    main(["tensorboard", str(tmp_path / "mine"), f"out={tmp_path / 'out'}"])
    run = trace.read(tmp_path / "out" / "mine")
    assert run.signals["train_loss_raw"].steps.tolist() == [0, 5, 10]
    assert run.signals["train_loss_raw"].values.ravel().tolist() == [3.0, 2.5, 2.25]


def test_without_the_extra_one_line_names_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    assert "pip install 'foreshock[tensorboard]'" in refused("tensorboard", ["x"], names=["events.out"])


def test_columns_by_a_file(imported, tmp_path):
    said = (
        "step: batch\nrun: who\nsignals:\n  my loss: train_loss_raw\n"
        "  probe: {signal: probe_score, unit: points, bad: down, family: probes}\n"
    )
    text = "who,batch,my loss,probe\na,1,3.0,0.1\na,2,2.5,0.2\nb,1,3.1,0.1\nb,2,2.6,0.2\n"
    runs = imported("csv", [text], columns_file(tmp_path, said))
    described = runs["b"].described["probe_score"]
    assert (described.unit, described.bad, described.family) == ("points", "down", "probes")
    assert runs["a"].signals["train_loss_raw"].values.ravel().tolist() == [3.0, 2.5]


def test_the_columns_of_the_guide_are_a_file_of_columns(imported, tmp_path):
    guide = (ROOT / "docs" / "elsewhere.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    text = "run_name,global_step,train/loss,eval/loss,grad_norm,probe/score\nmine,0,3,3.5,1,0.5\n"
    runs = imported("csv", [text], columns_file(tmp_path, block))
    assert set(runs["mine"].signals) == {"train_loss_raw", "held_out_loss", "grad_global_norm", "probe_score"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0,1\n20,1\n10,1\n30,1", "loss at step 10 comes after step 20 (lines 3 and 4): sort the rows by step"),
        ("0,1\n10,1\n10,2\n20,1", "loss has two readings at step 10 (lines 3 and 4): several runs in one file need"),
        ("0,1\n10,1\n0,2\n10,3", "loss begins again at step 0 after step 10 (lines 3 and 4): several runs in one file"),
        ("0,1\n,1", "line 3 has no step"),
        (
            "0,1\n10,1\n20,1\n40,1\n" + "\n".join(f"{s},1" for s in range(50, 200, 10)),
            "no reading at step 30, one every",
        ),
        ("0,1\n1.5,1", "step='1.5' in line 3 is not allowed: an integer from 0 on"),
        ("0,1\n-1,1", "step='-1' in line 3 is not allowed: an integer from 0 on"),
        ("0,1\n10,high", "loss='high' in line 3 is not allowed: a number"),
    ],
)
def test_steps_and_values_that_no_trace_can_hold(refused, rows, said):
    line = refused("csv", [f"step,loss\n{rows}\n"])
    assert "run0.csv" in line and said in line


def test_a_gap_is_taken_where_that_is_asked_for(imported):
    steps = [0, 10, 20, 40, *range(50, 200, 10)]
    text = "step,loss\n" + "\n".join(f"{step},1" for step in steps)
    (run,) = imported("csv", [text], "allow_gaps=true").values()
    assert run.signals["train_loss_raw"].steps.tolist() == steps


def test_a_run_column_keeps_mixed_runs_apart_and_still_checks_each(refused):
    text = "run,step,loss\na,0,1\nb,0,1\na,10,1\nb,10,1\nb,5,1\n"
    assert "run b: train_loss_raw" not in (line := refused("csv", [text]))
    assert "run b: loss at step 5 comes after step 10 (lines 5 and 6)" in line


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("step: stp", "step='stp' is no column; the nearest is 'step'"),
        ("signals: {losss: train_loss_raw}", "signals.losss is no column; the nearest is 'loss'"),
        ("signals: {loss: train_los_raw}", "is no known signal, so it needs unit and bad"),
        ("signals: {loss: train_los_raw}", "did you mean 'train_loss_raw'?"),
        ("signal: {loss: train_loss_raw}", "signal is not a key of it (did you mean 'signals'?"),
        ("signals: {loss: {signal: mine, unit: 1, bad: sideways}}", "bad='sideways' is not allowed: one of up, down"),
        ("signals: {loss: a/b}", "signals.loss.signal='a/b' is not allowed"),
        ("[1, 2]", "is not allowed: keys with values"),
        ("{", "is no YAML"),
    ],
)
def test_a_file_of_columns_that_does_not_fit(refused, tmp_path, columns, said):
    assert said in refused("csv", ["step,loss\n0,1\n"], columns_file(tmp_path, columns))


@pytest.mark.parametrize(
    ("kind", "content", "options", "said"),
    [
        ("csv", "a,loss\n0,1\n", (), "has no column for the step: name it in columns=FILE.yaml (of a, loss)"),
        ("csv", "step,a\n0,1\n", (), "has no column that is a known signal"),
        ("csv", "", (), "is empty"),
        ("csv", "step,loss\n", (), "has no rows"),
        ("csv", "step,loss\n0,1\n", ("role=tset",), "role='tset' is not allowed: one of reference"),
        ("csv", "step,loss\n0,1\n", ("seed=x",), "seed='x' is not allowed"),
        ("csv", "step,loss\n0,1\n", ("colums=x",), "colums is not an option (did you mean 'columns'?"),
        ("csvv", "step,loss\n0,1\n", (), "format='csvv' is not allowed: one of csv, wandb"),
        ("csv", "step,signal,layer,value\n0,loss,3,1\n", (), "layer=3 in line 2 is not allowed"),
        ("csv", "run,step,loss,seed\na,0,1,1\na,1,1,2\n", (), "run a has seed='1' and '2': one run has one"),
        ("trainer_state", "{}", (), "has no log_history"),
        ("wandb", "step,loss\n0,1\n0,1\n", (), "two readings at step 0"),
    ],
)
def test_files_and_options_that_cannot_be(refused, kind, content, options, said):
    assert said in refused(kind, [content], *options)


def test_nothing_is_written_where_one_of_the_files_is_wrong_or_a_run_is_there_already(imported, refused, tmp_path):
    refused("csv", [WIDE, "step,loss\n0,1\n0,2\n"])
    assert not (tmp_path / "out").exists()
    imported("csv", [WIDE])
    assert "run0 is there already" in refused("csv", [WIDE, WIDE])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run0"]
