"""Two faults at one place and time: both act, or they are refused by name before training."""

import pytest
import torch

from foreshock.faults.adam_state_bitflip import AdamStateBitflip
from foreshock.faults.adam_state_format import AdamStateFormat
from foreshock.faults.adam_state_reset import AdamStateReset
from foreshock.faults.adam_state_stale import AdamStateStale
from foreshock.faults.adam_step_stuck import AdamStepStuck
from foreshock.faults.bad_batch import BadBatch
from foreshock.faults.base import Sites
from foreshock.faults.combined import Combined
from foreshock.faults.data_repeat import DataRepeat
from foreshock.faults.decay_wrong import DecayWrong
from foreshock.faults.double_update import DoubleUpdate
from foreshock.faults.dropout_mismatch import DropoutMismatch
from foreshock.faults.fit import check_fits
from foreshock.faults.gradient_bitflip import GradientBitflip
from foreshock.faults.gradient_noise import GradientNoise
from foreshock.faults.gradient_stale import GradientStale
from foreshock.faults.label_shift import LabelShift
from foreshock.faults.mx_linear import MXLinear
from foreshock.faults.operation import Moment
from foreshock.faults.padding_counted import PaddingCounted
from foreshock.faults.points import corrupt_batch
from foreshock.faults.router_frozen import RouterFrozen
from foreshock.faults.schedule_restart import ScheduleRestart
from foreshock.faults.tied_gradient_double import TiedGradientDouble
from foreshock.faults.untied import Untied
from foreshock.faults.weight_bitflip import WeightBitflip
from foreshock.models.batch import IGNORED
from tests.faults.engine_steps import differing

QUERY, KEY = "blocks.0.attention.q.weight", "blocks.0.attention.k.weight"


def check(make_run, *faults):
    run = make_run("train.steps=20")
    check_fits(Combined({f"f{i}": fault for i, fault in enumerate(faults)}), run.model_config, run.train)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (GradientBitflip(QUERY, 5), GradientBitflip(QUERY, 5), "meet: only one of them may set a value"),
        (WeightBitflip(QUERY, 5, duration=1), WeightBitflip(QUERY, 5, count=2, duration=1), "meet"),
        (GradientNoise(0.5), GradientNoise(0.5, "mlp"), "meet"),
        (GradientStale(1, onset=3), GradientStale(2, "mlp", onset=3), "meet"),
        (DecayWrong(2.0), DecayWrong(3.0, "mlp"), "meet"),
        (DecayWrong(2.0, coupled=True), DoubleUpdate("mlp"), "meet"),
        (DoubleUpdate("mlp"), AdamStateStale(), "SecondUpdate.* and FrozenMoments.* meet"),
        (AdamStepStuck("mlp"), DoubleUpdate("mlp"), "meet"),
        (DoubleUpdate(None), AdamStateFormat(group="mlp"), "meet"),
        (AdamStateStale("mlp"), AdamStateFormat(moment="exp_avg"), "FrozenMoments.* and RoundedMoments.* meet"),
        (AdamStepStuck("mlp"), AdamStepStuck(), "meet"),
        (AdamStateStale("attention", onset=3), AdamStateReset(onset=3), "FrozenMoments.* and LostMoments.* meet"),
        (AdamStateBitflip(QUERY, 5, onset=3), AdamStateStale(onset=3), "meet"),
        (AdamStateBitflip(QUERY, 5, onset=3), AdamStateReset(group="attention", onset=3), "meet"),
        (MXLinear(), MXLinear(modules=("blocks.1.mlp.*",)), "meet"),
        (MXLinear(modules=("*.mlp.*",)), MXLinear(), "meet"),
        (TiedGradientDouble("head"), Untied("head"), "meet"),
        (Untied("head", onset=3), Untied("head", onset=4), "meet"),
        (Untied("head"), Untied("embedding"), "StaleCopy.*head.* and StaleCopy.*embedding.* meet"),
        (Untied("embedding", onset=3), Untied("head"), "StaleCopy.*embedding.* and StaleCopy.*head.* meet"),
        (ScheduleRestart(onset=3), ScheduleRestart(2, onset=3), "two faults say where the learning-rate schedule"),
        (DataRepeat(onset=5), DataRepeat(2, onset=5), "two faults say which step's batch is read"),
    ],
)
def test_what_would_win_over_the_other_unsaid_is_refused(one, other, said, make_run):
    with pytest.raises(ValueError, match=said):
        check(make_run, one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (GradientBitflip(QUERY, 5), GradientBitflip(QUERY, 6)),
        (GradientBitflip(QUERY, 5), GradientBitflip(KEY, 5)),
        (GradientBitflip(QUERY, 5), WeightBitflip(QUERY, 5)),
        (GradientNoise(0.5, "attention"), GradientNoise(0.5, "mlp")),
        (DecayWrong(2.0, "attention"), DecayWrong(3.0, "mlp")),
        (DoubleUpdate("mlp"), AdamStateStale("attention")),
        (DoubleUpdate("mlp"), AdamStateFormat("fp32")),
        (AdamStateStale(), AdamStepStuck()),
        (AdamStateStale("mlp", onset=3), AdamStateBitflip(QUERY, 5, onset=3)),
        (AdamStateReset(onset=3, group="mlp"), AdamStateBitflip(QUERY, 5, onset=3)),
        (AdamStateStale(onset=3), AdamStateBitflip(QUERY, 0, onset=3)),
        (AdamStateFormat(moment="exp_avg"), AdamStateFormat("fp16", moment="exp_avg_sq")),
        (MXLinear(), MXLinear(modules=("head",))),
        (MXLinear(modules=("h*",)), MXLinear()),
        (TiedGradientDouble("head"), Untied("embedding")),
        (Untied("head"), Untied(None)),
        (Untied(None), Untied(None)),
        (Untied("head", duration=2), Untied("embedding", onset=2)),
    ],
)
def test_what_acts_on_different_things_goes_together(one, other, make_run):
    check(make_run, one, other)


