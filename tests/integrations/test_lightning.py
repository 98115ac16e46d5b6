"""The callback of Lightning's ``Trainer``, on short runs of a tiny GPT."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foreshock
from tests.attaching.loops import batches, gpt, same
from tests.integrations.test_transformers import Kept

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer

from foreshock.integrations.lightning import WatchCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
OPTIONS = {"every_steps": 10, "quiet": True}


class Language(LightningModule):
    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.model, self.automatic_optimization = gpt(), not by_hand

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.model(batch[:, :-1], batch[:, 1:])[1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(callback: Any = None, steps: int = 30, parts: int = 1, module: Any = None, **arguments: Any) -> nn.Module:
    module = module or Language()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about workers and loggers
        Trainer(
            max_steps=steps,
            accumulate_grad_batches=parts,
            gradient_clip_val=0.5 if module.automatic_optimization else None,
            callbacks=[callback] if callback else [],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        ).fit(module, torch.utils.data.DataLoader(batches(steps * parts), batch_size=None))
    return module.model


def by_hand(steps: int, parts: int, **options: Any) -> tuple[nn.Module, Any]:
    model, every = gpt().train(), batches(steps * parts)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watch = foreshock.attach(model, optimizer, quiet=True, **options)
    for step in range(steps):
        losses = []
        for batch in every[step * parts : (step + 1) * parts]:
            loss = model(batch[:, :-1], batch[:, 1:])[1] / parts
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        watch.step(torch.stack(losses).mean() * parts)
        optimizer.zero_grad()
    watch.close()
    return model, watch


@pytest.mark.parametrize("parts", [1, 2], ids=["whole batches", "accumulation"])
def test_a_fit_is_watched_as_a_loop_is_and_trains_to_the_same_bits(parts):
    seen, expected = Kept(), Kept()
    callback = WatchCallback(on_readings=seen, **OPTIONS)
    watched = fit(callback, parts=parts)
    assert same(watched.state_dict(), fit(parts=parts).state_dict())
    assert callback.watch.steps == 30 and callback.watch.stopped is None and not callback.watch.tracebacks
    hand, watch = by_hand(30, parts, on_readings=expected, every_steps=10)
    assert same(hand.state_dict(), watched.state_dict())
    assert seen.by_step.keys() == expected.by_step.keys() == set(range(1, 31))
    assert {"train_loss_raw", "grad_global_norm", "adam_update_rms", "gradient_curvature"} <= watch.seen.keys()
    assert same(seen.by_step, expected.by_step)


def test_a_module_that_optimizes_by_hand_is_told_before_it_trains():
    with pytest.raises(ValueError, match=r"WatchCallback: Language optimizes by hand or has several optimizers"):
        fit(WatchCallback(**OPTIONS), 1, module=Language(by_hand=True))


def test_an_unknown_module_is_named():
    with pytest.raises(ValueError, match=r"WatchCallback\(module='modle'\) is not allowed: one of model$"):
        fit(WatchCallback("modle", **OPTIONS), 1)
