"""Faults of routers and experts: one place, one dose, and nothing else."""

import math

import pytest
import torch

from foreshock.faults.aux_loss_off import AuxLossOff
from foreshock.faults.aux_loss_scale import AuxLossScale
from foreshock.faults.base import Sites
from foreshock.faults.expert_capacity import ExpertCapacity
from foreshock.faults.expert_dead import ExpertDead
from foreshock.faults.log import InjectionLog
from foreshock.faults.router_frozen import RouterFrozen
from foreshock.models.corruption import Corrupted
from foreshock.models.moe import MoEConfig
from foreshock.models.taps import Taps
from foreshock.models.transformer import Transformer, TransformerConfig
from tests.faults.engine_steps import differing, stepped

HEALTHY = Sites(batch_size=3)
MOE = MoEConfig(4, 2, capacity_factor=2.0, aux_coef=0.01)
CONFIG = TransformerConfig(
    d_model=16, n_layers=2, n_heads=2, d_ff=16, context_length=8, vocab_size=11, mlp="swiglu", moe=MOE
)
TOKENS = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))


def step(fault=None, log=None):
    """Gradients, routings, and the taps of linear layers of one backward."""
    sites = HEALTHY if fault is None else fault.sites(0, HEALTHY)
    model = Transformer(CONFIG).initialise(torch.Generator().manual_seed(0))
    with Corrupted(model, sites.modules, log), Taps(model, ("linear",)) as taps:
        loss, auxiliary, routings = model(TOKENS, balance_scale=sites.balance_scale)
        (loss + auxiliary).backward()
    assert all(block.mlp.config is MOE for block in model.blocks)
    return {name: p.grad for name, p in model.named_parameters()}, routings, taps.at("linear")


@pytest.mark.parametrize("fault", [ExpertDead(0, None), ExpertCapacity(1.0), RouterFrozen(1.0), AuxLossScale(1.0)])
def test_the_identity_dose_is_a_control_and_healthy_bit_for_bit(fault):
    assert fault.describe().control
    log = InjectionLog()
    (gradients, _, _), (healthy, _, _) = step(fault, log), step()
    assert all(torch.equal(gradients[name], healthy[name]) for name in healthy) and log.entries() == []


@pytest.mark.parametrize("expert", range(4))
def test_a_dead_expert_s_slots_are_zero_and_all_others_as_they_were(expert):
    log = InjectionLog()
    name = "blocks.1.mlp.output"
    (_, routings, taps), (_, _, healthy) = step(ExpertDead(1, expert), log), step()
    ends = routings[1].counts_E.cumsum(0).tolist()
    own = slice(([0, *ends])[expert], ends[expert])
    expected = healthy[name].output.clone()
    expected[own] = 0.0
    assert torch.equal(taps[name].output, expected)
    (entry,) = log.entries()
    assert entry["elements"] == (healthy[name].output[own] != 0).sum() > 0
    assert torch.equal(taps["blocks.0.mlp.output"].output, healthy["blocks.0.mlp.output"].output)


def test_a_dropped_gradient_is_of_one_expert_s_matrices_alone():
    log = InjectionLog()
    (gradients, _, _), (healthy, _, _) = step(ExpertDead(1, 2, "gradient"), log), step()
    matrices = {f"blocks.1.mlp.{part}.weight" for part in ("input", "gate", "output")}
    assert {name for name in healthy if not torch.equal(gradients[name], healthy[name])} == matrices
    for name in matrices:
        expected = healthy[name].clone()
        expected[2] = 0.0
        assert torch.equal(gradients[name], expected)
    assert len(log.entries()) == 3


def test_a_cut_capacity_drops_as_many_slots_as_by_hand():
    log = InjectionLog()
    _, routings, _ = step(ExpertCapacity(0.25), log)
    _, healthy, _ = step()
    capacity = math.ceil(0.5 * 24 * 2 / 4)  # 24 tokens, 2 slots each, 4 experts, a factor of 0.25 x 2
    dropped = (healthy[0].counts_E - capacity).clamp(min=0)
    assert routings[0].dropped == dropped.sum() > 0
    assert healthy[0].dropped == 0
    first = log.entries()[0]
    assert (first["tensor"], first["elements"]) == ("blocks.0.mlp dropped", int((dropped > 0).sum()))


def test_a_factor_scales_the_balance_loss_alone():
    auxiliary = {}
    for factor in (0.0, 1.0, 4.0):
        sites = AuxLossScale(factor).sites(0, HEALTHY)
        model = Transformer(CONFIG).initialise(torch.Generator().manual_seed(0))
        auxiliary[factor] = model(TOKENS, balance_scale=sites.balance_scale)[1]
    assert auxiliary[0.0] == 0 and torch.equal(auxiliary[4.0], 4 * auxiliary[1.0])  # a power of 2 rounds nothing


def test_off_is_a_factor_of_zero():
    off, scaled = AuxLossOff(onset=2), AuxLossScale(0.0, onset=2)
    assert off.sites(2, HEALTHY) == scaled.sites(2, HEALTHY) and off.describe() == scaled.describe()
    assert off.sites(1, HEALTHY) is HEALTHY