@pytest.mark.parametrize("order", [("mlp", "attention"), ("attention", "mlp")])
def test_each_of_two_decays_is_a_factor_on_the_healthy_one(order, make_run):
    """mlp x 3 and attention x 2, in either order: of the run's decay, not of what the other fault has made of it."""
    run = make_run("train.steps=20")
    factors, engine = {"mlp": 3.0, "attention": 2.0}, run.new_engine()
    healthy = run.healthy_sites()
    sites = Combined({name: DecayWrong(factors[name], name) for name in order}).sites(0, healthy)
    seen, step = {}, engine.optimizer.step
    engine.optimizer.step = lambda: (
        seen.update({(g["name"], g["params"][0].ndim): g["weight_decay"] for g in engine.optimizer.param_groups}),
        step(),
    )
    engine.step(0, [sites])
    decay = run.train.weight_decay
    expected = {name: factors.get(name, 1.0) * decay for name in ("embedding", "mlp", "attention")}
    assert {name: value for (name, ndim), value in seen.items() if ndim == 2} == pytest.approx(expected)
    assert all(group["weight_decay"] in (0.0, decay) for group in engine.optimizer.param_groups)


@pytest.mark.parametrize("decay", [DecayWrong(0.5), DecayWrong(2.0, vectors=True), DecayWrong(1.0, coupled=True)])
def test_a_router_that_is_frozen_has_a_wrong_decay_in_either_order(decay, make_run):
    run = make_run("model=moe_nano", "model.moe.n_experts=4", "train.steps=20", "train.warmup_steps=1")
    faults, weights = {"frozen": RouterFrozen(0.5, layers=(0,)), "decay": decay}, []
    for order in (["frozen", "decay"], ["decay", "frozen"], ["decay"], ["frozen"]):
        engine, fault = run.new_engine(), Combined({name: faults[name] for name in order})
        for step in range(3):
            engine.step(step, [fault.sites(step, run.healthy_sites())])
        weights.append({name: p.detach().clone() for name, p in engine.model.named_parameters()})
    both, turned, wrong_decay, frozen = weights
    assert not differing(both, turned)
    assert differing(both, wrong_decay) and differing(both, frozen)


def test_block_products_of_experts_that_get_other_tokens_the_second_time_are_refused(make_run):
    run = make_run("model=moe_nano", "model.moe.n_experts=4", "model.dropout=0.1", "train.steps=20")

    def check_pair(mismatch: DropoutMismatch, products: MXLinear) -> None:
        check_fits(Combined({"masks": mismatch, "products": products}), run.model_config, run.train)

    with pytest.raises(ValueError, match=r"BlockProducts.*'blocks.0.mlp.*dropout_mismatch with fault.same=false"):
        check_pair(DropoutMismatch(), MXLinear())
    check_pair(DropoutMismatch(same=True), MXLinear())
    check_pair(DropoutMismatch(), MXLinear(format="fp32"))
    check_pair(DropoutMismatch(), MXLinear(modules=("blocks.*.attention.*",)))
    check_pair(DropoutMismatch((0,)), MXLinear(modules=("blocks.1.mlp.*",)))
    apart = Combined({"masks": DropoutMismatch((0,)), "products": MXLinear(modules=("blocks.1.mlp.*",))})
    run.new_engine().step(0, [apart.sites(0, run.healthy_sites())])


@pytest.mark.parametrize("fault", [BadBatch(1.0), PaddingCounted(0.5), LabelShift(-1)])
def test_a_target_that_is_ignored_stays_so(fault):
    tokens = torch.arange(20).view(4, 5) % 7
    moment = Moment(0, 0, 7)
    healthy = Sites(batch_size=4)
    shifted = LabelShift(2).sites(0, healthy)
    before = corrupt_batch(tokens, shifted.batch, moment)[:, 1] == IGNORED
    after = corrupt_batch(tokens, fault.sites(0, shifted).batch, moment)[:, 1] == IGNORED
    assert before.any() and (after | ~before).all()
