"""Loops that share a backward, pass a mask or compute a forward twice: what cannot be read declines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import foreshock
import foreshock.attaching.view
from foreshock.models.anatomy import Anatomy
from tests.attaching.loops import batches, gpt, nanogpt_style, same


def stepped(model: nn.Module, loss_of, watched: bool = True, steps: int = 3, **options):
    """Train with a loss of a model and a batch; the weights and the watch, which reads every step."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watch = foreshock.attach(model, optimizer, quiet=True, every_steps=1, **options) if watched else None
    for batch in batches(steps):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        if watch is not None:
            watch.step(loss)
        optimizer.zero_grad()
    if watch is not None:
        watch.close()
        assert watch.stopped is None
    return {name: p.detach().clone() for name, p in model.named_parameters()}, watch


def one(model, batch):
    return model(batch[:, :-1], batch[:, 1:])[1]


def two(model, batch):
    return one(model, batch) + one(model, batch.flip(0)[:2])


def test_two_forwards_under_one_backward_leave_laws_of_weights_out():
    (without, _), (weights, watch) = stepped(gpt(), two, watched=False), stepped(gpt(), two)
    assert same(without, weights)
    assert watch.declined["linear_laws"] == "a backward goes through more than one forward of the model"
    assert not any(name.startswith("linear_") for name in watch.seen)
    assert "linear_euler_residual.input" in stepped(gpt(), one)[1].seen


def test_a_forward_without_a_backward_hides_nothing():
    def with_another(model, batch):
        one(model, batch.flip(0))
        return one(model, batch)

    watch = stepped(gpt(), with_another)[1]
    assert "linear_euler_residual.input" in watch.seen and "linear_laws" not in watch.declined


def test_a_module_that_is_called_twice_leaves_its_laws_out():
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x)) + self.mlp(self.ln_2(-x))

    model = gpt()
    model.h[0].__class__ = type("Block", (nanogpt_style.Block,), {"forward": forward})
    watch = stepped(model, one)[1]
    assert watch.declined["linear_laws"].endswith("is called more than once in a backward")
    assert watch.declined["norm_laws"] == "h.0.ln_2 is called more than once in a backward"
    assert not any(name.startswith(("linear_", "norm_")) for name in watch.seen)


def masked_gpt() -> nn.Module:
    model = gpt()

    def forward(self, input_ids, attention_mask=None):
        return nanogpt_style.GPT.forward(self, input_ids)[0]

    model.__class__ = type("Masked", (nanogpt_style.GPT,), {"forward": forward})
    return model


