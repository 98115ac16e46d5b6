"""The command that lists, adopts and prunes the runs of a folder."""

import pytest

from foreshock.experiments import runs, trace
from foreshock.experiments.training import equivalences
from foreshock.experiments.training.loop import train

SHORT = ("train.steps=20", "train.held_out_every_steps=10", "fault=bf16_shift")


@pytest.fixture
def old_sources(monkeypatch, tmp_path):
    """While it is called, today's sources count as sources of another digest, as those of a run trained before."""
    monkeypatch.setattr(equivalences, "EQUIVALENCES", tmp_path / "equivalences.json")
    monkeypatch.setattr(runs, "CHECKSUM_EVERY_STEPS", 10)
    monkeypatch.setattr("experiments.training.loop.CHECKSUM_EVERY_STEPS", 10)
    equivalences._older.cache_clear()
    yield lambda digest: equivalences.add(digest, "old", evidence={})
    equivalences._older.cache_clear()


@pytest.fixture
def stale(make_run, tmp_path, old_sources):
    """A folder with a run that was trained before ``models.mlp`` changed, and one of today."""
    old_sources(make_run().identity["source_sha256"])
    before = make_run(*SHORT)
    train(before, tmp_path / "runs")
    equivalences.EQUIVALENCES.unlink()
    equivalences._older.cache_clear()
    folder = tmp_path / "runs" / before.run_id
    manifest = trace.read_manifest(folder)
    manifest["sources"]["models.mlp"] = "older"
    trace.write_manifest(folder, manifest)
    train(make_run(*SHORT, "seed=1"), tmp_path / "runs")
    return folder


def listed(out, capsys, *arguments):
    runs.main([*arguments, f"out={out}"])
    return capsys.readouterr().out


def test_a_run_says_whether_and_why_it_would_be_trained_again(stale):
    first, second = runs.stored_in(stale.parent)
    assert {first.folder, second.folder} >= {stale}
    why = {stored.folder: stored.stale for stored in (first, second)}
    assert why.pop(stale) == "changed since: models.mlp" and list(why.values()) == [runs.CURRENT]


def test_every_run_is_a_line(stale, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = listed(stale.parent, capsys)
    assert stale.name in said and "BF16Shift" in said and "completed" in said and "current" in said


def test_a_change_that_trains_the_same_is_adopted(stale, make_run, capsys):
    assert make_run(*SHORT).run_id != stale.name
    said = listed(stale.parent, capsys, "adopt")
    assert said.startswith(f"{stale.name} (faults.bf16_shift.BF16Shift): the same in 20 steps")
    assert make_run(*SHORT).run_id == stale.name
    assert all(not stored.stale for stored in runs.stored_in(stale.parent) if stored.folder == stale)


def test_a_change_that_trains_otherwise_is_not(stale, make_run, capsys):
    manifest = trace.read_manifest(stale)
    manifest["weights_sha256"]["10"] = "0" * 64
    trace.write_manifest(stale, manifest)
    assert "another trajectory" in listed(stale.parent, capsys, "adopt")
    assert make_run(*SHORT).run_id != stale.name and not equivalences.EQUIVALENCES.exists()


def test_pruning_names_the_stale_runs_and_deletes_them_when_it_is_told_to(stale, capsys):
    assert "delete=true deletes these 1 runs" in listed(stale.parent, capsys, "prune")
    assert stale.exists()
    listed(stale.parent, capsys, "prune", "delete=true")
    assert not stale.exists() and len(list(stale.parent.iterdir())) == 1


@pytest.mark.parametrize("arguments", [["lst"], ["list", "where=x"], ["prune", "delete=yes"], ["list", "adopt"]])
def test_wrong_arguments_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        runs.main(arguments)
    assert done.value.code == 2 and capsys.readouterr().err.startswith("usage: python -m experiments.runs")


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        runs.main([f"out={tmp_path / 'none'}"])
    assert "there is no such folder" in capsys.readouterr().err
