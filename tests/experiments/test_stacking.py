import pytest

from experiments import bench_stack
from experiments.stacking import stacks, why_single


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model=moe_nano", "model.moe.n_experts=4"], "model.moe"),
        (["train.precision=bf16"], "train.precision=bf16"),
        (["train.micro_batch=4"], "train.micro_batch=4"),
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
    assert stacks(runs) == [[0, 2], [4, 8], [1], [6], [3], [5], [7]]


def test_the_bench_counts_the_steps_of_every_run_of_a_stack(monkeypatch):
    monkeypatch.setattr(bench_stack, "TURNS", 2)
    found = bench_stack.measure("cpu", size=2)
    assert found["run_steps_per_s_ratio"] == pytest.approx(2 * found["single_ms"] / found["stack_ms"])
