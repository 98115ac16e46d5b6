"""A run in a stack against the same run by itself.

With RMSNorm and on a CPU every weight and signal is compared bit for bit, but for means over tokens of the loss, whose sum
has another order. A stacked LayerNorm rounds its gain's gradient otherwise, and AdamW divides a gradient that is all
rounding by its own size, so such runs part slowly: they are compared with a single run whose weights were moved by
that rounding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from experiments import checkpoint, trace
from experiments.loop import train
from experiments.stacked_loop import train_stack

WEIGHTS = "weights.safetensors"
THREE = (("fault=none", "seed=3"), ("fault=bf16_shift", "seed=4"), ("fault=lr_scale", "fault.factor=10", "seed=5"))
RMSNORM = ("model.norm=rmsnorm", "model.positions=rope", "model.mlp=swiglu", "model.qk_norm=true", "train.steps=30")
LAYERNORM = ("train.steps=30",)
OF_THE_LOSS = {"train_loss_raw", "train_loss_ema", "held_out_loss", "loss_spike_score"}
TWO_ULPS = 2.5e-7


class Killed(BaseException):
    pass


def stop_at(step: int):
    def progress(now, losses):
        if now == step:
            raise Killed

    return progress


@pytest.fixture
def make_stack(make_run):
    def make(*overrides: str, faults=THREE):
        return [make_run(*fault, *overrides, "train.stack=3") for fault in faults]

    return make


@pytest.fixture
def singles(make_run, tmp_path):
    """Folders of the same runs, each trained by itself."""

    def folders(*overrides: str, faults=THREE) -> list[Path]:
        runs = [make_run(*fault, *overrides) for fault in faults]
        return [tmp_path / "single" / train(run, tmp_path / "single")["run_id"] for run in runs]

    return folders


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / WEIGHTS)


def distance(one: Path, other: Path) -> float:
    """The largest relative distance of a weight tensor."""
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    return max(float(np.linalg.norm(a[name] - b[name]) / np.linalg.norm(a[name])) for name in a if a[name].any())


def assert_same_bits(one: Path, other: Path) -> None:
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    a, b = trace.read(one).signals, trace.read(other).signals
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name].steps, b[name].steps), name
        assert np.array_equal(a[name].tokens, b[name].tokens), name
        assert np.array_equal(a[name].undefined, b[name].undefined), name
        if name in OF_THE_LOSS:
            np.testing.assert_allclose(a[name].values, b[name].values, rtol=TWO_ULPS, err_msg=name)
        else:
            np.testing.assert_array_equal(a[name].values, b[name].values, name)


def test_a_stack_of_three_gives_each_run_its_own_bits(make_stack, singles, tmp_path):
    manifests = train_stack(make_stack(*RMSNORM), tmp_path / "stack")
    assert [manifest["end_reason"] for manifest in manifests] == ["completed"] * 3
    for manifest, single in zip(manifests, singles(*RMSNORM), strict=True):
        assert_same_bits(single, tmp_path / "stack" / manifest["run_id"])


def test_stacked_layer_norms_part_no_further_than_their_rounding(make_stack, make_run, singles, tmp_path):
    manifests = train_stack(make_stack(*LAYERNORM), tmp_path / "stack")
    for fault, manifest, single in zip(THREE, manifests, singles(*LAYERNORM), strict=True):
        nudged = make_run(*fault, *LAYERNORM)
        initial = nudged.new_model

        def moved(initial=initial):
            model = initial()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.mul_(1 + 2**-23) if "norm" in name else None
            return model

        object.__setattr__(nudged, "new_model", moved)
        train(nudged, tmp_path / "nudged")
        print(
            fault,
            distance(single, tmp_path / "stack" / manifest["run_id"]),
            distance(single, tmp_path / "nudged" / nudged.run_id),
        )
    assert 0
