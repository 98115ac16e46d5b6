"""Attention is seen however a model computes it, and what laws are not about is said by name."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foreshock
from foreshock.models.anatomies.attention_call import CUSTOM, EAGER, REFERENCE, TORCH_FLASH, TORCH_OTHER
from foreshock.models.anatomies.attention_capture import NOT_CAUSAL, AttentionCapture, watched_attention
from foreshock.models.attention import flash_attention
from foreshock.models.taps import Tap
from tests.attaching.loops import CONTEXT, gpt, train

B, H, T, D = 2, 4, 16, 16


class Own(nn.Module):
    """Attention by any function of q, k and v."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


def seen(attend, groups: int = H, seed: int = 0) -> tuple[Tap, list[Tensor]]:
    """The tap of a call, and q, k, v, o, their gradients last."""
    torch.manual_seed(seed)
    inputs = [torch.randn(B, heads, T, D, requires_grad=True) for heads in (H, groups, groups)]
    module = Own(attend)
    tap = Tap(module)
    capture = AttentionCapture({"own": tap})
    with capture:
        capture.enter("own")
        o = module(*inputs)
        capture.leave()
    do = torch.randn_like(o)
    o.backward(do)
    return tap, [*inputs, o, *(x.grad for x in inputs), do]


SCALE = 1 / math.sqrt(D)


def eager(q, k, v, scale=SCALE, hidden=-math.inf, dropout=0.0, cap=None):
    scores = (q @ k.transpose(-2, -1)) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    p = F.dropout(scores.masked_fill(mask, hidden).softmax(-1), dropout)
    return p @ v


@pytest.mark.parametrize(
    ("attend", "kernel", "scale"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), TORCH_FLASH, None),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), TORCH_FLASH, 0.3),
        (eager, EAGER, 1 / math.sqrt(D)),
        (lambda q, k, v: eager(q, k, v, scale=0.1, hidden=-1e4), EAGER, 0.1),
        (lambda q, k, v: eager(q * 0.25, k, v, scale=1.0), EAGER, 1.0),
    ],
)
def test_a_call_is_seen_with_its_tensors_and_gradients(attend, kernel, scale):
    tap, (q, k, v, o, dq, dk, dv, do) = seen(attend)
    assert tap.call.kernel == kernel and tap.call.obstacle is None and tap.call.window is None
    assert tap.call.scale is None if scale is None else tap.call.scale == pytest.approx(scale, rel=1e-6)
    factor = 0.25 if scale == 1.0 else 1.0  # of the q that was multiplied
    assert torch.equal(tap.inputs[0], q * factor) and torch.equal(tap.inputs[1], k) and torch.equal(tap.inputs[2], v)
    assert torch.equal(tap.output, o) and torch.equal(tap.output_grad, do)
    assert torch.equal(tap.input_grads[0] * factor, dq)
    assert torch.equal(tap.input_grads[1], dk) and torch.equal(tap.input_grads[2], dv)


def test_a_sliding_window_is_told_from_its_mask():
    mask = torch.ones(T, T, dtype=torch.bool).tril().triu(-4)
    tap, _ = seen(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(B, 1, T, T)))
    assert tap.call.window == 5 and tap.call.obstacle is None


PADDED = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T).clone()
PADDED[0, :, :, :3] = False
PADDED[0, :, :3, 0] = True


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=PADDED), NOT_CAUSAL),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), NOT_CAUSAL),
        (lambda q, k, v: eager(q, k, v, cap=2.0), "its scores are changed on their way to softmax"),
        (lambda q, k, v: eager(q, k, v, dropout=0.25), "dropout 0.25 acts on P"),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5),
            "dropout 0.5 acts on P",
        ),
        (lambda q, k, v: eager(q, k, v) + eager(q, k, v), "its module calls attention more than once"),
    ],
)
def test_what_laws_are_not_about_is_an_obstacle_by_name(attend, reason):
    tap, _ = seen(attend)
    assert tap.call.obstacle == reason


