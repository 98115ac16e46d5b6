"""Recomputed forwards with other dropout masks: the gradient by hand, the control's bits, and nothing before."""

from dataclasses import replace

import pytest
import torch

from foreshock.faults.base import Sites
from foreshock.faults.dropout_mismatch import DropoutMismatch
from foreshock.faults.log import InjectionLog
from foreshock.models.corruption import Corrupted
from foreshock.models.dropout import Draw, Dropout, dropping
from foreshock.models.taps import Taps
from foreshock.models.transformer import Transformer, TransformerConfig
from tests.faults.engine_steps import differing, points_logged, stepped

DROPOUT = "model.dropout=0.3"
FAULT = ["fault=dropout_mismatch", DROPOUT]
ONSET = 2
KINDS = {
    "dense": [],
    "micro-batches": ["train.micro_batch=4"],
    "experts": ["model=moe_nano"],
    "bf16": ["train.precision=bf16"],
}
CONFIG = TransformerConfig(
    d_model=16, n_layers=2, n_heads=2, d_ff=32, context_length=8, vocab_size=11, backend="sdpa", dropout=0.3
)
TOKENS = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
DRAW = Draw(seed=0, step=0, part=0)


def gradients(model: Transformer, fault: DropoutMismatch | None = None, places=(), log=None):
    """Loss, gradients and taps of one backward."""
    changes = () if fault is None else fault.sites(0, Sites(batch_size=3)).modules
    model.zero_grad()
    with Corrupted(model, changes, log), dropping(model, DRAW), Taps(model, places) as taps:
        loss = model.loss(TOKENS)
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, taps


def built() -> Transformer:
    return Transformer(CONFIG).double().initialise(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_with_the_same_masks_has_the_bits_of_none(make_run, kind):
    run = make_run(*FAULT, *KINDS[kind], "fault.same=true")
    assert run.fault.describe().control
    engine, control, _ = stepped(run, 3)
    _, healthy, _ = stepped(make_run(DROPOUT, *KINDS[kind]), 3)
    assert not any(differing(*pair) for pair in zip(control, healthy, strict=True))
    assert engine.logs[0].entries() == []


def test_the_control_really_recomputes():
    model, calls = built(), []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    gradients(model, DropoutMismatch(same=True))
    assert len(calls) == 2
    gradients(model)
    assert len(calls) == 3  # and its forward is its class's again


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_gradients_from_its_onset_on_and_in_no_bit_before(make_run, kind):
    faulty, weights, clipped = stepped(make_run(*FAULT, *KINDS[kind], f"fault.onset={ONSET}"), ONSET + 1)
    _, healthy, right = stepped(make_run(DROPOUT, *KINDS[kind]), ONSET + 1)
    assert [bool(differing(*pair)) for pair in zip(weights, healthy, strict=True)] == [False] * ONSET + [True]
    assert differing(clipped[ONSET], right[ONSET])
    assert set(points_logged(faulty)) == {"modules"}


def test_the_loss_is_that_of_the_first_masks():
    model = built()
    loss, wrong, _ = gradients(model, DropoutMismatch())
    healthy, right, _ = gradients(model)
    assert torch.equal(loss, healthy)
    # behind the last block nothing is computed again
    assert not differing(wrong, right) & {"final_norm.weight", "final_norm.bias"}


def test_the_gradients_of_the_last_block_are_those_of_its_second_forward():
    """In FP64: the gradient at its output is of the first masks, and the block is of the second ones."""
    model = built()
    _, wrong, _ = gradients(model, DropoutMismatch((1,)))
    block, seen = model.blocks[1], {}

    def keep(_, arguments, output):
        seen.update(x=arguments[0].detach(), numerics=arguments[1])
        output[0].register_hook(lambda dy: seen.update(dy=dy))

    handle = block.register_forward_hook(keep)
    gradients(model)
    handle.remove()
    block.zero_grad()
    with dropping(model, replace(DRAW, again=True)):
        block(seen["x"], seen["numerics"])[0].backward(seen["dy"])
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter.grad, wrong[f"blocks.1.{name}"]), name


