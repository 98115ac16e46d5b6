"""A training with a watch is the training without: weights, optimizer, gradients and random numbers, to the bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.attaching.loops import gpt, same, train


def in_groups(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 3e-3}], lr=1e-2)


def with_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def untied() -> nn.Module:
    model = gpt()
    model.lm_head.weight = nn.Parameter(model.wte.weight.detach().clone())
    return model


def partly_frozen() -> nn.Module:
    model = gpt()
    for parameter in (*model.h[0].parameters(), model.wpe.weight):
        parameter.requires_grad_(False)
    return model


def checkpointed() -> nn.Module:
    """Each block's forward runs again in the backward."""
    model = gpt(dropout=0.1)
    for block in model.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


CASES = {
    "checkpointing": (checkpointed, {}),
    "plain": (gpt, {}),
    "dropout": (lambda: gpt(dropout=0.2), {}),
    "accumulation": (gpt, {"parts": 2}),
    "BF16 autocast": (gpt, {"bf16": True}),
    "GradScaler": (gpt, {"scaled": True, "clip": 0.5}),
    "clip": (gpt, {"clip": 0.1}),
    "parameter groups": (gpt, {"optimizer": in_groups}),
    "SGD": (gpt, {"optimizer": with_sgd}),
    "untied": (untied, {}),
    "partly frozen": (partly_frozen, {}),
    "compiled": (gpt, {"wrap": lambda model: torch.compile(model, backend="aot_eager")}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_watch_changes_no_bit_of_a_training(case):
    make, options = CASES[case]
    without, watched = train(make(), False, **options), train(make(), True, **options)
    assert same(without.left, watched.left)
    watch = watched.watch
    assert watch.stopped is None and watch.steps == 7 and not watch.tracebacks
    assert {"train_loss_raw", "max_attn_logit", "adam_update_rms"} - (
        {"adam_update_rms"} if case == "SGD" else set()
    ) <= {*watch.seen}


def test_a_changed_bit_is_noticed():
    model, other = gpt(), gpt()
    assert same(train(model, False).left, train(other, False).left)
    assert not same(train(gpt(), False).left, train(gpt(), False, clip=1e-3).left)
