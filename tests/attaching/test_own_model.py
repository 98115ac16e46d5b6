"""An attached watch reads of our own model what the training loop reads, to the bit."""

from __future__ import annotations

import pytest
import torch

import foreshock
from foreshock.attaching.choice import configured, declined
from foreshock.experiments import trace
from foreshock.experiments.build import Run
from foreshock.experiments.training.clipping import clip_gradients
from foreshock.experiments.training.optimizer import adamw, learning_rate, set_learning_rate
from foreshock.monitors.base import Masked, Reading
from foreshock.monitors.watch import Watch

STEPS, EVERY = 22, 3


def numbers(reading: Reading) -> torch.Tensor:
    """A reading as one tensor, an undefined entry of its own kind."""
    if isinstance(reading, Masked):
        return torch.stack((reading.value.double(), reading.undefined.double()))
    return reading.double()


NOT_IN_FP32 = ("loss_scale", "tokens")
"""Monitors that our own engine does not fill there."""


def by_the_loop(run: Run) -> dict[tuple[int, str], torch.Tensor]:
    """What the monitors read in our own engine."""
    engine = run.new_engine()
    monitors = configured(("*",), EVERY)
    left_out = declined(monitors, engine.anatomy, engine.optimizer)
    ours = (name for name, monitor in monitors.items() if name not in left_out and name not in NOT_IN_FP32)
    monitors = {name: monitors[name] for name in ours}
    watch = Watch(engine.anatomy, engine.optimizer, monitors)
    watch.record(0)
    found = {}
    for step in range(STEPS):
        names = watch.due(step + 1)
        view = engine.step(step, [run.healthy_sites()], watch.places(names))
        watch.record(step + 1)
        found |= {(step + 1, name): numbers(reading) for name, reading in watch.observe(view, names).items()}
    return found


def by_a_loop_of_ones_own(run: Run, folder) -> dict[tuple[int, str], torch.Tensor]:
    """The same from outside, in a loop that knows nothing of monitors."""
    model, config, sites = run.new_model(), run.train, run.healthy_sites()
    optimizer, found = adamw(model, config), {}
    keep = lambda step, readings: found.update({(step, name): numbers(x) for name, x in readings.items()})  # noqa: E731
    with foreshock.attach(
        model, optimizer, every_steps=EVERY, rows=None, on_readings=keep, out=folder, quiet=True
    ) as watch:
        for step in range(STEPS):
            batch = torch.from_numpy(run.corpus.batch(run.seed, step, config.batch_size))
            optimizer.zero_grad()
            loss, auxiliary, routings = model(batch)
            (loss + auxiliary).backward()
            clip_gradients(list(model.parameters()), config.clip)
            set_learning_rate(optimizer, learning_rate(config, step), sites.lr_scale)
            optimizer.step()
            model.update_balance(routings, 1.0)
            watch.step(loss)
        assert watch.stopped is None and not watch.tracebacks
    return found


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("train.precision=bf16", "model.norm=rmsnorm", "model.qk_norm=true", "model.positions=rope"),
        ("model=moe_nano", "model.d_model=16", "model.n_layers=2", "model.d_ff=32"),
    ],
    ids=["dense", "BF16, RMSNorm, QK-norm, RoPE", "experts"],
)
def test_an_attached_watch_reads_what_the_loop_reads_to_the_bit(make_run, changes, tmp_path):
    run = make_run(*changes)
    ours, attached = by_the_loop(run), by_a_loop_of_ones_own(run, tmp_path / "run")
    tokens = {key for key in attached if key[1] == "tokens_per_update"}  # our own loop need not count them
    assert {attached.pop(key).item() for key in tokens} == {run.train.batch_size * run.model_config.context_length}
    assert ours.keys() == attached.keys()
    assert len({name for _, name in ours}) > 100
    different = [key for key in ours if not torch.equal(ours[key].nan_to_num(1e30), attached[key].nan_to_num(1e30))]
    assert not different
    saved = trace.read(tmp_path / "run")
    assert saved.signals.keys() == {name for _, name in ours} | {"tokens_per_update"}
    assert saved.end_reason == "completed" and saved.horizon == STEPS
    losses = saved.signals["train_loss_raw"]
    assert [ours[int(step), "train_loss_raw"].item() for step in losses.steps] == losses.values.ravel().tolist()
