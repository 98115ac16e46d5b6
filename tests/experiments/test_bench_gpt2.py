"""``experiments.bench_gpt2`` as far as a CPU shows it: a rehearsal of every piece, and its own counting."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from foreshock.experiments import bench_gpt2, gpt2_pieces, monitor_costs
from foreshock.experiments.build import ROOT
from foreshock.experiments.gpt2_sizes import Size
from foreshock.experiments.gpt2_training import Training, flops_a_token
from foreshock.experiments.gpu_record import Record
from foreshock.experiments.monitor_costs import cadences_of, history_seconds, monitor_seconds, taps_seconds
from foreshock.experiments.plain_config import construct, monitors_of
from foreshock.experiments.training.loop import train
from foreshock.models.transformer import Transformer
from foreshock.monitors.base import Needs, Signal
from foreshock.monitors.cadence import period
from foreshock.monitors.watch import Watch

PARTS = ("steps", "monitors", "profile")


@pytest.fixture(scope="module")
def rehearsal(once):
    def rehearse(out):
        command = [sys.executable, "-m", "experiments.bench_gpt2", "device=cpu", "size=tiny", f"out={out}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(out / "cpu-gpt2-tiny.json")

    return json.loads((once("rehearsal", rehearse) / "cpu-gpt2-tiny.json").read_text())


@pytest.mark.e2e
@pytest.mark.slow
def test_every_piece_is_rehearsed(rehearsal):
    assert rehearsal["complete"] and not rehearsal["not_reached"]
    names = [name for part in PARTS for name in rehearsal[part]]
    assert sorted(names) == sorted(name for _, name, _ in gpt2_pieces.pieces(Size.tiny("cpu")))


@pytest.mark.e2e
@pytest.mark.slow
def test_every_contestant_has_its_rate_and_its_ratio(rehearsal):
    for found in rehearsal["steps"].values():
        assert set(found) == {"healthy", "sdpa", "fault on"}
        for one in found.values():
            assert one["tokens_per_s"] == pytest.approx(8 * 16 / one["step_ms"] * 1e3)
            assert one["time_over_healthy"] == pytest.approx(one["step_ms"] / found["healthy"]["step_ms"])
            assert 0 < one["share_of_hopper_peak"] < one["model_tflops"]


@pytest.mark.e2e
@pytest.mark.slow
def test_every_monitor_is_costed_and_the_shares_add_up(rehearsal):
    for found in rehearsal["monitors"].values():
        assert found["ok"] and set(found["shares_of_step"]) == {*monitors_of(experts=False), "taps", "history"}
        assert found["share_of_step"] == pytest.approx(sum(found["shares_of_step"].values()))
        assert all(ms > 0 for ms in found["reading_ms"].values())


@pytest.mark.e2e
@pytest.mark.slow
def test_a_step_has_its_parts_and_its_kernels(rehearsal):
    parts = rehearsal["profile"]["parts of a step"]
    assert parts["step"] > parts["batch to the device"] > 0
    assert (parts["micro_batches_a_step"], parts["watched_sequences"]) == (2, 1)
    compiled, rest = parts["compiled micro-batch"], parts["step"] - parts["watched sequences"]  # 4 + 3 + 1 sequences
    for name, ms in (
        ("all_were_compiled", rest + compiled / 4),
        ("a_whole_micro_batch_were_watched", rest - compiled * 3 / 4 + parts["eager micro-batch"]),
    ):
        assert parts[f"tokens_per_s_if_{name}"] == pytest.approx(8 * 16 / (ms / 1e3))
    for found in rehearsal["profile"]["kernels"].values():
        assert 0 < sum(one["ms"] for one in found["dearest"].values()) <= 1.001 * found["total_ms"]


@pytest.mark.e2e
@pytest.mark.slow
def test_eigenproblems_are_timed_where_they_can_be_solved(rehearsal):
    found = rehearsal["profile"]["eigenproblems"]
    values = {f"values alone, {count} of width {width}" for count, width in ((512, 8), (128, 16), (48, 32))}
    assert set(found) == values | {"values and vectors, 12 of width 32"}
    assert all(set(ms) == {"device", "cores of the host"} and min(ms.values()) > 0 for ms in found.values())


def test_operations_are_those_of_gpt2():
    """85 million parameters in blocks, 38.6 in the head, and half of 12 x 12 x 768 x 1024 for causal attention."""
    model = construct("model", "gpt2_124m", backend="sdpa")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(model).parameters())
    matrices_and_norms = 12 * (12 * 768**2 + 4 * 768) + 2 * 768 + 50304 * 768
    assert flops_a_token(model, parameters) == 6 * matrices_and_norms + 6 * 12 * 768 * 1024


def test_a_step_is_the_loop_s(make_run, tmp_path, monkeypatch):
    """The same weights after three updates, bit for bit."""
    run = make_run(
        "train.micro_batch=2",
        "train.watched_sequences=1",
        "train.steps=3",
        "train.held_out_every_steps=3",
        "train.warmup_steps=2",
        "fault=bf16_shift",
    )
    numerics = run.fault.sites(0, run.healthy_sites()).numerics
    training = Training(run.model_config, replace(run.train, device="cpu"), numerics, "inductor")
    for index in range(3):
        training.step(index)
    monkeypatch.setattr(run.corpus, "batch", lambda *_: torch.cat(training.batch()).numpy())
    train(run, tmp_path)
    expected = load_file(tmp_path / run.run_id / "weights.safetensors")
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


class Counted:
    """A monitor that is due at every step, and has more to read at every tenth."""

    signals = (Signal("a", "1", "up"), Signal("b", "1", "up", every_steps=10))
    needs = Needs()

    def __init__(self):
        self.steps = []

    def observe(self, view):
        self.steps.append(view.step)
        return {}


def test_a_mixed_cadence_is_averaged_over_its_steps(monkeypatch):
    """Nine steps in ten are cheap ones."""
    monkeypatch.setattr(monitor_costs, "reading_seconds", lambda m, view, d: 5.0 if view.step % 10 == 0 else 1.0)
    training = Size.tiny("cpu").training(4, False)
    view = monitor_costs.watched_step(training, Watch(training.engine.anatomy, training.engine.optimizer, {}), 600)
    found = monitor_seconds(Counted(), view, torch.device("cpu"))
    assert found == {"reading_s": 5.0, "mean_s": pytest.approx((5.0 + 9 * 1.0) / 10)}
    assert period(cadences_of({"counted": Counted()})) == 600  # at which all are due, jittered or not


def test_a_monitor_that_raises_is_named_and_the_others_are_costed():
    class Broken(Counted):
        def observe(self, view):
            raise RuntimeError("first\nsecond")

    monitors = monitors_of(experts=False)
    chosen = {"broken": Broken(), "delta_w": monitors["delta_w"], "attention_laws": monitors["attention_laws"]}
    training = Size.tiny("cpu").training(4, False)
    found = monitor_costs.monitor_costs(training, chosen)
    assert not found["ok"] and found["errors"] == {"broken": "RuntimeError: first"}
    assert set(found["reading_ms"]) == {"delta_w", "attention_laws"}


def test_copies_and_taps_are_weighted_by_how_often_they_are_made(monkeypatch):
    training = Size.tiny("cpu").training(4, False)
    monitors = monitors_of(experts=False)
    chosen = {name: monitors[name] for name in ("update_to_weight", "attention_laws", "spectral_alignment")}

    def timed(call, device):
        call()
        return 1.0

    monkeypatch.setattr(monitor_costs, "seconds", timed)
    assert history_seconds(training, chosen) == 1.0
    taken = {frozenset(): 1.0, frozenset({"dot_product"}): 2.0, frozenset({"dot_product", "linear"}): 4.0}
    monkeypatch.setattr(monitor_costs, "in_turns", lambda calls, *_: {places: taken[places] for places in calls})
    assert taps_seconds(training, chosen) == pytest.approx((4 * 1.0 + 1 * 3.0) / 50)


def test_pieces_stop_at_the_limit_and_what_is_left_is_named(tmp_path):
    now = [0.0]
    record = Record(tmp_path / "a.json", {}, PARTS, 10.0, 4.0, clock=lambda: now[0])
    work = [("steps", "one", 3.0), ("monitors", "two", 4.0), ("profile", "three", 1.0)]

    def taking(seconds):
        def work():
            now[0] += seconds
            return {}

        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_gpt2, "pieces", lambda size: [(part, name, taking(s)) for part, name, s in work])
        assert bench_gpt2.measure(Size.tiny("cpu"), record) == []
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["not_reached"] == ["three"] and not written["complete"] and written["monitors"] == {"two": {}}


def test_a_rival_that_cannot_run_is_named(monkeypatch):
    size = Size.tiny("cpu")
    make = Size.training

    def training(self, *how, **changes):
        if changes:
            raise ValueError("no kernel\nhere")
        return make(self, *how)

    monkeypatch.setattr(Size, "training", training)
    found = gpt2_pieces.step_rates(size, 4, False)
    assert found["sdpa"] == {"error": "ValueError: no kernel"}
    assert found["fault on"]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device=gpu", "size=tiny"], "error: device='gpu' is not allowed: cpu or cuda\n"),
        (["device=cpu", "size=small"], "error: size='small' is not allowed: gpt2_124m or tiny\n"),
        (["device=cpu", "limit=1"], "error: 'limit=1' is not allowed: device=..., size=..., out=..., limit_s=...\n"),
        (["device=cpu", "size=tiny", "limit_s=long"], "error: limit_s='long' is not allowed: seconds, above 0\n"),
        (
            ["device=cpu"],
            "error: size='gpt2_124m' is not allowed with device='cpu', where it would take hours: size=tiny\n",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_gpt2.main(arguments)
    assert stopped.value.code == 2 and capsys.readouterr().err == message


def test_it_needs_no_more_than_torch_yaml_and_scipy():
    code = (
        "import sys, experiments.bench_gpt2\n"
        "from experiments.plain_config import monitors_of\n"
        "monitors_of(experts=True)\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"hydra", "omegaconf", "pandas", "pyarrow", "pydantic", "rich", "safetensors"} & set(done.stdout.split())
