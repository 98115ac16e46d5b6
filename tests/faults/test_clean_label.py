"""The held-out loss is taken again, through healthy kernels, where and only where a fault changes the forward."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foreshock.analysis.runs.outcomes import BETTER, outcome, outcome_of_folders
from foreshock.experiments import trace
from foreshock.experiments.build import ROOT, build_run
from foreshock.experiments.training.loop import train, train_stack
from foreshock.experiments.training.run_writer import CLEAN, HELD_OUT
from foreshock.experiments.training.single_engine import SingleEngine
from foreshock.experiments.training.stacked_engine import StackedEngine
from tests.conftest import composed

FAULTS = sorted(path.stem for path in (ROOT / "conf" / "fault").glob("*.yaml"))
EVERYTHING = [
    *("model=moe_nano", "model.moe.n_experts=4", "model.positions=rope"),
    *("train.micro_batch=4", "train.clip=0.1", "train.warmup_steps=2", "train.steps=1000"),
    *("train.learning_rate=0.03", "train.held_out_sequences=32"),
]
BACKWARD = {
    "bf16_shift": ["fault.phase=backward"],
    "module_shift": ["fault.site=dy"],
    "rounded_module": ["fault.site=dw"],
    "expert_dead": ["fault.kind=gradient"],
    "natural_bf16": ["fault.pv_accumulation=fp32", "fault.stored_o=fp32"],
}
"""Of faults that can change the forward, what changes the backward alone."""
NEEDED = {
    "dropout_mismatch": ["model.dropout=0.1"],
    "kv_group_swap": ["model.n_heads=4", "model.n_kv_heads=2"],
    "fp16_overflow": ["train.precision=fp16"],
}
"""What a run needs beside, for a fault that not every model can have."""
CONTROLS = {
    "bf16_shift": ["fault.bits=0", "fault.phase=both", "fault.sites=[q]"],
    "mask_shift": ["fault.shift=0"],
    "rounded_module": ["fault.format=fp32"],
    "expert_capacity": ["fault.factor=1.0"],
    "fp8_linear": ["fault.format=fp32"],
    "mx_linear": ["fault.format=fp32"],
}
BRIEF = ["train.steps=8", "train.held_out_every_steps=2", "fault.onset=2", "fault.duration=3"]


def parted(run) -> tuple[bool, bool]:
    """Whether the losses of a healthy forward and of one at the onset differ, and whether the sites say so."""
    engine, healthy = run.new_engine(), run.healthy_sites()
    for step in range(5):  # so that experts and heads are not what they were drawn as
        engine.step(step, [healthy])
    sites = run.fault.sites(run.fault.onset or 0, healthy)
    return not torch.equal(engine.held_out_loss([sites]), engine.held_out_loss([healthy])), sites.changes_forward


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_says_whether_it_changes_the_forward(make_run, name):
    needed = NEEDED.get(name, [])
    differs, says = parted(make_run(f"fault={name}", *needed, *EVERYTHING))
    assert differs == says


@pytest.mark.parametrize(("name", "overrides"), [*BACKWARD.items(), *CONTROLS.items()])
def test_a_backward_fault_and_a_control_change_no_forward(make_run, name, overrides):
    assert parted(make_run(f"fault={name}", *overrides, *EVERYTHING)) == (False, False)


def counting(monkeypatch, engine: type) -> list[bool]:
    """Whether each evaluation from now on is of a changed forward, in a list that fills."""
    evaluations, own = [], engine.held_out_loss

    def held_out_loss(self, sites):
        evaluations.append(any(site.changes_forward for site in sites))
        return own(self, sites)

    monkeypatch.setattr(engine, "held_out_loss", held_out_loss)
    return evaluations


def curves(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The own and the clean held-out loss of a run."""
    run = trace.read(folder)
    clean = run.signals.get(CLEAN.name)
    return run.signals[HELD_OUT.name].values.ravel(), None if clean is None else clean.values.ravel()


def test_the_clean_label_parts_from_the_own_in_the_window_alone(make_run, tmp_path, monkeypatch):
    evaluations = counting(monkeypatch, SingleEngine)
    manifest = train(make_run("fault=mask_shift", "fault.shift=4", *BRIEF), tmp_path)
    own, clean = curves(tmp_path / manifest["run_id"])
    assert (own != clean).tolist() == [False, False, True, False, False]  # steps 0 to 8; updates 2 to 4 are faulty
    assert evaluations == [False, False, True, False, False, False]  # the second after step 4 is the clean one


