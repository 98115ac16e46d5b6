"""Faults that begin where they change nothing are refused before training; the first faulty update is the onset."""

import pytest

from foreshock.experiments.training.manifest import new_manifest
from foreshock.faults.card import read_card


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adam_step_stuck", "fault.onset=400"], r"fault.onset=400 is too late: after update 325 the bias correction"),
        (["warmup_off", "fault.onset=20"], "fault.onset=20 is too late: the warm-up ends at train.warmup_steps=20"),
        (["schedule_restart", "fault.back_steps=5"], "fault.back_steps=5 is too few: from update 300 it falls back"),
        (["data_repeat", "fault.onset=0"], "fault.onset=0 is not allowed: the data begin there anyway"),
        (["decay_wrong", "fault.group=mlp"], "fault.group='mlp' has no effect with fault.factor=1: it has no vectors"),
        (["label_noise", "fault.onset=500"], "fault.onset=500 is after the end: train.steps=500"),
        (["label_noise", "fault.every=501"], "fault.every=501 is longer than the run: train.steps=500"),
    ],
)
def test_a_fault_that_would_change_nothing_is_refused(make_run, overrides, said):
    with pytest.raises(ValueError, match=said):
        make_run(f"fault={overrides[0]}", *overrides[1:], "train.steps=500", "train.warmup_steps=20")


@pytest.mark.parametrize(
    "overrides",
    [
        ["adam_step_stuck", "fault.onset=325"],
        ["warmup_off", "fault.onset=19"],
        ["schedule_restart", "fault.back_steps=281"],
        ["data_repeat", "fault.onset=0", "fault.cycle=2"],
        ["decay_wrong", "fault.group=norm"],
        ["weight_tile", "fault.content=stale", "fault.rows=0", "fault.onset=0"],
    ],
)
def test_its_neighbours_are_not(make_run, overrides):
    make_run(f"fault={overrides[0]}", *overrides[1:], "train.steps=500", "train.warmup_steps=20")


def test_the_first_faulty_update_of_an_intermittent_fault_is_the_onset_of_its_run(make_run):
    run = make_run("fault=label_noise", "fault.onset=5", "fault.every=4", "fault.window_phase=3")
    manifest = new_manifest(run)
    assert manifest["onset_step"] == 9  # the step that update 8, counted from 0, ends with
    assert read_card(manifest["injection"]).first_step == 8
    healthy = run.healthy_sites()
    assert [step for step in range(13) if run.fault.sites(step, healthy) is not healthy] == [8, 12]


def test_targets_that_the_loss_leaves_out_are_no_training_tokens(make_run):
    run = make_run("fault=padding_counted", "fault.counted=false", "fault.share=0.5", "train.micro_batch=4")
    engine, healthy = run.new_engine(), run.healthy_sites()
    all_of_them = run.train.batch_size * run.model_config.context_length
    assert engine.step(0, [healthy]).tokens == all_of_them
    assert engine.step(1, [run.fault.sites(1, healthy)]).tokens == all_of_them + all_of_them // 2
