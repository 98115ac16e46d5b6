"""Numbers with an upper limit, and what a run needs of this machine: each refused in one line before training."""

import math

import joblib
import pytest
import torch

from foreshock.experiments import machine
from foreshock.experiments.machine import check_machine
from foreshock.experiments.ranges import LARGEST_NORM, largest_weight
from foreshock.experiments.training.out_of_memory import OutOfMemory
from foreshock.models.transformer import TransformerConfig

LARGEST = torch.finfo(torch.float32).max

TOO_LARGE = [
    ("model.init_std=1e30", "at most"),
    ("model.init_std=1e10", "at most"),
    ("model.query_init_std=1e30", "at most"),
    ("train.learning_rate=1e30", "at most"),
    ("train.weight_decay=1e30", "at most 1000, 1 / train.learning_rate"),
    ("train.weight_decay=1001.0", "at most 1000"),
    ("train.clip=1e20", "null for no clip"),
    ("train.clip=1e39", "at most 3.40"),
    ("train.warmup_steps=10000001", "at most 1e+07"),
    ("train.checkpoint_every_steps=10000001", "at most 1e+07"),
    ("train.steps=1000000000000", "at most"),
    ("train.stack=1025", "at most 1024"),
    ("model.d_model=2097152", "at most 1048576"),
    ("model.rope_base=1e39", "at most 3.40"),
]
TOO_LARGE_WITH_EXPERTS = [
    ("model.moe.aux_coef=1e30", "at most 1.84"),
    ("model.moe.z_coef=1e30", "at most 1.84"),
    ("model.moe.bias_update_speed=1.5", "at most 1, the largest probability"),
]


@pytest.mark.parametrize(
    ("line", "allowed", "others"),
    [*((*row, ()) for row in TOO_LARGE), *((*row, ("model=moe_nano",)) for row in TOO_LARGE_WITH_EXPERTS)],
)
def test_a_number_beyond_its_limit_is_one_line(line, allowed, others, make_run):
    field, _, value = line.partition("=")
    with pytest.raises(ValueError, match=rf"^{field}=\S+ is not allowed: ") as error:
        make_run(*others, line)
    said = str(error.value)
    assert allowed in said and "\n" not in said
    assert float(said.split("=")[1].split(" ")[0]) == float(value)


def test_a_weight_s_limit_is_where_a_norm_overflows():
    """Standard deviation s^2 d_model of what attention adds: finite squared at the limit, infinite a little beyond."""
    model = TransformerConfig(d_model=64, n_layers=1, n_heads=2, d_ff=64, context_length=8)
    for factor, finite in ((1 - 1e-6, True), (1 + 1e-6, False)):
        added = torch.tensor(largest_weight(model) * factor).double() ** 2 * model.d_model
        assert bool(torch.isfinite((added**2).float())) == finite


def test_no_norm_beyond_the_largest_is_finite():
    just = torch.tensor([LARGEST_NORM * (1 - 1e-6)], dtype=torch.float32)
    assert torch.isfinite((just**2).sum()) and not torch.isfinite(((1.001 * just) ** 2).sum())
    assert math.isclose(LARGEST_NORM**2, LARGEST)


def test_threads_are_those_that_the_processor_has(make_run, monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    check_machine(make_run("train.threads=3"))
    with pytest.raises(ValueError, match=r"^train\.threads=4 is not allowed here: 1 to 3, "):
        check_machine(make_run("train.threads=4"))


@pytest.mark.parametrize(
    ("lines", "field"),
    [
        (["train.batch_size=1000000000000"], r"train\.batch_size=1000000000000"),
        (["train.batch_size=1000000000"], r"train\.batch_size=1000000000"),
        (["train.batch_size=1000000000", "train.micro_batch=1"], r"train\.batch_size=1000000000"),
        (["train.held_out_sequences=1000000000"], r"train\.held_out_sequences=1000000000"),
        (["model.d_model=131072"], r"the model of model\.d_model=131072"),
    ],
)
def test_a_run_that_no_memory_holds_is_refused_with_the_field(lines, field, make_run, monkeypatch):
    """Whatever this machine has: memory is set to 64 GiB, of which the tiny run needs next to nothing."""
    monkeypatch.setattr(machine, "device_bytes", lambda device: 64 * 2**30)
    check_machine(make_run())
    with pytest.raises((OutOfMemory, ValueError), match=rf"^{field}\b.* is (too large|not allowed)") as error:
        check_machine(make_run(*lines))
    assert "\n" not in str(error.value)


def test_memory_is_counted_by_hand(make_run):
    run = make_run("train.micro_batch=2")
    sizes = machine.least_bytes(run)
    parameters = sum(p.numel() for p in run.new_model().parameters())
    assert next(iter(sizes.values())) == 16 * parameters
    assert sizes["train.batch_size=8"] == 8 * 17 * 8
    assert sizes["train.held_out_sequences=4"] == 4 * 17 * 8
    assert len(sizes) == 3  # an update takes more than the logits of two sequences
    many = machine.least_bytes(make_run("train.batch_size=800", "train.micro_batch=400"))
    assert next(iter(many.values())) == 4 * parameters
    assert many["train.micro_batch=400"] == 4 * 400 * 16 * 256
    assert machine.device_bytes(torch.device("cpu")) > 0