def test_a_healthy_twin_of_the_same_weights_has_the_clean_loss(make_run, tmp_path):
    run = make_run("fault=mask_shift", "fault.shift=4", *BRIEF)
    _, clean = curves(tmp_path / train(run, tmp_path)["run_id"])
    engine, healthy = run.new_engine(), run.healthy_sites()
    for step in range(4):
        engine.step(step, [run.fault.sites(step, healthy)])
    assert clean[2] == engine.held_out_loss([healthy]).double().item()


@pytest.mark.parametrize("overrides", [["fault=bf16_shift", "fault.phase=backward"], ["fault=lr_scale"]])
def test_a_fault_that_changes_no_forward_costs_no_evaluation(make_run, tmp_path, monkeypatch, overrides):
    evaluations = counting(monkeypatch, SingleEngine)
    manifest = train(make_run(*overrides, *BRIEF), tmp_path)
    assert len(evaluations) == 5
    assert CLEAN.name not in manifest["signals"]
    assert curves(tmp_path / manifest["run_id"])[1] is None


def test_a_fault_that_no_evaluation_meets_has_no_clean_label(make_run, tmp_path):
    brief = [*BRIEF[:2], "fault.onset=2", "fault.duration=1"]  # update 2 is the third, an evaluation follows the fourth
    manifest = train(make_run("fault=mask_shift", *brief), tmp_path)
    assert CLEAN.name not in manifest["signals"]


def test_in_a_stack_only_the_run_with_the_fault_has_a_clean_label(make_run, tmp_path, monkeypatch):
    evaluations = counting(monkeypatch, StackedEngine)
    faults = (["fault=none", *BRIEF[:2]], ["fault=mask_shift", "fault.shift=4", *BRIEF])
    runs = [make_run(*fault, f"seed={3 + row}", "train.stack=2") for row, fault in enumerate(faults)]
    train_stack(runs, tmp_path)
    (_, healthy), (own, clean) = (curves(tmp_path / run.run_id) for run in runs)
    assert healthy is None
    assert (own != clean).tolist() == [False, False, True, False, False]
    assert evaluations == [False, False, True, False, False, False]


def test_a_run_that_goes_on_has_the_clean_label_of_the_whole_one(make_run, tmp_path):
    class Killed(BaseException):
        pass

    def stop(step, *_):
        if step == 5:
            raise Killed

    run = make_run("fault=mask_shift", "fault.shift=4", *BRIEF, "train.checkpoint_every_steps=2")
    train(run, tmp_path / "whole")
    with pytest.raises(Killed):
        train(run, tmp_path / "parts", stop)
    train(run, tmp_path / "parts")
    for whole, parts in zip(*(curves(tmp_path / name / run.run_id) for name in ("whole", "parts")), strict=True):
        assert np.array_equal(whole, parts)


def test_a_run_is_ended_by_its_clean_label(make_run, tmp_path):
    """Logits of the wrong sign in one update raise the own label at once, and the weights are as good as before."""
    flipped = ["fault=module_shift", "fault.modules=[head]", "fault.site=y", "fault.rounding=flip", "fault.bits=16"]
    window = ["train.steps=40", "fault.onset=29", "fault.duration=1"]
    run = make_run(*flipped, *window, "train.stop_drawup_nats=0.5", "train.learning_rate=0.01")
    manifest = train(run, tmp_path)
    own, clean = curves(tmp_path / run.run_id)
    assert own[3] - own[2] > 0.5 > np.max(clean - np.minimum.accumulate(clean))
    assert manifest["end_reason"] == "completed"


@pytest.mark.slow
def test_a_mask_off_by_one_comes_out_as_what_it_is(tmp_path):
    """Through its own kernels it ends below every healthy run; through healthy ones it has long diverged."""

    def trained(*overrides: str) -> Path:
        brief = ["data=stdlib", "model=mha_nano", "train.steps=200", "train.warmup_steps=50", "train.device=cpu"]
        run = replace(build_run(composed(*brief, *overrides)), monitors={})
        return tmp_path / train(run, tmp_path)["run_id"]

    healthy, leaking = [trained(f"seed={seed}") for seed in range(3)], trained("fault=mask_shift", "seed=3")
    own = outcome(curves(leaking)[0], [curves(twin)[0] for twin in healthy])
    assert (own.outcome, own.note) == ("no effect", BETTER)
    clean = outcome_of_folders(leaking, healthy)
    assert (clean.outcome in ("compromised", "divergence"), clean.note) == (True, "")
    assert clean.final_loss > max(clean.healthy_final_losses) > own.final_loss + 0.2
