"""The callback of the Hugging Face ``Trainer``, on short runs of a tiny GPT-2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.attaching.hugging_face import model_of  # skips where transformers is not installed
from tests.attaching.loops import same
from tests.attaching.test_transformers import THRESHOLD, in_attention, with_a_broken
from tests.integrations.trainer import by_hand, fit

pytest.importorskip("accelerate")
from foreshock.experiments import trace
from foreshock.integrations.transformers import WatchCallback
from foreshock.monitors.base import Masked

OPTIONS = {"every_steps": 10, "quiet": True}


class Kept:
    """Readings by step."""

    def __init__(self) -> None:
        self.by_step = {}

    def __call__(self, step, readings) -> None:
        self.by_step[step] = {name: tree_of(reading) for name, reading in readings.items()}


def tree_of(reading):
    """Its tensors; a masked reading is two."""
    return (reading.value, reading.undefined) if isinstance(reading, Masked) else reading


@pytest.mark.parametrize("parts", [1, 2], ids=["whole batches", "accumulation"])
def test_a_trainer_is_watched_as_a_loop_is_and_trains_to_the_same_bits(tmp_path, parts):
    seen, expected = Kept(), Kept()
    callback = WatchCallback(on_readings=seen, out=tmp_path / "trace", **OPTIONS)
    watched = fit(tmp_path, 30, callback, parts)
    assert same(watched.state_dict(), fit(tmp_path, 30, None, parts).state_dict())
    assert callback.watch.steps == 30 and callback.watch.stopped is None and not callback.watch.tracebacks
    hand, watch = by_hand(30, parts, on_readings=expected, every_steps=10)
    assert same(hand.state_dict(), watched.state_dict())
    assert seen.by_step.keys() == expected.by_step.keys() == set(range(1, 31))
    assert callback.watch.declined == watch.declined
    assert {"train_loss_raw", "grad_global_norm", "adam_update_rms", "gradient_curvature"} <= watch.seen.keys()
    assert same(seen.by_step, expected.by_step)
    assert trace.read(tmp_path / "trace").manifest["steps_done"] == 30


def test_two_bits_of_the_backward_alarm_at_the_first_reading(tmp_path, monkeypatch):
    healthy, broken = Kept(), Kept()
    fit(tmp_path, 30, WatchCallback(profile="laws", on_readings=healthy, **OPTIONS), bf16=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", with_a_broken("dv"))
    fit(tmp_path, 30, WatchCallback(profile="laws", on_readings=broken, **OPTIONS), bf16=True)
    first = [next(filter(None, map(in_attention, each.by_step.values()))) for each in (healthy, broken)]
    largest = [max(float(ratio.max()) for ratio in readings.values()) for readings in first]
    assert largest[0] < THRESHOLD < largest[1]


def test_a_resumed_training_has_a_folder_of_its_own(tmp_path):
    arguments = {"max_steps": 4}
    from transformers import TrainerState, TrainingArguments

    callback = WatchCallback(out=tmp_path / "trace", **OPTIONS)
    model = model_of("GPT2")
    settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **arguments)
    optimizer = torch.optim.AdamW(model.parameters())
    callback.on_train_begin(settings, TrainerState(global_step=7), None, model=model, optimizer=optimizer)
    callback.on_train_end(settings, TrainerState(), None)
    assert (tmp_path / "trace-from-7" / "manifest.json").exists()


def test_a_loss_that_the_model_does_not_return_is_asked_for(tmp_path):
    with pytest.raises(RuntimeError, match=r"WatchCallback: the model returns no loss: leave label_smoothing_factor"):
        fit(tmp_path, 1, WatchCallback(**OPTIONS), label_smoothing_factor=0.1)
