"""A training with a watch whose backward breaks at a step: the alarm, from the hook to its line of JSON."""

from __future__ import annotations

import io
import json
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import foreshock
from foreshock.attaching.sight import Sight
from foreshock.attaching.writer import TraceWriter
from foreshock.models.anatomies import attention_capture
from foreshock.monitors.optimization import GradientNorm
from tests.alarms.readings import panel
from tests.attaching.loops import batches, gpt, same, train

BROKEN_FROM, LAYER, HEAD = 3, 1, 1


def without_two_bits(gradient: torch.Tensor) -> torch.Tensor:
    """Of one head's gradient in BF16."""
    gradient = gradient.clone()
    head = gradient[:, HEAD].contiguous()
    gradient[:, HEAD] = (head.view(torch.int16) & -4).view(torch.bfloat16)
    return gradient


class Broken:
    """PyTorch's attention, broken in a layer of a model: from a step on one head's dV loses two bits."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.steps, self.inside = 0, False
        attention = model.h[LAYER].attn
        attention.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        attention.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def __call__(self, q, k, v, *arguments, **named):
        if self.inside and self.steps + 1 >= BROKEN_FROM and v.requires_grad:
            v.register_hook(without_two_bits)
        return attention_capture.SDPA(q, k, v, *arguments, **named)

    def read(self, step, readings):
        self.steps = step


def test_a_broken_gradient_is_named_by_law_layer_head_and_step(tmp_path, monkeypatch):
    model, seen = gpt(width=64, heads=4), []
    broken = Broken(model)
    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    options = {"monitors": "attention_laws", "every_steps": 1, "out": tmp_path / "run", "on_alarm": seen.append}
    watch = train(model, True, steps=BROKEN_FROM, bf16=True, on_readings=broken.read, **options).watch
    assert watch.stopped is None, watch.tracebacks
    lines = [json.loads(line) for line in (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()]
    line = next(line for line in lines if line["signal"] == "value_shift_residual.over_noise")
    assert (line["step"], line["layer"], line["head"]) == (BROKEN_FROM, LAYER, HEAD)
    assert (line["law"], line["rule"], line["severity"]) == ("value shift", "universal", "SEV1")
    assert (line["run"], line["monitor"]) == ("run", "attention_laws")
    assert line["value"] > line["threshold"] > 3 and line["expected_false_alarms_per_million_steps"] <= 5
    assert line["runbook"] == "docs/runbooks/numerics.md"
    assert min(line["step"] for line in lines) == BROKEN_FROM
    assert [json.loads(event.json()) for event in seen] == lines and watch.alarms == seen


def next_loss(model):
    batch = batches(1)[0]
    return model(batch[:, :-1], batch[:, 1:])[1]


def test_a_nan_raises_where_the_loop_asked_for_it(tmp_path):
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    actions = {"SEV0": ("snapshot", "raise")}
    watch = foreshock.attach(model, optimizer, quiet=True, profile="icu", out=tmp_path / "run", actions=actions)
    batch = batches(1)[0]
    with pytest.raises(foreshock.TrainingAlarm, match="SEV0 step 1: "):
        loss = model(batch[:, :-1], batch[:, 1:])[1] * float("nan")
        loss.backward()
        optimizer.step()
        watch.step(loss)
    assert {event.rule for event in watch.alarms} >= {"exact", "non_finite"} and watch.stopped is None
    (folder, *_) = sorted((tmp_path / "run" / "evidence").iterdir())
    (kept,) = torch.load(folder / "batches.pt", weights_only=False)
    assert kept["arguments"][0].equal(batch[-2:, :-1])
    watch.close()


def test_healthy_training_raises_no_alarm_of_a_rule_with_a_rate_and_is_not_changed(tmp_path):
    without = train(gpt(), False, steps=12)
    watched = train(gpt(), True, steps=12, out=tmp_path / "run", actions="snapshot")
    assert same(without.left, watched.left)
    rated = [event for event in watched.watch.alarms if event.expected_false_alarms_per_million_steps != "unknown"]
    assert not rated and watched.watch.stopped is None


def test_what_befalls_the_watch_is_an_alarm(tmp_path, monkeypatch):
    def broken(self, view):
        raise RuntimeError("wrong")

    def listener(step, readings):
        raise KeyError(step)

    monkeypatch.setattr(GradientNorm, "observe", broken)
    (event,) = train(gpt(), True, profile="icu", alarms=foreshock.AlarmRules(("exact",))).watch.alarms
    assert (event.signal, event.severity, event.step) == ("monitor_failed", "SEV1", 1)
    assert "gradient_norm is switched off, it raised RuntimeError: wrong" in event.message
    called = []
    listeners = [listener, lambda step, _: called.append(step)]
    watch = train(gpt(), True, monitors="loss", on_readings=listeners, alarms=foreshock.AlarmRules(("exact",))).watch
    assert [(event.signal, event.severity, event.step) for event in watch.alarms] == [("listener_failed", "SEV1", 1)]
    assert watch.stopped is None and called == list(range(1, watch.steps + 1)) and "listener" in watch.tracebacks


class BrokenPipe(io.StringIO):
    def write(self, _):
        raise BrokenPipeError("broken pipe")


def test_a_broken_terminal_stops_nothing(monkeypatch):
    def broken(self, view):
        raise RuntimeError("wrong")

    monkeypatch.setattr(GradientNorm, "observe", broken)
    model, closed = gpt(), io.StringIO()
    closed.close()
    for terminal in (BrokenPipe(), closed, None):
        assert panel(terminal=terminal).own(1, "action_failed", "x").message == "x"
        optimizer = torch.optim.AdamW(model.parameters())
        with foreshock.attach(model, optimizer, profile="icu") as watch:
            monkeypatch.setattr(sys, "stderr", terminal)
            loss = next_loss(model)
            loss.backward()
            watch.step(loss)
            assert watch.stopped is None and "monitor_failed" in [event.signal for event in watch.alarms]
        monkeypatch.undo()
        monkeypatch.setattr(GradientNorm, "observe", broken)


def test_a_report_of_the_loop_and_alarms_that_are_off():
    model = gpt()
    with foreshock.attach(model, torch.optim.AdamW(model.parameters()), quiet=True, monitors="loss") as watch:
        assert watch.report("checkpoint_failure", "no space").severity == "SEV0"
        assert [event.signal for event in watch.alarms] == ["checkpoint_failure"]
    model = gpt()
    silent = foreshock.attach(model, torch.optim.AdamW(model.parameters()), quiet=True, monitors="loss", alarms=False)
    assert silent.alarms == []
    with pytest.raises(ValueError, match="alarms=False"):
        silent.report("stall")
    silent.close()


def test_what_a_hook_raises_asks_step_to_raise_and_leaves_the_backward_alone(monkeypatch):
    def broken(self, arguments, named):
        raise RuntimeError("wrong")

    monkeypatch.setattr(Sight, "_keep", broken)
    model = gpt()
    watch = foreshock.attach(model, torch.optim.AdamW(model.parameters()), quiet=True, profile="icu", actions="raise")
    loss = next_loss(model)
    loss.backward()
    assert [(event.signal, event.severity) for event in watch.alarms] == [("monitoring_blackout", "SEV0")]
    with pytest.raises(foreshock.TrainingAlarm, match="RuntimeError: wrong"):
        watch.step(loss)
    assert watch.step(loss) == {}  # told once
    watch.close()


def test_close_raises_no_alarm_and_calls_every_closer(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    model, called = gpt(), []
    watch = foreshock.attach(
        model,
        torch.optim.AdamW(model.parameters()),
        quiet=True,
        profile="icu",
        actions="raise",
        out=tmp_path / "run",
        alarms=foreshock.AlarmRules(("exact",)),
    )
    watch.when_closed(lambda: called.append(1))
    watch.when_closed(lambda: 1 / 0)
    watch.when_closed(lambda: called.append(2))
    loss = next_loss(model)
    loss.backward()
    watch.step(loss)
    monkeypatch.setattr(TraceWriter, "close", full)
    with pytest.raises(ZeroDivisionError):
        watch.close()
    assert called == [1, 2] and [event.signal for event in watch.alarms] == ["out_folder"]


def scaled_steps(model, scaler, factors, optimizer, **options):
    """Steps with a scaler, the gradients of each multiplied by a factor; the watch."""
    watch = foreshock.attach(model, optimizer, quiet=True, every_steps=1, scaler=scaler, **options)
    for factor in factors:
        loss = next_loss(model)
        loss.register_hook(partial(torch.mul, factor))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        watch.step(loss)
        optimizer.zero_grad()
    watch.close()
    return watch


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_of_the_scaler_is_no_alarm_and_leaves_no_trace_in_later_readings(tmp_path, fused):
    model, scaler = gpt(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    watch = scaled_steps(
        model,
        scaler,
        [float("inf"), 1, 1, float("nan"), 1, 1],
        torch.optim.AdamW(model.parameters(), 1e-3, fused=fused),
        out=tmp_path / "run",
        on_readings=lambda step, readings: seen.append((step, readings)),
        alarms=foreshock.AlarmRules(("non_finite", "exact")),
    )
    assert scaler.get_scale() == 2.0**8  # both were overflows
    assert watch.alarms == [] and watch.stopped is None and not watch.tracebacks
    assert [step for step, _ in seen] == [2, 3, 5, 6] and watch.steps == 6
    assert all(readings["grad_spike_score"].isfinite() for _, readings in seen)


@pytest.mark.parametrize("enabled", [False, True])
def test_what_no_scaler_mends_is_an_alarm(enabled):
    model, scaler = gpt(), torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled)
    factors = [float("inf")] * (7 if enabled else 1)
    watch = scaled_steps(model, scaler, factors, torch.optim.AdamW(model.parameters()), profile="icu")
    said = [(event.signal, event.severity) for event in watch.alarms if event.severity == "SEV0"]
    assert said == [("overflow_storm", "SEV0")] if enabled else ("nan_inf_events", "SEV0") in said


def test_the_panel_of_every_step_has_the_loss_scale_and_tokens(tmp_path):
    """Seven numbers: loss EMA, gradient norm, update to weight, loss scale and overflow, tokens, logit, entropy."""
    model, scaler, seen = gpt(), torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    watch = scaled_steps(
        model,
        scaler,
        [1, 1, float("inf"), 1, float("inf"), 1],
        torch.optim.AdamW(model.parameters(), 1e-3),
        profile="icu",
        on_readings=lambda step, readings: seen.append((step, readings)),
        alarms=foreshock.AlarmRules(("self",), warmup_steps=0),
    )
    assert not watch.declined and not watch.tracebacks and watch.alarms == []
    numbers = ("train_loss_ema", "grad_global_norm", "update_to_weight", "loss_scale", "overflow_rate")
    assert {*numbers, "tokens_per_update", "max_attn_logit", "attn_entropy"} <= watch.seen.keys()
    of_scaler = ("loss_scale", "skipped_updates", "overflow_rate")
    assert [(step, *(readings[name].item() for name in of_scaler)) for step, readings in seen] == [
        (1, 1024, 0, 0),
        (2, 1024, 0, 0),
        (4, 512, 1, 25),
        (6, 256, 2, pytest.approx(100 / 3)),
    ]
    tokens = batches(1)[0][:, :-1].numel()
    assert {readings["tokens_per_update"].item() for _, readings in seen} == {tokens}


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", enabled=False)])
def test_without_a_scaler_the_loss_scale_declines_by_name(scaler):
    model = gpt()
    with foreshock.attach(
        model, torch.optim.AdamW(model.parameters()), quiet=True, profile="icu", scaler=scaler
    ) as watch:
        assert watch.declined == {
            "loss_scale": "no GradScaler scales the loss: give attach(scaler=...) that of the training, if it has one"
        }


def test_tokens_of_an_update_are_those_of_all_its_micro_batches():
    read = []
    keep = lambda step, readings: read.append(readings["tokens_per_update"].item())  # noqa: E731
    train(gpt(), True, steps=2, parts=3, profile="icu", on_readings=keep)
    assert read == [3 * batches(1)[0][:, :-1].numel()] * 2
