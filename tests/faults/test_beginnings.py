"""Faults that begin where they change nothing are refused before training; the first faulty update is the onset."""

import pytest
import torch

from foreshock.experiments.training.manifest import new_manifest
from foreshock.experiments.training.optimizer import rate_of
from foreshock.faults.card import read_card
from tests.faults.engine_steps import differing, stepped


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adam_step_stuck", "fault.onset=324"], "fault.onset=324 is too late: from update 324 on the bias correction"),
        (
            ["warmup_off", "fault.onset=19"],
            "fault.onset=19 is too late: the last of train.warmup_steps=20 has the",
        ),
        (
            ["schedule_restart", "fault.back_steps=281"],
            "fault.back_steps=281 is too few: from update 300 it falls back",
        ),
        (["data_repeat", "fault.onset=0"], "fault.onset=0 is not allowed: the data begin there anyway"),
        (["decay_wrong", "fault.group=mlp"], "fault.group='mlp' has no effect with fault.factor=1: it has no vectors"),
        (
            ["fp8_stale_scale", "fault.factor=1", "fault.lag=4", "fault.duration=1"],
            "fault.lag=4 has no effect: with fault.factor=1 and fault.scaling='current' it needs at least 2 ",
        ),
        (
            ["fp8_stale_scale", "fault.factor=1", "fault.lag=4", "fault.scaling=delayed", "fault.onset=498"],
            "fault.scaling='delayed' it needs at least 3 faulty updates before train.steps=500, and the window has 2",
        ),
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
        ["adam_step_stuck", "fault.onset=323"],
        ["warmup_off", "fault.onset=18"],
        ["schedule_restart", "fault.back_steps=282"],
        ["data_repeat", "fault.onset=0", "fault.cycle=2"],
        ["decay_wrong", "fault.group=norm"],
        ["fp8_stale_scale", "fault.duration=1"],
        ["fp8_stale_scale", "fault.factor=1", "fault.lag=4", "fault.duration=2"],
        ["fp8_stale_scale", "fault.factor=1", "fault.lag=4", "fault.scaling=delayed", "fault.onset=497"],
        ["fp8_stale_scale", "fault.factor=1", "fault.duration=1"],
        ["weight_tile", "fault.content=stale", "fault.rows=0", "fault.onset=0"],
    ],
)
def test_its_neighbours_are_not(make_run, overrides):
    make_run(f"fault={overrides[0]}", *overrides[1:], "train.steps=500", "train.warmup_steps=20")


@pytest.mark.parametrize("counter", [323, 324])
def test_a_counter_that_stands_still_shows_as_long_as_its_correction_is_not_1_in_fp32(counter):
    """From weights of 0, so that every bit of an update shows; log(2^-24) / log(0.95) - 1 lies between the two."""
    generator = torch.Generator().manual_seed(0)
    gradient, mean, square = (torch.rand(100_000, generator=generator) for _ in range(3))
    updates = []
    for t in (counter, counter + 1):
        weight = torch.nn.Parameter(torch.zeros(100_000))
        optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.95), fused=True)
        state = {"step": torch.tensor(float(t)), "exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
        optimizer.state[weight] = state
        weight.grad = gradient.clone()
        optimizer.step()
        updates.append(weight.detach())
    assert torch.equal(*updates) == (counter == 324)


@pytest.mark.parametrize(("scaling", "first"), [("current", 1), ("delayed", 2)])
@pytest.mark.parametrize("lag", [1, 4])
def test_a_scale_that_lags_differs_from_its_recipe_from_the_first_update_that_can(make_run, scaling, first, lag):
    recipes = (["fault=fp8_linear"], ["fault=fp8_stale_scale", "fault.factor=1", f"fault.lag={lag}"])
    (_, right, _), (_, wrong, _) = (stepped(make_run(*keys, f"fault.scaling={scaling}"), 3) for keys in recipes)
    changed = [bool(differing(*pair)) for pair in zip(right, wrong, strict=True)]
    assert changed == [step >= first for step in range(3)]


@pytest.mark.parametrize(("fault", "last"), [("warmup_off", "onset=18"), ("schedule_restart", "back_steps=282")])
def test_the_last_beginning_that_is_allowed_changes_the_rate(make_run, fault, last):
    run = make_run(f"fault={fault}", f"fault.{last}", "train.steps=500", "train.warmup_steps=20")
    first, healthy = run.fault.window.first, run.healthy_sites()
    schedule = run.fault.sites(first, healthy).schedule
    assert rate_of(run.train, first, schedule) != rate_of(run.train, first, healthy.schedule)


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
