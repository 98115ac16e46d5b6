"""Monitors that watch a stack in one call against themselves, watching its runs one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from experiments import bench_stack
from experiments.build import Run
from experiments.plain_config import monitors_of
from experiments.stacked_history import SliceHistory
from experiments.stacked_monitors import StackedMonitors, _SeenAs, _WithRules, slice_view, stackable
from experiments.stacked_optimizer import StackedAdamW
from models.bits import truncate
from models.objective import objective_at
from models.stacked import StackedNumerics, StackedTransformer
from models.taps import Taps
from models.trees import tensors_of
from monitors.base import StepView, due_readings, state_of, tapped
from tests.experiments.reading_bounds import ROUNDINGS, error_bound
from tests.other_order import OtherBatchedOrder

pytestmark = pytest.mark.numeric

READINGS = (10, 20)
EVERY_10_STEPS = [f"monitor.{name}.every_steps=10" for name in ("linear_laws", "logit_laws", "norm_laws")]
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


@pytest.fixture(params=["own_order", "other_order"])
def order(request) -> Callable[[], AbstractContextManager]:
    """Batched products, which only a stack has, as this machine adds them up and as another one might."""
    return nullcontext if request.param == "own_order" else OtherBatchedOrder


def views(runs: Sequence[Run], break_one: bool) -> Iterator[tuple[StepView, list[StepView]]]:
    """Of a stack in training, at the steps of ``READINGS``: the view of all, and the view of each run.

    break_one: run ``BROKEN`` has a NaN in every weight before its last step.
    """
    model, healthy = StackedTransformer([run.new_model() for run in runs]), runs[0].healthy_sites()
    optimizer, history = StackedAdamW(model, [run.train for run in runs]), runs[0].new_history()
    histories = [SliceHistory(history, index) for index in range(len(runs))]
    history.record(0, model)
    for now in range(1, READINGS[-1] + 1):
        if break_one and now == READINGS[-1]:
            for weights in model.weights:
                weights[BROKEN].fill_(torch.nan)
        sites = [run.fault.sites(now - 1, healthy) for run in runs]
        batch = torch.from_numpy(runs[0].corpus.batches([run.seed for run in runs], now - 1, healthy.batch_size))
        numerics = StackedNumerics(tuple(site.numerics for site in sites))
        with Taps(model, tapped(runs[0].monitors.values())) as taps:
            losses_N = model.loss(batch, numerics)
            losses_N.sum().backward()
        model.take_gradients()
        norms_N = optimizer.clip()
        optimizer.step(now - 1, [site.lr_scale for site in sites])
        history.record(now, model)
        if now in READINGS:
            objective = partial(objective_at, model, batch, 1.0)
            view = StepView(
                now, 0, losses_N.detach(), norms_N, model, history, (), taps, optimizer, numerics, objective
            )
            yield (
                view,
                [
                    slice_view(view, index, histories[index], sites[index].numerics, batch[index])
                    for index in range(len(runs))
                ],
            )


@pytest.mark.parametrize("break_one", [False, True], ids=["finite", "one_broken"])
@pytest.mark.parametrize("model", MODELS)
def test_a_monitor_reads_of_a_stack_what_it_reads_of_each_run(make_run, model, break_one, order):
    runs = [make_run(*fault, *MODELS[model], *EVERY_10_STEPS) for fault in FAULTS]
    together = StackedMonitors([copy.deepcopy(run.monitors) for run in runs])
    assert together.names == {name for name, monitor in runs[0].monitors.items() if stackable(monitor)}
    for view, of_runs in views(runs, break_one):
        with order():
            stacked = together.observe(list(together.names), view)
        alone: dict[str, list[list[torch.Tensor]]] = {}
        for run, one in zip(runs, of_runs, strict=True):
            for name in together.names:
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
    given_back = [copy.deepcopy(run.monitors) for run in runs]
    together = StackedMonitors(given_back)
    for view, of_runs in views(runs, break_one=False):
        with order():
            together.observe(list(together.names), view)
        for run, one in zip(runs, of_runs, strict=True):
            for name in together.names:
                run.monitors[name].observe(one)
    remembered = set()
    for index, run in enumerate(runs):
        together.hand_back(index)
        for name in together.names:
            own, again = (tensors_of(state_of(monitors[name])) for monitors in (run.monitors, given_back[index]))
            assert len(own) == len(again), name
            for one, other in zip(own, again, strict=True):
                assert (one - other).double().norm() <= ROUNDINGS * one.double().norm(), name
            remembered |= {name} if own else set()
    assert remembered >= {"attn_fragility", "gradient_curvature", "loss", "non_finite", "spike_score"}


def test_a_step_of_a_watched_stack_takes_as_many_operations_for_8_runs_as_for_4(monkeypatch):
    """Two faults and two learning rates in either; from step 81 to 100 every monitor but the curvature's reads."""
    small = replace(bench_stack.NANO, d_model=16, d_ff=32, context_length=16)
    monkeypatch.setattr(bench_stack, "NANO", small)
    counts = []
    for size in (4, 8):
        monitors = [{n: m for n, m in monitors_of(experts=False).items() if stackable(m)} for _ in range(size)]
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
