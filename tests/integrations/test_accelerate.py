"""What ``accelerator.prepare`` returns is watched; a library that is missing is named with its extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.attaching.loops import batches, gpt, same

pytest.importorskip("accelerate")
from accelerate import Accelerator

from foreshock.integrations.accelerate import attach

ROOT = Path(__file__).parents[2]


def train(watched: bool, parts: int = 2):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    model = gpt()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
    watch = attach(model, optimizer, quiet=True, every_steps=5) if watched else None
    for batch in batches(10 * parts):
        with accelerator.accumulate(model):
            loss = model(batch[:, :-1], batch[:, 1:])[1]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            if watch is not None and accelerator.sync_gradients:
                watch.step(loss)
            optimizer.zero_grad()
    if watch is not None:
        watch.close()
    return model.state_dict(), watch


def test_a_prepared_model_and_optimizer_are_watched_and_train_to_the_same_bits():
    weights, watch = train(True)
    assert same(weights, train(False)[0])
    assert watch.steps == 10 and watch.stopped is None and not watch.tracebacks
    assert {"train_loss_raw", "max_attn_logit", "adam_update_rms"} <= watch.seen.keys()


BLOCKED = """
import sys
sys.modules[{library!r}] = None
try:
    import foreshock.integrations.{extra}
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("extra", ["transformers", "lightning", "accelerate"])
def test_a_missing_library_is_named_with_its_extra(extra):
    code = BLOCKED.format(library=extra, extra=extra)
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == (
        f"foreshock.integrations.{extra} needs {extra}, which is not installed: pip install 'foreshock[{extra}]'\n"
    )


def test_no_framework_is_imported_before_it_is_asked_for():
    code = "import sys, foreshock.integrations; print(*({'transformers', 'lightning', 'accelerate'} & {*sys.modules}))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "\n"
