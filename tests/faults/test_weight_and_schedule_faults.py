"""Faults of weights and of the schedule: exactly the change that is said, and healthy bits as the control."""

import pytest
import torch

from foreshock.experiments.training.optimizer import learning_rate
from foreshock.faults.init_scale import InitScale
from foreshock.faults.schedule_restart import ScheduleRestart
from foreshock.faults.warmup_off import WarmupOff
from foreshock.faults.weight_tile import WeightTile
from tests.faults.engine_steps import differing, points_logged, stepped, whole_and_resumed

NAME = "blocks.0.attention.q.weight"


@pytest.mark.parametrize(
    ("name", "onset", "control"),
    [
        ("warmup_off", 2, "fault.share=1.0"),
        ("schedule_restart", 2, "fault.back_steps=0"),
        ("init_scale", 2, "fault.factor=1.0"),
        ("weight_tile", 2, "fault.rows=0"),
    ],
)
def test_it_acts_from_its_onset_on_and_its_control_never(make_run, name, onset, control):
    run, idle = (make_run(f"fault={name}", f"fault.onset={onset}", *more) for more in ([], [control]))
    (engine, weights, _), (calm, still, _), (_, healthy, _) = (stepped(r, onset + 1) for r in (run, idle, make_run()))
    assert [bool(differing(*pair)) for pair in zip(weights, healthy, strict=True)] == [False] * onset + [True]
    assert not any(differing(*pair) for pair in zip(still, healthy, strict=True))
    (point,) = {injection.where["point"] for injection in run.fault.describe().injections}
    assert set(points_logged(engine)) == {point} and points_logged(engine)[point] > 0
    assert idle.fault.describe().control and calm.logs[0].entries() == []


@pytest.mark.parametrize(("share", "warmup"), [(0.0, 0), (0.4, 2)])
def test_without_a_warm_up_it_is_the_very_run_that_has_none(make_run, share, warmup):
    schedule = "train.schedule=cosine"
    _, without, _ = stepped(make_run("fault=warmup_off", f"fault.share={share}", schedule), 4)
    _, other, _ = stepped(make_run(f"train.warmup_steps={warmup}", schedule), 4)
    assert not any(differing(*pair) for pair in zip(without, other, strict=True))


@pytest.mark.parametrize(("back_steps", "first"), [("null", 3), (2, 2), (9, 3)])
def test_a_restarted_schedule_has_the_rates_of_its_beginning(make_run, back_steps, first):
    run = make_run("fault=schedule_restart", "fault.onset=3", f"fault.back_steps={back_steps}")
    engine, healthy, rates = run.new_engine(), run.healthy_sites(), []
    for step in range(6):
        engine.step(step, [run.fault.sites(step, healthy)])
        rates.append({group["lr"] for group in engine.optimizer.param_groups})
    at = [0, 1, 2, *(step - first for step in range(3, 6))]
    assert rates == [{learning_rate(run.train, step)} for step in at]


def test_a_wrong_start_scales_the_matrices_of_its_group_alone(make_run):
    run = make_run(
        "fault=init_scale",
        "fault.group=attention",
        "model.qk_norm=true",
        "model.norm=rmsnorm",
        "train.learning_rate=1e-30",
    )
    _, wrong, _ = stepped(run, 1)
    right = {name: x.detach() for name, x in run.new_model().named_parameters()}
    hit = {name for name in right if ".attention." in name and "norm" not in name}
    # with so small a learning rate an update changes no bit of a weight
    assert differing(wrong[0], right) == hit
    assert all(torch.equal(wrong[0][name], 4 * right[name]) for name in hit)


@pytest.mark.parametrize("content", ["zero", "noise", "stale"])
def test_a_tile_is_its_rows_and_nothing_else(make_run, content):
    overrides = ["fault=weight_tile", "fault.rows=3", f"fault.content={content}", "fault.onset=2", "fault.lag=2"]
    _, wrong, _ = stepped(make_run(*overrides), 3)
    _, right, _ = stepped(make_run(), 3)
    assert differing(wrong[2], right[2]) == {NAME}
    rows = (wrong[2][NAME] != right[2][NAME]).any(1).nonzero().flatten()
    assert len(rows) == 3 and int(rows[-1] - rows[0]) == 2
    tile = wrong[2][NAME][rows]
    if content == "zero":
        assert not tile.any()
    elif content == "stale":
        assert torch.equal(tile, right[0][NAME][rows])
    else:  # 48 normal numbers of the rows' own root mean square: their squares' mean within 6 sqrt(2 / 48)
        mean_square = right[2][NAME][rows].square().mean()
        assert float(tile.square().mean() / mean_square) == pytest.approx(1, abs=6 * (2 / 48) ** 0.5)


def test_a_stale_tile_goes_on_after_a_resume_bit_for_bit(make_run):
    run = make_run("fault=weight_tile", "fault.content=stale", "fault.onset=5", "fault.lag=3")
    states = [dict(engine.model.named_parameters()) for engine in whole_and_resumed(run, 4, 7)]
    assert not differing(*states)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupOff(1.5), "fault.share=1.5 is not allowed: 0 to 1"),
        (lambda: ScheduleRestart(-1, onset=1), "fault.back_steps=-1 is not allowed"),
        (lambda: ScheduleRestart(), "fault.onset=0 is not allowed: the schedule begins there anyway"),
        (lambda: InitScale(0.0), "fault.factor=0.0 is not allowed: above 0, finite"),
        (lambda: WeightTile(NAME, -1), "fault.rows=-1 is not allowed"),
        (lambda: WeightTile(NAME, 1, "one"), "fault.content='one' is not allowed: one of zero, noise, stale"),
        (lambda: WeightTile(NAME, 1, "stale", 0), "fault.lag=0 is not allowed: at least 1 update"),
    ],
)
def test_an_impossible_fault_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=warmup_off", "train.warmup_steps=0"], "fault.share=0.0 changes nothing: it leaves 0"),
        (["fault=schedule_restart", "fault.onset=3", "train.warmup_steps=0"], "begins again changes nothing"),
        (["fault=init_scale", "fault.group=norm"], "fault.group='norm' has no effect"),
        (["fault=weight_tile", "fault.rows=17"], "fault.rows=17 is not allowed: blocks.0.attention.q.weight has 16"),
        (["fault=weight_tile", "fault.parameter=blocks.0.q"], "the nearest are"),
        (["fault=weight_tile", "fault.content=stale", "fault.lag=2"], "fault.onset is too early: at step 1 Tile"),
    ],
)
def test_what_the_run_lacks_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)
