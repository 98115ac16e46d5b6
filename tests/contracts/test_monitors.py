"""Every conf/monitor file keeps the contract of a monitor: alive, read-only, causal."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch

from foreshock.experiments import trace
from foreshock.experiments.build import ROOT, Run
from foreshock.experiments.plain_config import construct
from foreshock.experiments.training.loop import train
from foreshock.experiments.training.run_writer import HELD_OUT
from foreshock.models.numerics import AttentionNumerics, SiteFault
from foreshock.models.transformer import Transformer
from foreshock.monitors.base import Masked, Monitor, Reading, Signal, StepView, described_signals, tapped
from foreshock.monitors.needs import VIEW
from foreshock.monitors.signal import EXACT, OVER_NOISE, RATIO
from foreshock.monitors.watch import Watch

EVERY = {path.stem: construct("monitor", path.stem) for path in sorted((ROOT / "conf" / "monitor").glob("*.yaml"))}
ATTACHED = sorted(name for name, monitor in EVERY.items() if monitor.needs.attached or monitor.needs.scaled)
"""Those that no loop of ours fills in FP32; ``tests/attaching`` and ``test_fp16`` have them read."""
MONITORS = sorted(EVERY.keys() - set(ATTACHED))
CATALOGUE = pd.read_csv(ROOT / "monitors" / "catalogue.csv").set_index("id")
AXES = {(): (1, 1), ("layer",): (2, 1), ("layer", "head"): (2, 2)}


@pytest.fixture(scope="module", params=MONITORS)
def name(request) -> str:
    return request.param


VARIANT = ("model.mlp=swiglu", "model.qk_norm=true", "model.tie_embeddings=false")
EXPERTS = ("model.moe.n_experts=4", "model.moe.capacity_factor=1.0", "model.moe.z_coef=0.01", "model.moe.shared_d_ff=8")
MODEL = ("model=moe_nano", *EXPERTS, *VARIANT)
"""A model that gives every monitor something to see."""
DENSE = ("model=mha_nano", *VARIANT)
"""What a model with experts lacks: an MLP. Between the two every signal has something to see."""


RECOMPUTED_OUTPUT = "attention_recomputed.o.over_noise"
"""A wrong output does not tell which site of the backward is broken."""

GROUPED = ("model=gqa_nano", "model.n_heads=4", "model.n_kv_heads=2", "model.window=8")
"""Two query heads to a key-value head, and a window: half the context."""
OF_KEY_VALUE_HEADS = ("key_shift_", "value_shift_", "qk_gauge_", "vo_gauge_", "attention_recomputed.")
OF_KEYS_OR_VALUES = (".k", ".v")
MEMORY_STEPS = 100
"""Observations after which a monitor with memory has a reading."""


@pytest.fixture
def signals_of(make_run, tmp_path):
    """Train a model of so many steps: the run, and what it recorded."""

    def record(steps: int, *model: str):
        run = make_run(f"train.steps={steps}", *model)
        train(run, tmp_path)
        return run, trace.read(tmp_path / run.run_id).signals

    return record


def first_defined(series: trace.Series) -> int:
    """Where the first sample is that has no undefined entry: a monitor with memory may lack those before."""
    whole = ~series.undefined.reshape(len(series.steps), -1).any(axis=1)
    return int(np.argmax(whole)) if whole.any() else len(series.steps)


def check_alive(signal: Signal, series: trace.Series) -> None:
    """From its first reading on a signal is there at every sample and finite; it moves unless it says otherwise."""
    first = first_defined(series)
    values = series.values[first:]
    assert len(values) >= 2, f"{signal.name} is read too seldom to see whether it moves"
    assert not series.undefined[first:].any(), signal.name
    assert np.isfinite(values).all(), signal.name
    assert (np.ptp(values) == 0) == (signal.kind == EXACT), signal.name


def test_a_run_has_every_monitor_where_nobody_chooses(make_run):
    assert set(MONITORS) == set(make_run(*MODEL).monitors)


def test_every_signal_is_alive_on_a_healthy_run(signals_of):
    run, with_experts = signals_of(80, *MODEL)
    _, dense = signals_of(80, *DENSE)
    for monitor in run.monitors.values():
        for signal in described_signals(monitor):
            recorded = [signals[signal.name] for signals in (with_experts, dense) if signal.name in signals]
            assert recorded, signal.name
            for series in recorded:
                assert series.values.shape[1:] == AXES[signal.axes], signal.name
                assert all(signal.cadence.is_due(step) for step in series.steps.tolist()), signal.name
                check_alive(signal, series)


@pytest.mark.slow
def test_every_signal_is_alive_under_bf16_autocast(signals_of):
    """Linear layers and logits store BF16 there: their laws are broken by more, and by as much as is predicted."""
    for model in (MODEL, DENSE):
        _, fp32 = signals_of(80, *model)
        run, bf16 = signals_of(80, *model, "train.precision=bf16", "train.micro_batch=4")
        assert bf16.keys() == fp32.keys()
        for monitor in run.monitors.values():
            for signal in monitor.signals:
                if signal.name in bf16:
                    check_alive(signal, bf16[signal.name])
        for name in (name for name in bf16 if name.endswith(".over_noise")):
            residual, ratio = name.removesuffix(".over_noise"), np.median(bf16[name].values)
            assert ratio < 3, name
            assert ratio > 0.3 or name.startswith("linear_euler_"), name  # one number a reading may be anything below
            if name.startswith(("linear_", "logit_")) and ".router" not in name:
                assert np.median(bf16[residual].values) > 100 * np.median(fp32[residual].values), name


def test_every_signal_of_heads_is_alive_on_grouped_heads(signals_of):
    """A reading for each query head; for each key-value head where it is of one: laws, W_K, W_V."""
    run, signals = signals_of(60, *GROUPED)
    per_head = [s for m in run.monitors.values() for s in m.signals if s.axes == ("layer", "head")]
    assert len(per_head) > 50
    assert all(np.isfinite(series.values[first_defined(series) :]).all() for series in signals.values())
    for signal in per_head:
        values = signals[signal.name].values[first_defined(signals[signal.name]) :]
        parts = "".join(f".{part}" for part in signal.name.split(".")[1:])
        of_keys = signal.name.startswith(OF_KEY_VALUE_HEADS) or any(
            parts == kind or parts.startswith(f"{kind}.") for kind in OF_KEYS_OR_VALUES
        )
        assert values.shape[1:] == (2, 2 if of_keys else 4), signal.name
        assert np.isfinite(values).all(), signal.name
        assert ((np.ptp(values, axis=0) > 0) == (signal.kind != EXACT)).all(), signal.name


def test_readings_do_not_depend_on_what_comes_later(signals_of):
    _, longer = signals_of(60, *MODEL)
    _, shorter = signals_of(40, *MODEL)
    for signal, series in shorter.items():
        early = longer[signal].steps <= 40
        assert np.array_equal(longer[signal].values[early], series.values), signal


def test_every_signal_describes_itself_as_the_catalogue_does(make_run, name):
    monitor = make_run(*MODEL).monitors[name]
    assert isinstance(monitor, Monitor)
    for signal in (*monitor.signals, HELD_OUT):
        row = CATALOGUE.loc[signal.reference]
        assert signal.family == row["family"], signal.name
        assert signal.unit in row["unit"].split(";"), signal.name
        assert signal.bad in row["bad_direction"].split(";"), signal.name


@pytest.mark.parametrize("attached", ATTACHED)
def test_a_monitor_of_other_loops_describes_itself_as_the_catalogue_does(attached):
    assert isinstance(EVERY[attached], Monitor)
    for signal in EVERY[attached].signals:
        row = CATALOGUE.loc[signal.reference]
        assert (signal.family, signal.bad) == (row["family"], row["bad_direction"]), signal.name
        assert signal.unit in row["unit"].split(";"), signal.name


def test_every_ratio_to_noise_says_so_and_names_the_law_that_localises(make_run, name):
    for signal in make_run(*MODEL).monitors[name].signals:
        assert (signal.kind == RATIO) == signal.name.endswith(f".{OVER_NOISE}"), signal.name
        assert (signal.law is not None) == (signal.kind == RATIO and signal.name != RECOMPUTED_OUTPUT), signal.name


def test_it_reads_nothing_that_it_does_not_need(tenth_step):
    """Where a loop gives just what it declares, it reads the same."""
    monitor, view = tenth_step
    absent = {
        field.name: field.default for field in fields(StepView) if field.name in set(VIEW) - {*monitor.needs.view}
    }
    whole, just = (first_reading(copy.deepcopy(monitor), seen) for seen in (view, replace(view, **absent)))
    torch.testing.assert_close(values_of(just), values_of(whole), rtol=0, atol=0, equal_nan=True)


def values_of(readings: Mapping[str, Reading]) -> dict[str, torch.Tensor]:
    return {name: one.value if isinstance(one, Masked) else one for name, one in readings.items()}


def test_needs_are_read_in_no_other_way():
    old = re.compile(r"getattr\(\w+, .(needs|taps|lookbacks|oracle|stackable)")
    assert not [path for path in ROOT.glob("*/*.py") if path.parent.name != "tests" and old.search(path.read_text())]


def tenth_step_of(run: Run, name: str, plant: Callable[[Transformer], None] | None = None) -> tuple[Monitor, StepView]:
    """A monitor that has seen nothing yet, and what it sees at step 10. plant: done to the model before that step."""
    monitor, engine, healthy = run.monitors[name], run.new_engine(), run.healthy_sites()
    watch = Watch(engine.anatomy, engine.optimizer, {name: monitor})
    watch.record(0)
    for step in range(10):
        if step == 9 and plant is not None:
            plant(engine.model)
        view = engine.step(step, [healthy], tapped([monitor]))
        watch.record(step + 1)
    return monitor, watch.seen(view)


def first_reading(monitor: Monitor, view: StepView) -> dict[str, Reading]:
    """What a monitor reads of a view once it remembers enough to read anything."""
    for _ in range(MEMORY_STEPS):
        readings = monitor.observe(view)
        if readings:
            return dict(readings)
    raise AssertionError(f"no reading in {MEMORY_STEPS} observations")


@pytest.fixture
def tenth_step(make_run, name) -> tuple[Monitor, StepView]:
    return tenth_step_of(make_run(*MODEL), name)


def test_observing_changes_nothing(tenth_step):
    monitor, view = tenth_step
    model, optimizer, history = view.model, view.optimizer, view.history
    rates = [dict(group, params=None) for group in optimizer.param_groups]
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], history.state_dict()))
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    assert first_reading(monitor, view)
    torch.testing.assert_close(
        (model.state_dict(), optimizer.state_dict()["state"], history.state_dict()), state, rtol=0, atol=0
    )
    assert [dict(group, params=None) for group in optimizer.param_groups] == rates
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@torch.no_grad()
def nan_in_every_weight(model: Transformer) -> None:
    for parameter in model.parameters():
        parameter.view(-1)[0] = math.nan


def with_nan_activations(view: StepView, places: Iterable[str]) -> StepView:
    """The first number of every token in every tap and routing is NaN; weights and loss are healthy."""

    def broken(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.full_like(x[..., :1], math.nan), x[..., 1:]), -1).detach()

    for place in places:
        for tap in view.taps.at(place).values():
            tap.inputs = tuple(broken(x) for x in tap.inputs)
            tap.output, tap.output_grad = broken(tap.output), broken(tap.output_grad)
            tap.input_grads = {index: broken(x) for index, x in tap.input_grads.items()}
            tap.weight_grad = None if tap.weight_grad is None else torch.full_like(tap.weight_grad, math.nan)
    routings = tuple(
        replace(routing, logits_NE=broken(routing.logits_NE), probabilities_NE=broken(routing.probabilities_NE))
        for routing in view.routings
    )
    return replace(view, routings=routings)


def check_nothing_looks_healthy(monitor: Monitor, view: StepView) -> None:
    """Every reading is a NaN or an Inf that is not declared missing; a counter has counted."""
    counters = {signal.name for signal in monitor.signals if signal.kind == EXACT}
    for name, reading in first_reading(monitor, view).items():
        value, undefined = (reading.value, reading.undefined) if isinstance(reading, Masked) else (reading, None)
        if name in counters:
            assert (value > 0).all(), name
        else:
            assert not value.isfinite().any() and (undefined is None or not undefined.any()), name


@pytest.mark.parametrize("chosen", [MODEL, DENSE], ids=["experts", "dense"])
def test_nan_in_the_weights_never_looks_healthy(make_run, name, chosen):
    run = make_run(*chosen)
    if name in run.monitors:
        check_nothing_looks_healthy(*tenth_step_of(run, name, nan_in_every_weight))


@pytest.mark.parametrize("chosen", [MODEL, DENSE], ids=["experts", "dense"])
def test_nan_in_what_a_monitor_taps_never_looks_healthy(make_run, name, chosen):
    run = make_run(*chosen)
    if name not in run.monitors:
        return
    monitor, view = tenth_step_of(run, name)
    if "routings" in monitor.needs.view or tapped([monitor]):
        check_nothing_looks_healthy(monitor, with_nan_activations(view, tapped([monitor])))


def test_only_an_oracle_reads_what_the_fault_is(tenth_step):
    monitor, view = tenth_step
    informed_view = replace(view, numerics=AttentionNumerics((SiteFault("o", "backward", "truncate", 7),)))
    honest, informed = (first_reading(copy.deepcopy(monitor), seen) for seen in (view, informed_view))
    honest, informed = values_of(honest), values_of(informed)
    assert all(torch.equal(honest[name], informed[name]) for name in honest) == (not monitor.needs.oracle)
