import pytest

from foreshock.experiments import reproduce, sweep, trace
from foreshock.experiments.train import run_one
from foreshock.experiments.training.loop import train_stack


@pytest.mark.slow
def test_an_experiment_stacks_its_runs_and_trains_the_others_one_by_one(text, tiny, tmp_path, monkeypatch):
    """The real command with its launcher: the attention fault and an LR ramp stack, a smaller batch does not."""
    arguments = [
        "experiment=reference_set_dense", "data=text", f"data.path={text}", *tiny, "train.steps=30", "train.stack=4",
        "scale.reference_set={steps: 30, ramp: {onset: 10, ramp_steps: 10}}", "scale.alpha=0.5", "label.consecutive=3",
        "scale.seeds={reference: 4, calibration: 1, test: 1, faulty: 2}",
        f"out={tmp_path / 'runs'}", f"report={tmp_path / 'report'}",
    ]  # fmt: skip
    together = []

    def spied(runs, *rest):
        together.append([type(run.fault).__name__ for run in runs])
        return train_stack(runs, *rest)

    monkeypatch.setattr(sweep, "train_stack", spied)
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments, "at_once=1"])  # in this process
    reproduce.main()
    assert (tmp_path / "report" / "index.html").exists()
    manifests = [trace.read_manifest(folder) for folder in (tmp_path / "runs").iterdir()]
    assert {manifest["end_reason"] for manifest in manifests} == {"completed"}
    assert together == [["BF16Shift"] * 2 + ["LRScale"] * 2, ["NoFault"] * 4, ["NoFault"] * 2]
    assert len(manifests) == 12  # and two smaller batches
    assert not list((tmp_path / "runs").glob("*/status.json"))


def test_runs_that_are_started_one_by_one_do_not_stack(make_config):
    with pytest.raises(ValueError, match=r"train\.stack=2 has no effect on runs started one by one"):
        run_one(make_config("train.stack=2"))


def test_a_launcher_without_processes_of_ours_needs_no_setting_of_theirs(text, tiny, monkeypatch, capsys):
    """As submitit's, Hydra's basic launcher knows no number of jobs."""
    small = ["data=text", f"data.path={text}", *tiny, "scale.attention_steps=40", "scale.alpha=0.5"]
    arguments = [*small, "dry_run=true", "hydra/launcher=basic"]
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
    reproduce.main()
    assert "healthy" in capsys.readouterr().out
