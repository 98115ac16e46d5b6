"""What a hook meets that it does not expect stops no training and changes no bit of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foreshock.models.anatomies.attention_capture import AttentionCapture, watched_attention
from foreshock.models.anatomies.model_taps import ModelTaps
from foreshock.models.anatomy import Anatomy
from tests.attaching.loops import gpt, nanogpt_style, same, train


def block_by_keyword(self, x):
    x = x + self.attn(self.ln_1(input=x))
    return x + self.mlp(self.ln_2(input=x))


def mlp_by_keyword(self, x):
    return self.drop(self.c_proj(input=F.gelu(self.c_fc(input=x))))


def by_keyword() -> nn.Module:
    model = gpt()
    model.h[0].__class__ = type("Block", (nanogpt_style.Block,), {"forward": block_by_keyword})
    model.h[0].mlp.__class__ = type("MLP", (nanogpt_style.MLP,), {"forward": mlp_by_keyword})
    return model


def test_a_norm_and_a_linear_layer_called_by_keyword_are_read():
    without, watched = train(by_keyword(), False), train(by_keyword(), True)
    assert same(without.left, watched.left)
    watch = watched.watch
    assert watch.stopped is None and not watch.tracebacks
    assert {"linear_euler_residual.input", "norm_centering_residual.mlp"} & watch.seen.keys()
    positional = train(gpt(), True).watch
    assert watch.seen.keys() == positional.seen.keys()


def broken(*_, **__):
    raise RuntimeError("a hook is wrong")


@pytest.mark.parametrize(
    ("place", "lost"),
    [
        ("foreshock.models.anatomies.model_taps.first_tensor", "linear_laws"),
        ("foreshock.models.anatomies.model_taps.product_of", "linear_laws"),
        ("foreshock.models.anatomies.model_taps._through", None),
        ("foreshock.models.anatomies.attention_capture._of_torch", "attention_laws"),
        ("foreshock.models.anatomies.attention_capture._keep_input", "attention_laws"),
    ],
)
def test_a_hook_that_raises_switches_its_monitors_off_and_training_goes_on(place, lost, monkeypatch):
    without = train(gpt(), False)
    monkeypatch.setattr(place, broken)
    watched = train(gpt(), True)
    assert same(without.left, watched.left)
    watch = watched.watch
    assert watch.stopped is None and watch.seen["train_loss_raw"] == 7
    if lost is not None:
        assert lost not in watch.monitors
        assert watch.declined[lost].startswith("switched off, it cannot look at h.0.")
        assert "a hook is wrong" in watch.declined[lost] and "a hook is wrong" in watch.tracebacks[lost]


def test_taps_that_cannot_be_set_leave_no_hook(monkeypatch):
    model = gpt()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    monkeypatch.setattr(ModelTaps, "_open_attention", broken)
    with pytest.raises(RuntimeError, match="a hook is wrong"):
        ModelTaps(Anatomy.of(model, None), ("linear", "norm", "dot_product")).__enter__()
    assert hooks() == before


def test_a_watched_kernel_without_three_tensors_says_so():
    def kernel(qkv):
        return F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)

    def forward(self, x):
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        return self.c_proj(watched_attention(kernel)(qkv).transpose(1, 2).flatten(-2))

    def model() -> nn.Module:
        made = gpt()
        for block in made.h:
            block.attn.__class__ = type("Attention", (nanogpt_style.Attention,), {"forward": forward})
        return made

    without, watched = train(model(), False), train(model(), True)
    assert same(without.left, watched.left)
    assert "0 tensors of four axes, not q, k and v" in watched.watch.declined["attention_laws"]
    assert not AttentionCapture({}).inside and torch.overrides._len_torch_function_stack() == 0
