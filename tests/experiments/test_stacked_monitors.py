"""Monitors that watch a stack in one call against themselves, watching its runs one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch

from foreshock.experiments import bench_stack
from foreshock.experiments.build import Run
from foreshock.experiments.plain_config import monitors_of
from foreshock.experiments.training.stacked_engine import StackedEngine
from foreshock.experiments.training.stacked_history import SliceHistory
from foreshock.experiments.training.stacked_watch import StackedWatch, _SeenAs, _WithRules, slice_view
from foreshock.models.bits import truncate
from foreshock.models.trees import tensors_of
from foreshock.monitors.base import Needs, StepView, due_readings, state_of, tapped
from foreshock.monitors.optimization import Loss
from tests.experiments.reading_bounds import ROUNDINGS, error_bound
from tests.other_order import OtherBatchedOrder

pytestmark = pytest.mark.numeric

READINGS = (10, 20)
EVERY_5_STEPS = [
    f"monitor.{name}.every_steps=5"
    for name in (
        "attention_laws", "attention_recomputed", "delta_bias_oracle", "gradient_curvature", "linear_laws",
        "logit_laws", "norm_laws", "spike_score",
    )
]  # fmt: skip
"""All monitors, then, have a reading at a step of ``READINGS``, which no jitter moves."""
MODELS = {
    "layernorm": [],
    "rmsnorm": ["model.norm=rmsnorm", "model.positions=rope", "model.mlp=swiglu", "model.qk_norm=true"],
    "grouped": ["model.n_heads=4", "model.n_kv_heads=2", "model.window=8", "model.tie_embeddings=false"],
}
FAULTS = (
    ("fault=none", "seed=3"),
    ("fault=bf16_shift", "seed=4"),
    ("fault=bf16_shift", "seed=6"),
    ("fault=lr_scale", "fault.factor=10", "seed=5"),
)
BROKEN = 1


@pytest.fixture(params=["own_order", pytest.param("other_order", marks=pytest.mark.slow)])
def order(request) -> Callable[[], AbstractContextManager]:
    """Batched products, which only a stack has, as this machine adds them up and as another one might."""
    return nullcontext if request.param == "own_order" else OtherBatchedOrder


def views(runs: Sequence[Run], break_one: bool) -> Iterator[tuple[StackedWatch, StepView, list[StepView]]]:
    """Of a stack in training, at the steps of ``READINGS``: its watch, the view of all, and the view of each run.

    break_one: run ``BROKEN`` has a NaN in every weight before its last step.
    """
    models, healthy = [run.new_model() for run in runs], runs[0].healthy_sites()
    engine = StackedEngine(models, [run.train for run in runs], runs[0].corpus, [run.seed for run in runs])
    watch = StackedWatch(engine.anatomy, engine.optimizer, [copy.deepcopy(run.monitors) for run in runs])
    watch.record(0)
    for now in range(1, READINGS[-1] + 1):
        if break_one and now == READINGS[-1]:
            for weights in engine.model.weights:
                weights[BROKEN].fill_(torch.nan)
        sites = [run.fault.sites(now - 1, healthy) for run in runs]
        view = watch.seen(engine.step(now - 1, sites, tapped(runs[0].monitors.values())))
        watch.record(now)
        if now in READINGS:
            of_runs = [slice_view(view, run, SliceHistory(watch.history, run)) for run in range(len(runs))]
            yield watch, view, of_runs


@pytest.mark.parametrize("break_one", [False, True], ids=["finite", "one_broken"])
@pytest.mark.parametrize("model", MODELS)
def test_a_monitor_reads_of_a_stack_what_it_reads_of_each_run(make_run, model, break_one, order):
    runs = [make_run(*fault, *MODELS[model], *EVERY_5_STEPS) for fault in FAULTS]
    for watch, view, of_runs in views(runs, break_one):
        assert watch.together == {name for name, monitor in runs[0].monitors.items() if monitor.needs.stackable}
        with order():
            stacked = watch.observe(view, watch.together)
        alone: dict[str, list[list[torch.Tensor]]] = {}
        for run, one in zip(runs, of_runs, strict=True):
            for name in watch.together:
                readings = due_readings(run.monitors[name], view.step, run.monitors[name].observe(one))
                for signal, reading in readings.items():
                    alone.setdefault(signal, []).append(tensors_of(reading))
        assert alone.keys() == stacked.keys()
        for signal, readings in alone.items():
            for own, of_all in zip(
                map(torch.stack, zip(*readings, strict=True)), tensors_of(stacked[signal]), strict=True
            ):
                size = own.double().abs().nan_to_num(0.0, 0.0).max().item()
                at = f"{signal}: {own} alone, {of_all} in the stack"
                bound = error_bound(signal) * size
                torch.testing.assert_close(of_all, own, rtol=0, atol=bound, equal_nan=True, msg=at)


def test_each_run_gets_its_own_memory_back(make_run, order):
    runs = [make_run(*fault, *MODELS["rmsnorm"]) for fault in FAULTS]
    for watch, view, of_runs in views(runs, break_one=False):
        with order():
            watch.observe(view, watch.together)
        for run, one in zip(runs, of_runs, strict=True):
            for name in watch.together:
                run.monitors[name].observe(one)
    remembered = set()
    for index, run in enumerate(runs):
        memory = watch.state_of(index)["monitors"]
        for name in watch.together:
            own, again = tensors_of(state_of(run.monitors[name])), tensors_of(memory[name])
            assert len(own) == len(again), name
            for one, other in zip(own, again, strict=True):
                assert (one - other).double().norm() <= ROUNDINGS * one.double().norm(), name
            remembered |= {name} if own else set()
    assert remembered >= {"attn_fragility", "gradient_curvature", "loss", "non_finite", "spike_score"}


def test_a_monitor_that_watches_run_by_run_reads_of_each_run_that_is_still_recorded(make_run):
    class Alone(Loss):
        needs = Needs()

    runs = [replace(make_run(*fault), monitors={"alone": Alone(every_steps=1, beta=0.9)}) for fault in FAULTS]
    for watch, view, of_runs in views(runs, break_one=False):
        assert not watch.together
        reading = watch.observe(view, ["alone"], runs=[0, 2])["train_loss_raw"]
        assert reading.undefined.tolist() == [False, True, False, True]
        assert reading.value[[0, 2]].tolist() == [of_runs[0].loss.item(), of_runs[2].loss.item()]


@pytest.mark.slow
def test_a_step_of_a_watched_stack_takes_as_many_operations_for_8_runs_as_for_4(monkeypatch):
    """Two faults and two learning rates in either; from step 81 to 100 every monitor but the curvature's reads."""
    small = replace(bench_stack.NANO, d_model=16, d_ff=32, context_length=16)
    monkeypatch.setattr(bench_stack, "NANO", small)
    counts = []
    for size in (4, 8):
        monitors = [{n: m for n, m in monitors_of(experts=False).items() if m.needs.stackable} for _ in range(size)]
        step = bench_stack.stacked(bench_stack._config("cpu"), size, monitors)
        for index in range(80):
            step(index)
        counts.append(bench_stack.operations(step, steps=20, first=80))
    assert counts[0] == counts[1] > 400


@pytest.mark.parametrize("in_dim", [0, 1])
def test_bits_are_seen_under_vmap_whether_or_not_it_has_a_rule_for_them(monkeypatch, in_dim):
    """PyTorch 2.11 has none, newer ones have: the one here serves all of them."""
    rows, used, apply = torch.randn(3, 5).bfloat16(), [], _SeenAs.apply
    monkeypatch.setattr(_SeenAs, "apply", lambda *given: used.append(given) or apply(*given))

    def of_one_run(row):
        with _WithRules():
            return truncate(row, 3)

    assert torch.equal(torch.vmap(of_one_run, in_dim, in_dim)(rows), truncate(rows, 3))
    assert len(used) == 2
