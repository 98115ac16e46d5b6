import itertools

import pytest
import torch

from foreshock.experiments import bench_stack
from foreshock.experiments.plain_config import monitors_of
from foreshock.experiments.training.stacking import stacks, why_single


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model=moe_nano", "model.moe.n_experts=4"], "model.moe"),
        (["train.precision=bf16"], "train.precision=bf16"),
        (["train.precision=fp16"], "train.precision=fp16"),
        (["train.micro_batch=4"], "train.micro_batch=4"),
        (["train.watched_sequences=2"], "train.watched_sequences=2"),
        (["fault=batch_shrink", "fault.onset=39"], "a batch of"),
        (["fault=module_shift", "fault.modules=[blocks.0.mlp.input]"], "blocks.0.mlp.input"),
    ],
)
def test_runs_that_cannot_be_stacked_say_why(make_run, overrides, named):
    assert named in why_single(make_run(*overrides))


@pytest.mark.parametrize("fault", ["none", "bf16_shift", "lr_scale"])
def test_faults_of_attention_and_of_the_learning_rate_stack(make_run, fault):
    assert why_single(make_run(f"fault={fault}")) is None


def test_stacks_are_full_and_hold_runs_that_differ_in_their_own_keys_alone(make_run):
    runs = [
        make_run("train.stack=2", "seed=0"),
        make_run("train.stack=1", "seed=1"),
        make_run("train.stack=2", "seed=2", "fault=bf16_shift"),
        make_run("train.stack=2", "seed=3", "train.steps=20"),
        make_run("train.stack=2", "seed=4", "train.learning_rate=0.1"),
        make_run("train.stack=2", "seed=5", "monitor.qk_increment.windows=[2]"),
        make_run("train.stack=1", "seed=6"),
        make_run("train.stack=2", "seed=7", "fault=batch_shrink"),
        make_run("train.stack=2", "seed=8", "train.stop_drawup_nats=1.0"),
    ]
    assert stacks(runs) == [[0, 2], [1], [3], [4, 8], [5], [6], [7]]  # a sweep that is broken off has seen every kind


def test_the_bench_counts_the_steps_of_every_run_of_a_stack(monkeypatch):
    """A stack of two whose step takes three times as long as a single one makes two thirds of its run-steps."""
    monkeypatch.setattr(bench_stack, "TURNS", 2)
    names = itertools.cycle(("single", "stack"))

    def seconds(step, first, device):
        step(first)
        return {"single": 0.010, "stack": 0.030}[next(names)]

    monkeypatch.setattr(bench_stack, "_seconds_a_step", seconds)
    found = bench_stack.measure("cpu", size=2)
    assert found == pytest.approx({"single_ms": 10.0, "stack_ms": 30.0, "run_steps_per_s_ratio": 2 / 3})


def test_the_bench_counts_operations_that_compute_or_copy():
    x = torch.randn(4, 4)

    def step(index):
        (x.mT @ x[:2].mT).sum().add_(torch.empty(()))  # two views, an empty, a product, a sum, an addition

    assert bench_stack.operations(step, steps=3, first=0) == 3


def test_the_bench_watches_with_every_monitor_of_a_dense_default_run(make_run):
    run = make_run(tiny=False)
    built = monitors_of(experts=False)
    assert built.keys() == run.monitors.keys()
    for name, monitor in run.monitors.items():
        assert built[name].signals == monitor.signals and type(built[name]) is type(monitor)