def test_factors_of_two_faults_multiply():
    sites = AuxLossScale(3.0).sites(0, AuxLossScale(2.0).sites(0, HEALTHY))
    assert sites.balance_scale == 6.0


def weights_after(run, steps: int) -> dict[str, torch.Tensor]:
    engine, healthy = run.new_engine(), run.healthy_sites()
    for index in range(steps):
        engine.step(index, [run.fault.sites(index, healthy)])
    return dict(engine.model.named_parameters())


def test_a_frozen_router_keeps_its_bits_while_everything_else_learns(make_run):
    moe = ["model=moe_nano", "train.weight_decay=0.1"]
    before, after = (weights_after(make_run(*moe, "fault=router_frozen", "fault.onset=2"), n) for n in (2, 5))
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if ".router." in name
    }


def test_a_layer_s_router_is_frozen_alone(make_run):
    moe = ["model=moe_nano", "train.weight_decay=0.1"]
    run = make_run(*moe, "fault=router_frozen", "fault.layers=[1]", "fault.onset=2")
    engine, weights, _ = stepped(run, 5)
    still = {name for name in weights[1] if torch.equal(weights[1][name], weights[4][name])}
    assert still == {"blocks.1.mlp.router.weight"}
    (entry,) = engine.logs[0].entries()
    assert (entry["point"], entry["tensor"]) == ("optimizer", "blocks.1.mlp.router.weight learning rate")
    healthy, healthy_weights, _ = stepped(make_run(*moe), 5)
    assert not any(differing(*pair) for pair in zip(weights[:2], healthy_weights[:2], strict=True))
    assert differing(weights[2], healthy_weights[2]) == still
    states = [engine.optimizer.state_dict()["param_groups"] for engine in (engine, healthy)]
    assert states[0] == states[1]


@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_every_layer_by_index_is_every_layer(make_run, factor):
    run = ["model=moe_nano", "fault=router_frozen", f"fault.factor={factor}"]
    (_, named, _), (_, whole, _) = (
        stepped(make_run(*run, f"fault.layers={layers}"), 3) for layers in ("[0,1]", "null")
    )
    assert not any(differing(*pair) for pair in zip(named, whole, strict=True))


def test_a_factor_of_1_on_a_layer_is_healthy_bit_for_bit(make_run):
    run = make_run("model=moe_nano", "fault=router_frozen", "fault.layers=[0]", "fault.factor=1.0")
    assert run.fault.describe().control
    (engine, control, _), (_, healthy, _) = stepped(run, 3), stepped(make_run("model=moe_nano"), 3)
    assert not any(differing(*pair) for pair in zip(control, healthy, strict=True))
    assert engine.logs[0].entries() == []


def test_a_router_frozen_in_a_layer_goes_on_after_a_resume_bit_for_bit(make_run):
    run = make_run("model=moe_nano", "fault=router_frozen", "fault.layers=[0]", "fault.onset=1", "fault.every=2")
    (whole, _, _), (first, _, _) = stepped(run, 6), stepped(run, 4)
    resumed, healthy = run.new_engine(), run.healthy_sites()
    resumed.load([first.state_of(0)])
    for index in range(4, 6):
        resumed.step(index, [run.fault.sites(index, healthy)])
    assert not differing(*(dict(engine.model.named_parameters()) for engine in (whole, resumed)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=expert_dead"], "fault.expert=0 has no effect on a dense model"),
        (["fault=expert_dead", "model=moe_nano", "fault.expert=8"], "fault.expert=8 does not fit .* 8 experts"),
        (["fault=expert_dead", "model=moe_nano", "fault.layer=2"], "fault.layer=2 does not fit the model: it has 2"),
        (["fault=expert_dead", "model=moe_nano", "fault.kind=x"], "fault.kind='x' is not allowed: one of output, grad"),
        (["fault=expert_capacity"], "fault.factor=0.25 has no effect: the model has no experts with a capacity"),
        (["fault=expert_capacity", "model=moe_nano", "model.moe.capacity_factor=null"], "no experts with a capacity"),
        (["fault=expert_capacity", "model=moe_nano", "fault.factor=0.0"], "fault.factor=0.0 is not allowed: above 0"),
        (["fault=router_frozen"], "fault: the learning rate of routers has no effect on a dense .* needs model=moe_na"),
        (["fault=router_frozen", "fault.layers=[0]"], "fault: routers that are frozen .* it needs model=moe_nano"),
        (["fault=router_frozen", "model=moe_nano", "fault.layers=[2]"], "does not fit the model: it has 2 layers"),
        (["fault=router_frozen", "model=moe_nano", "fault.factor=2.0"], "fault.factor=2.0 is not allowed: 0 "),
        (["fault=aux_loss_scale"], "changes load balancing, but the model has none"),
        (["fault=aux_loss_scale", "model=moe_nano", "fault.factor=-1.0"], "fault.factor=-1.0 is not allowed: 0 or"),
    ],
)
def test_an_impossible_fault_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)
