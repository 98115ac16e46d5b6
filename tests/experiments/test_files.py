"""A flipped bit, a lost byte or a lost file of a run, a checkpoint or an index is an error in one line, not a value."""

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from foreshock.analysis.runs.index import read_index
from foreshock.experiments import trace
from foreshock.experiments.files import sealed, unsealed
from foreshock.experiments.sweep import left_to_train
from foreshock.experiments.trace import TraceError
from foreshock.experiments.training import checkpoint
from foreshock.experiments.training.loop import train

FLIPS = 60


class Killed(BaseException):
    pass


def flips(data: bytes):
    """The data with one bit turned, at random places and in the first and last bytes."""
    places = np.random.default_rng(0).integers(8 * len(data), size=FLIPS)
    for place in [*places.tolist(), 0, 8 * len(data) - 1]:
        turned = bytearray(data)
        turned[place // 8] ^= 1 << place % 8
        yield bytes(turned)


def use(folder: Path) -> None:
    """Whatever reads a finished run."""
    trace.is_done(folder)
    _ = trace.read(folder).signals
    trace.read_weights(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def folder(make_run, finished, tmp_path) -> Path:
    """A finished run, trained once."""
    run = make_run()
    train(run, finished)
    return Path(shutil.copytree(finished / run.run_id, tmp_path / "out" / run.run_id))


def test_every_flipped_bit_of_a_finished_run_is_an_error(folder):
    use(folder)
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
    assert {path.name for path in kept} == {"manifest.json", trace.WEIGHTS, *(p.name for p in folder.glob("trace/*"))}
    for path in kept:
        data = path.read_bytes()
        for turned in flips(data):
            path.write_bytes(turned)
            with pytest.raises(TraceError, match=rf"^{re.escape(str(path))} .*$"):
                use(folder)
        path.write_bytes(data)
    use(folder)


def harm(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(pickle.dumps({"head.weight": [1.0]}))


@pytest.mark.parametrize("how", ["gone", "short", "pickle"])
@pytest.mark.parametrize("name", [trace.WEIGHTS, "trace/*.parquet"])
def test_a_finished_run_without_its_files_is_not_done(make_run, folder, name, how):
    """It is named, with what to do, and nothing else of it is touched; the deleted folder is trained again."""
    path = sorted(folder.glob(name))[-1]
    harm(path, how)
    left = sorted(folder.rglob("*"))
    message = rf"{path.name} is damaged \(.*\): rm -r {folder}, then train the run again"
    with pytest.raises(TraceError, match=message):
        train(make_run(), folder.parent)
    with pytest.raises(TraceError, match=message):
        left_to_train([None], [make_run()], folder.parent)
    assert sorted(folder.rglob("*")) == left


def test_all_damaged_runs_of_an_experiment_are_named_at_once(make_run, folder):
    (folder / trace.WEIGHTS).unlink()
    other = make_run("seed=1")
    shutil.copytree(folder, folder.parent / other.run_id)
    with pytest.raises(checkpoint.RunError, match=rf"2 of 3 runs are damaged: rm -r {folder} .*{other.run_id}, then"):
        left_to_train([None] * 3, [make_run(), other, make_run("seed=2")], folder.parent)


def test_a_lost_manifest_is_no_reason_to_train_over_what_it_told_of(make_run, folder):
    (folder / "manifest.json").unlink()
    parts = sorted(folder.glob("trace/*"))
    with pytest.raises(TraceError, match=r"manifest\.json is damaged \(is missing\)"):
        train(make_run(), folder.parent)
    assert sorted(folder.glob("trace/*")) == parts


def test_an_unfinished_run_goes_on_from_whole_files_only(make_run, tmp_path):
    def stop(step, *_):
        if step == 25:
            raise Killed

    run = make_run()
    with pytest.raises(Killed):
        train(run, tmp_path, stop)
    folder = tmp_path / run.run_id
    path = folder / checkpoint.CHECKPOINT
    data = path.read_bytes()
    for turned in [*flips(data), data[:-1], b""]:
        path.write_bytes(turned)
        with pytest.raises(TraceError, match=r"checkpoint\.pt is damaged \(.*\): rm -r"):
            checkpoint.load(folder, run.device)
    path.unlink()
    parts = sorted(folder.glob("trace/*"))
    with pytest.raises(TraceError, match=r"checkpoint\.pt is damaged \(is missing\)"):
        train(run, tmp_path)
    path.write_bytes(data)
    whole = parts[0].read_bytes()
    parts[0].write_bytes(next(flips(whole)))
    with pytest.raises(TraceError, match=rf"{parts[0].name} is damaged"):
        train(run, tmp_path)
    assert sorted(folder.glob("trace/*")) == parts
    parts[0].write_bytes(whole)
    assert train(run, tmp_path)["end_reason"] == "completed"


def test_every_flipped_bit_of_an_index_is_an_error(tmp_path):
    path, index = tmp_path / "experiment.json", {"experiment": {"name": "é", "x": 1e-5}, "runs": [{"seed": 3}, None]}
    path.write_bytes(sealed(index))
    assert unsealed(path.read_bytes()) == index
    for turned in flips(sealed(index)):
        path.write_bytes(turned)
        with pytest.raises(TraceError, match=r"^.*experiment\.json is damaged .*$"):
            read_index(tmp_path)


def test_json_without_a_seal_is_read_unchecked():
    assert unsealed(b'{"a": 1}\n') == unsealed(b'{\n "a": 1\n}\n') == {"a": 1}
    assert unsealed(sealed({"b": 2, "a": 1}, sort_keys=True)) == {"a": 1, "b": 2}
