"""Faults of a matrix that head and embedding share: one share, one copy, and nothing else."""

import pytest
import torch

from foreshock.experiments.training.loop import train
from foreshock.faults.tied_matrix import MATRIX
from tests.faults.engine_steps import assert_control_is_healthy, differing, points_logged, stepped, whole_and_resumed

ONSET = 2
FAULTS = {
    "tied_gradient_double": ["fault.share=head"],
    "untied": ["fault.stale_copy=head"],
}
OF_EMBEDDING = {"tied_gradient_double": ["fault.share=embedding"], "untied": ["fault.stale_copy=embedding"]}
CONTROLS = {"tied_gradient_double": ["fault.factor=1.0"], "untied": ["fault.stale_copy=null"]}


@pytest.mark.parametrize("user", [FAULTS, OF_EMBEDDING])
@pytest.mark.parametrize("name", FAULTS)
def test_it_changes_the_gradient_of_the_tied_matrix_alone_and_in_no_bit_before(make_run, name, user):
    run = make_run(f"fault={name}", *user[name], f"fault.onset={ONSET}", "train.clip=null")
    faulty, weights, gradients = stepped(run, ONSET + 1)
    _, healthy, right = stepped(make_run("train.clip=null"), ONSET + 1)
    assert not any(differing(*pair) for pair in zip(weights[:ONSET], healthy[:ONSET], strict=True))
    assert differing(gradients[ONSET], right[ONSET]) == {MATRIX}  # as the forward is still that of a tied matrix
    assert differing(weights[ONSET], healthy[ONSET]) == {MATRIX}
    assert points_logged(faulty)["modules"] > 0


@pytest.mark.parametrize("name", FAULTS)
def test_its_control_is_healthy_bit_for_bit(make_run, name):
    assert_control_is_healthy(make_run, f"fault={name}", *CONTROLS[name])


def gradient(make_run, *overrides: str) -> torch.Tensor:
    """Of the tied matrix, in the first step."""
    return stepped(make_run("train.clip=null", *overrides), 1)[2][0][MATRIX]


def shares(make_run, *overrides: str) -> dict[str, torch.Tensor]:
    """What head and embedding each add to it, as the loss of a tied model without the other has it."""
    engine = make_run("train.clip=null", *overrides).new_engine()
    model, parts = engine.model, engine.micro_batches(0, make_run().healthy_sites())
    matrix, found = model.tokens.weight, {}
    for user, other in (("head", model.tokens), ("embedding", model.head)):
        other.__dict__["weight"] = matrix.detach().clone()
        engine.optimizer.zero_grad()
        for part in parts:
            (model(part)[0] / len(parts)).backward()
        found[user] = matrix.grad.clone()
        del other.__dict__["weight"]
    return found


@pytest.mark.parametrize("overrides", [[], ["train.micro_batch=4"]])
@pytest.mark.parametrize("share", ["head", "embedding"])
def test_a_share_counts_twice(make_run, share, overrides):
    doubled = gradient(make_run, "fault=tied_gradient_double", f"fault.share={share}", *overrides)
    extra, own = (doubled - gradient(make_run, *overrides)).double(), shares(make_run, *overrides)
    # the difference of two sums in FP32 of up to 4 parts, each rounded at most 4 times
    bound = 8 * 2**-24 * (own["head"].abs() + own["embedding"].abs()).max()
    torch.testing.assert_close(extra, own[share].double(), rtol=0, atol=float(bound))


@pytest.mark.parametrize(("copy", "other"), [("head", "embedding"), ("embedding", "head")])
def test_the_share_of_a_copy_that_stays_behind_is_lost(make_run, copy, other):
    left = gradient(make_run, "fault=untied", f"fault.stale_copy={copy}")
    assert torch.equal(left, shares(make_run)[other])


@pytest.mark.parametrize("copy", ["head", "embedding"])
def test_a_copy_computes_with_the_matrix_before_the_onset(make_run, copy):
    run = make_run("fault=untied", f"fault.stale_copy={copy}", f"fault.onset={ONSET}")
    engine, weights, _ = stepped(run, 6)
    sites = run.fault.sites(5, run.healthy_sites())
    model, held_out = engine.model, torch.from_numpy(run.corpus.held_out_batch(run.train.held_out_sequences))
    living, loss = engine.held_out_loss([run.healthy_sites()]), engine.held_out_loss([sites])
    user = model.head if copy == "head" else model.tokens
    user.__dict__["weight"] = weights[ONSET - 1][MATRIX]
    with torch.no_grad():
        assert torch.equal(loss, model.loss(held_out))
    assert loss != living


def test_the_copy_follows_again_after_the_window(make_run):
    run, healthy = make_run("fault=untied", "fault.onset=1", "fault.duration=2"), make_run().healthy_sites()
    engine, _, _ = stepped(run, 5)
    assert run.fault.sites(2, healthy) != healthy and run.fault.sites(3, healthy) is healthy
    assert engine.state_of(0)["past"] == {}


@pytest.mark.parametrize(("stop", "every"), [(3, 1), (2, 1), (5, 3)])
def test_it_goes_on_after_a_resume_bit_for_bit(make_run, stop, every):
    run = make_run("fault=untied", "fault.onset=1", f"fault.every={every}")
    whole, resumed = whole_and_resumed(run, stop, 8)
    assert not differing(*(dict(engine.model.named_parameters()) for engine in (whole, resumed)))
    sites = [run.fault.sites(7, run.healthy_sites())]
    assert torch.equal(whole.held_out_loss(sites), resumed.held_out_loss(sites))


@pytest.mark.parametrize("name", FAULTS)
def test_all_monitors_watch_it(make_run, name, tmp_path):
    manifest = train(make_run(f"fault={name}", "fault.onset=3", "train.steps=12"), tmp_path)
    assert manifest["steps_done"] == 12 and manifest["injected"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=untied", "model.tie_embeddings=false"], "head that is tied to the embedding: set model.tie_embeddin"),
        (["fault=tied_gradient_double", "model.tie_embeddings=false"], "set model.tie_embeddings=true"),
        (
            ["fault=untied", "fault.stale_copy=tail"],
            "fault.stale_copy='tail' is not allowed: one of head, embed",
        ),
        (["fault=tied_gradient_double", "fault.share=x"], "fault.share='x' is not allowed: one of head, embedding"),
        (["fault=tied_gradient_double", "fault.factor=-1.0"], "fault.factor=-1.0 is not allowed: 0 or more"),
        (["fault=untied", "train.compile=true", "train.watched_sequences=2"], "train.compile=True has no fault sites"),
    ],
)
def test_an_impossible_fault_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)
