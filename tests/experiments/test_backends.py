"""The backend of a run: part of its name once it is resolved, and of no consequence for loop, monitors and modules."""

import numpy as np
import pytest

from foreshock.experiments import trace
from foreshock.experiments.training.loop import train
from foreshock.experiments.training.manifest import new_manifest
from tests.rounding_bounds import FP32, gamma

pytestmark = pytest.mark.numeric

TRITON = [
    "model.backend=triton",
    "model.n_layers=1",
    "model.d_model=32",
    "model.context_length=16",
    "train.steps=6",
    "train.held_out_every_steps=6",
]
SMALL = "{queries:16,keys:16,warps:4,stages:1}"
OTHER_HEAD_FLIPPED = [
    "+fault@fault.faults.other=bf16_shift",
    "fault.faults.other.heads=[1]",
    "fault.faults.other.rounding=flip",
]
TILES = f"model.tiles={{forward:{SMALL},key_gradient:{SMALL},query_gradient:{SMALL}}}"


def test_auto_is_named_by_what_it_stands_for(make_run):
    assert make_run().run_id == make_run("model.backend=reference").run_id != make_run("model.backend=sdpa").run_id
    model = new_manifest(make_run("model.backend=auto"))["config"]["model"]
    assert (model["backend"], model["tiles"]) == ("reference", None)


def test_the_tiles_are_part_of_the_run_pinned_or_given(make_run):
    pinned, given = make_run(*TRITON), make_run(*TRITON, TILES)
    assert pinned.identity["config"]["model"]["tiles"]["forward"] == {
        "queries": 128,
        "keys": 64,
        "warps": 8,
        "stages": 3,
    }
    assert given.identity["config"]["model"]["tiles"]["forward"]["keys"] == 16
    assert "triton" in new_manifest(pinned)["versions"]
    adding = make_run(*TRITON, "model.deterministic=false")
    assert adding.identity["config"]["model"]["tiles"]["query_gradient"] is None
    assert len({r.run_id for r in (pinned, given, adding, make_run(*TRITON, "model.backend=reference"))}) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backend=triton"], "model.d_model=16 with model.n_heads=2 is d_head=8, .*multiple of 8 from 16 to 256"),
        ([TILES], "model.tiles is not allowed with model.backend='reference'"),
        (["model.deterministic=false"], "model.deterministic=False is not allowed with model.backend='reference'"),
        (
            [*TRITON, TILES, "model.tiles.query_gradient=null"],
            "model.deterministic=True does not fit model.tiles.query",
        ),
        ([*TRITON, TILES.replace("keys:16", "keys:24")], "model.tiles.forward: keys=24 is not allowed: a power of two"),
        ([*TRITON, TILES.replace("warps", "warp")], "model.tiles.forward.warps is missing"),
        ([*TRITON, "model.tiles={forward:{rows:3}}"], "model.tiles.forward.queries is missing"),
        ([*TRITON, "train.device=cuda"], "train.device='cuda' is not allowed here"),
        (
            [*TRITON, "fault=natural_bf16", "fault.pv_block=1"],
            "pv_block=1 is not allowed by attention backend 'triton': null, or a multiple of the 64 keys",
        ),
        (
            [*TRITON, "fault=combined", "fault.faults.attention.heads=[0]", *OTHER_HEAD_FLIPPED],
            "site 'o': the Triton kernel does one rounding a pass",
        ),
    ],
)
def test_what_does_not_fit_the_kernel_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)


@pytest.mark.slow
@pytest.mark.triton
def test_every_monitor_and_a_corrupted_module_are_those_of_the_reference(make_run, tmp_path):
    fault = ["fault=module_shift", "fault.modules=[blocks.0.attention.q]", "fault.site=y", "fault.bits=5"]
    kernel, reference = (
        trace.read(tmp_path / train(make_run(*TRITON, *fault, *more), tmp_path)["run_id"]).signals
        for more in ([TILES], ["model.backend=reference"])
    )
    assert set(kernel) == set(reference)
    for name, signal in reference.items():
        assert np.array_equal(np.isfinite(kernel[name].values), np.isfinite(signal.values)), name
    np.testing.assert_allclose(
        kernel["train_loss_raw"].values, reference["train_loss_raw"].values, rtol=2 * gamma(500, FP32)
    )


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("fault", [["fault=mask_shift", "fault.shift=4"], ["fault=score_scale", "fault.times=0"]])
def test_a_wrongly_wired_run_is_that_of_the_reference_and_logs_the_same(make_run, tmp_path, fault):
    few = [*TRITON, "train.steps=2", "train.held_out_every_steps=2", "train.batch_size=2", "model.init_std=0.2"]
    reference = "model.backend=reference"
    kernel, expected, healthy = (
        train(make_run(*few, *more), tmp_path) for more in ([*fault, TILES], [*fault, reference], [reference])
    )
    losses = [
        trace.read(tmp_path / manifest["run_id"]).signals["train_loss_raw"].values
        for manifest in (kernel, expected, healthy)
    ]
    bound = 2 * gamma(500, FP32)
    np.testing.assert_allclose(losses[0], losses[1], rtol=bound)
    assert (np.abs(losses[1] / losses[2] - 1) > 10 * bound).all()
    assert kernel["injected"] == expected["injected"] and kernel["injected"][0]["elements"] > 0