def test_a_mask_is_not_taken_for_targets():
    def by_name(model, batch):
        logits = model(attention_mask=torch.ones_like(batch[:, :-1]), input_ids=batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def by_position(model, batch):
        logits = model(batch[:, :-1], torch.ones_like(batch[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    for loss_of in (by_name, by_position):
        watch = stepped(masked_gpt(), loss_of)[1]
        assert "gradient_curvature" in watch.seen and "gradient_curvature" not in watch.declined
        assert not watch.tracebacks and not [event for event in watch.alarms if event.severity == "SEV1"]


def test_an_objective_that_cannot_be_made_again_declines_and_raises_no_alarm():
    def forward(self, input_ids):
        return self.ln_f(self.h[1](self.h[0](self.wte(input_ids)))).flatten(0, 1)

    def loss_of(model, batch):
        return F.cross_entropy(model.lm_head(model(batch[:, :-1])), batch[:, 1:].flatten())

    model = gpt()
    model.__class__ = type("Trunk", (nanogpt_style.GPT,), {"forward": forward})
    watch = stepped(model, loss_of, monitors=["loss", "gradient_curvature"])[1]
    assert "gradient_curvature" in watch.monitors and not watch.tracebacks and not watch.alarms
    assert "no logits" in watch.declined["gradient_curvature"]


def trunk() -> nn.Module:
    """Returns hidden states (B, T, E); its head is called outside."""

    def forward(self, input_ids):
        return self.ln_f(self.h[1](self.h[0](self.wte(input_ids))))

    model = gpt()
    model.__class__ = type("Trunk", (nanogpt_style.GPT,), {"forward": forward})
    return model


def of_hidden(model, batch):
    return F.cross_entropy(model.lm_head(model(batch[:, :-1])).flatten(0, 1), batch[:, 1:].flatten())


HIDDEN = (
    "the model returns no loss, and (2, 16, 32) may be hidden states and no logits: its head has 31 rows; "
    "return the loss, or an output with .logits"
)


def test_hidden_states_are_not_taken_for_logits():
    watch = stepped(trunk(), of_hidden)[1]
    assert watch.declined["gradient_curvature"] == HIDDEN and "gradient_curvature" in watch.monitors
    assert {"key_shift_residual.over_noise", "output_log_z"} <= watch.seen.keys() and not watch.tracebacks


def test_logits_of_a_padded_vocabulary_that_is_cut_off_are_logits():
    def forward(self, input_ids):
        x = self.ln_f(self.h[1](self.h[0](self.wte(input_ids))))
        return self.lm_head(x)[..., :29]

    def loss_of(model, batch):
        batch = batch.clamp(max=28)
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    model = gpt()
    model.__class__ = type("Padded", (nanogpt_style.GPT,), {"forward": forward})
    assert "gradient_curvature" not in stepped(model, loss_of)[1].declined


def test_a_step_copies_no_weight_to_know_the_head_s_shape(monkeypatch):
    monkeypatch.setattr(Anatomy, "stacked", lambda *_: pytest.fail("a copy of a role's weights"))
    watch = stepped(gpt(), one, monitors=["loss"])[1]
    assert watch.anatomy.head_shape == (31, 32) and "train_loss_raw" in watch.seen


def test_a_compiled_model_that_returns_no_loss_leaves_out_what_its_forward_hides():
    def loss_of(model, batch):
        return F.cross_entropy(model.lm_head(compiled[model](batch[:, :-1])).flatten(0, 1), batch[:, 1:].flatten())

    plain, model = trunk(), trunk()
    compiled = {each: torch.compile(each, backend="eager") for each in (plain, model)}
    (without, _), (weights, watch) = stepped(plain, loss_of, watched=False), stepped(model, loss_of)
    assert same(without, weights) and watch.steps == 3 and not watch.tracebacks
    hidden = {name for name, reason in watch.declined.items() if reason == HIDDEN}
    assert {"attention_laws", "attention_scores", "linear_laws", "gradient_curvature"} <= hidden
    assert {"grad_global_norm", "adam_update_rms", "weight_norm.q", "spectral_radius.q"} <= watch.seen.keys()


def test_a_forward_that_no_hook_sees_is_named():
    def loss_of(model, batch):
        return model.forward(batch[:, :-1], batch[:, 1:])[1]

    (without, _), (weights, watch) = stepped(gpt(), loss_of, watched=False), stepped(gpt(), loss_of)
    assert same(without, weights) and not watch.tracebacks and "weight_norm.q" in watch.seen
    for name in ("attention_laws", "gradient_curvature", "norm_laws"):
        assert watch.declined[name].startswith("no hook has seen a forward: call the model itself")


def test_rows_that_cannot_run_again_switch_off_those_that_need_them(monkeypatch):
    def broken(*_):
        raise RuntimeError("a shape that depends on the data")

    model = gpt()
    compiled = torch.compile(model, backend="eager")
    monkeypatch.setattr(foreshock.attaching.view, "run_again", broken)
    watch = stepped(model, lambda _, batch: compiled(batch[:, :-1], batch[:, 1:])[1])[1]
    said = "switched off, it cannot run the watched rows again: RuntimeError: a shape that depends on the data"
    assert watch.declined["linear_laws"].startswith(said) and "linear_laws" in watch.tracebacks
    assert "weight_norm.q" in watch.seen and watch.steps == 3


def test_checkpointed_blocks_are_watched_and_what_they_hide_declines():
    for reentrant in (False, True):

        def forward(self, idx, targets, reentrant=reentrant):
            x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]
            for block in self.h:
                x = checkpoint(block, x, use_reentrant=reentrant)
            logits = self.lm_head(self.ln_f(x))
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        def model(forward=forward) -> nn.Module:
            made = gpt()
            made.__class__ = type("Checkpointed", (nanogpt_style.GPT,), {"forward": forward})
            return made

        (without, _), (weights, watch) = stepped(model(), one, watched=False), stepped(model(), one)
        assert same(without, weights)
        assert not watch.tracebacks, watch.tracebacks
        assert "linear_euler_residual.input" in watch.seen
        hidden = "cannot be differentiated twice" if reentrant else "(activation checkpointing)"
        assert hidden in watch.declined["gradient_curvature"]