def test_another_kernel_of_pytorch_is_told_apart():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        tap, _ = seen(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert tap.call.kernel == TORCH_OTHER


@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
@pytest.mark.parametrize(("rounds_like", "kernel"), [(None, CUSTOM), ("reference", REFERENCE)])
def test_a_wrapped_kernel_is_seen_in_its_own_layout(layout, rounds_like, kernel):
    def turn(x: Tensor) -> Tensor:
        return x if layout == "BHTD" else x.transpose(1, 2)

    def own(q, k, v):
        return turn(flash_attention(turn(q), turn(k), turn(v)))

    wrapped = watched_attention(own, layout=layout, rounds_like=rounds_like)
    tap, (q, k, v, o, dq, dk, dv, do) = seen(lambda q, k, v: turn(wrapped(turn(q), turn(k), turn(v))))
    assert tap.call.kernel == kernel
    for found, expected in zip((*tap.inputs, tap.output, tap.output_grad), (q, k, v, o, do), strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(tap.input_grads[i], x) for i, x in enumerate((dq, dk, dv)))
    assert torch.equal(wrapped(q, k, v), own(q, k, v))


def test_a_wrong_layout_is_named():
    with pytest.raises(ValueError, match=r"^layout='HBTD' is not allowed: one of BHTD, BTHD$"):
        watched_attention(eager, layout="HBTD")


def test_dropout_in_attention_leaves_laws_out_by_name_and_scores_in():
    watch = train(gpt(dropout=0.1), True).watch
    assert watch.declined["attention_laws"] == "attention cannot be computed again: dropout 0.1 acts on P"
    assert "max_attn_logit" in watch.seen and "key_shift_residual" not in watch.seen


def test_a_kernel_whose_rounding_is_not_known_has_residuals_alone_and_says_so():
    model = gpt()
    for block in model.h:
        block.attn.forward = by_own_kernel(block.attn)
    watch = train(model, True).watch
    assert watch.declined["attention_laws.over_noise"] == "the rounding of a custom kernel of float32 is not known"
    assert {"key_shift_residual", "attention_recomputed.dq"} <= watch.seen.keys()
    assert not {"key_shift_residual.over_noise", "attention_recomputed.dq.over_noise"} & watch.seen.keys()


def by_own_kernel(attention: nn.Module):
    """The same attention by a kernel that its owner has wrapped."""
    kernel = foreshock.watched_attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def forward(x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (attention.n_head, -1)).transpose(1, 2) for p in attention.c_attn(x).chunk(3, -1))
        return attention.c_proj(kernel(q, k, v).transpose(1, 2).flatten(2))

    return forward


def test_a_kernel_that_nobody_sees_is_named_with_the_wrapper():
    model = gpt()
    for block in model.h:
        block.attn.forward = hidden(block.attn)
    watch = train(model, True).watch
    assert watch.declined["attention_laws"].startswith("no call of attention was seen: wrap its kernel with foreshock")
    assert "grad_global_norm" in watch.seen and watch.stopped is None


def hidden(attention: nn.Module):
    """The same attention by a product of three axes, as some kernels' fallbacks have it."""

    def forward(x: Tensor) -> Tensor:
        heads = attention.n_head
        q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for p in attention.c_attn(x).chunk(3, -1))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        p = scores.masked_fill(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        return attention.c_proj((p @ v).unflatten(0, (-1, heads)).transpose(1, 2).flatten(2))

    return forward


def test_a_model_that_is_described_by_hand_is_read_as_the_one_that_is_recognised():
    roles = {
        "heads": 2,
        "embedding": "wte",
        "positions": "wpe",
        "final_norm": "ln_f",
        "head": "lm_head",
        "attention_norm": "h.{}.ln_1",
        "mlp_norm": "h.{}.ln_2",
        "q": "h.{}.attn.c_attn[0:32]",
        "k": "h.{}.attn.c_attn[32:64]",
        "v": "h.{}.attn.c_attn[64:96]",
        "o": "h.{}.attn.c_proj",
        "input": "h.{}.mlp.c_fc",
        "output": "h.{}.mlp.c_proj",
    }
    known, told = train(gpt(), True).watch, train(gpt(), True, anatomy=roles).watch
    assert known.seen == told.seen and known.monitors == told.monitors
    assert all(
        torch.equal(known.anatomy.stacked(r, known.anatomy.weights()), told.anatomy.stacked(r, told.anatomy.weights()))
        for r in "qkvo"
    )


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"qq": "h.{}.attn"}, r"anatomy\['qq'\] is not allowed: one of heads"),
        (
            {"q": "h.{}.attn.c_atn"},
            r"anatomy\['q'\]='h\.\{\}\.attn\.c_atn' is not allowed: the model has no such module for block 0",
        ),
        ({"q": "h.0.attn.c_attn"}, r"anatomy\['q'\]='h\.0\.attn\.c_attn' is not allowed: a block's role has \{\}"),
        (
            {"q": "h.{}.attn.c_attn", "head": "lm_hed"},
            r"anatomy\['head'\]='lm_hed' is not allowed: .*did you mean 'lm_head'\?",
        ),
        ({"q": "h.{}.attn.c_attn[0:16]"}, r"anatomy\['heads'\]=None is not allowed: a number of query heads"),
    ],
)
def test_a_wrong_description_is_named(roles, message):
    model = gpt()
    with pytest.raises(ValueError, match=f"^{message}"):
        foreshock.attach(model, torch.optim.AdamW(model.parameters()), anatomy=roles, quiet=True)