def test_a_layer_that_is_left_out_keeps_what_stands_behind_the_mismatch():
    model = built()
    _, wrong, _ = gradients(model, DropoutMismatch((0,)))
    _, right, _ = gradients(model)
    changed = {name.split(".")[1] for name in differing(wrong, right) if name.startswith("blocks.")}
    assert changed == {"0"}


def test_taps_show_the_first_forward():
    model = built()
    places = ("linear", "norm", "dot_product")
    (_, _, faulty), (_, _, healthy) = gradients(model, DropoutMismatch(), places), gradients(model, None, places)
    for place in places:
        for name, tap in faulty.at(place).items():
            assert torch.equal(tap.output, healthy.at(place)[name].output), name
            assert tap.arrivals == 1 and tap.failure is None
            assert all(torch.equal(*pair) for pair in zip(tap.inputs, healthy.at(place)[name].inputs, strict=True))


def worst_of_a_law(run) -> dict[str, float]:
    """By signal, the largest ratio to what rounding predicts, in the first step."""
    engine, monitor = run.new_engine(), run.monitors["linear_laws"]
    view = engine.step(0, [run.fault.sites(0, run.healthy_sites())], monitor.needs.taps)
    readings = monitor.observe(view)
    return {name: float(value.max()) for name, value in readings.items() if name.endswith(".over_noise")}


@pytest.mark.numeric
def test_laws_of_linear_layers_hold_under_dropout_and_break_behind_a_mask_that_differs(make_run):
    """A law in W is broken by one normal number of the predicted size; 6 of its deviations are a chance of 2e-9."""
    assert max(worst_of_a_law(make_run(DROPOUT)).values()) < 6
    assert max(worst_of_a_law(make_run(*FAULT, "fault.same=true")).values()) < 6
    wrong = worst_of_a_law(make_run(*FAULT))
    seen = {"linear_euler_residual.input.over_noise", "linear_euler_residual.output.over_noise"}
    assert all(wrong[name] > 100 for name in seen)
    # what stands before every mask of its block; in the second block its input is the first forward's
    assert all(wrong[f"linear_euler_residual.{part}.over_noise"] < 6 for part in "qkvo")


def test_the_log_counts_where_masks_differ():
    model, log = built(), InjectionLog()
    gradients(model, DropoutMismatch((0,)), log=log)
    x = torch.ones(3, 8, 16)
    by_hand = {}
    for name in ("attention_dropout", "mlp_dropout"):
        place: Dropout = getattr(model.blocks[0], name)
        by_hand[f"blocks.0.{name} mask"] = int(place.kept(x, DRAW).ne(place.kept(x, replace(DRAW, again=True))).sum())
    assert {entry["tensor"]: entry["elements"] for entry in log.entries()} == by_hand
    assert all(by_hand.values())


def test_a_resumed_run_has_the_bits_of_the_whole_one(make_run):
    run = make_run(*FAULT, "fault.onset=1", "fault.every=2")
    whole, _, _ = stepped(run, 6)
    first, _, _ = stepped(run, 4)
    resumed, healthy = run.new_engine(), run.healthy_sites()
    resumed.load([first.state_of(0)])
    for step in range(4, 6):
        resumed.step(step, [run.fault.sites(step, healthy)])
    assert not differing(*(dict(engine.model.named_parameters()) for engine in (whole, resumed)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=dropout_mismatch"], "model.dropout=0.0 leaves no mask to draw again: set it above 0, such as 0.1"),
        ([*FAULT, "fault.layers=[2]"], r"fault.layers=\[2\] does not fit the model: it has 2 layers, 0 to 1"),
        ([*FAULT, "fault.layers=[]"], r"fault.layers=\[\] is not allowed: distinct indices from 0, or null for all"),
        ([*FAULT, "fault.layers=[0,0]"], r"fault.layers=\[0, 0\] is not allowed"),
    ],
)
def test_an_impossible_fault_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)


def test_two_recomputations_of_one_layer_meet():
    sites = DropoutMismatch((0,)).sites(0, DropoutMismatch((0, 1)).sites(0, Sites(batch_size=3)))
    with pytest.raises(ValueError, match="meet"):
        Corrupted(built(), sites.modules)
    apart = DropoutMismatch((0,)).sites(0, DropoutMismatch((1,)).sites(0, Sites(batch_size=3)))
    Corrupted(built(), apart.modules)
