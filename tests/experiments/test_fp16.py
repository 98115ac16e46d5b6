"""FP16 with a loss scale: PyTorch's own recipe to the bit, and updates that are skipped whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foreshock.experiments import trace
from foreshock.experiments.training.gradients import micro_batches
from foreshock.experiments.training.loop import train
from foreshock.experiments.training.optimizer import adamw, learning_rate, set_learning_rate
from foreshock.experiments.training.single_engine import SingleEngine
from tests.experiments.same_result import assert_same_result
from tests.experiments.test_resume import Killed, stop_at

FP16 = ("train.precision=fp16", "model.tie_embeddings=false")
PIECES = ("train.micro_batch=4", "train.watched_sequences=2")
OVERFLOWS = 2.0**40
"""A scale under which the tiny model's gradients are beyond FP16's 65,504."""


def engine_at(run, scale: float) -> SingleEngine:
    engine = run.new_engine()
    rescale(engine, scale)
    return engine


def rescale(engine: SingleEngine, scale: float) -> None:
    state = engine.scaler.state_dict()
    engine.scaler.load_state_dict(state | {"scaler": state["scaler"] | {"scale": scale}})


def weights_of(engine: SingleEngine) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in engine.model.state_dict().items()}


def moments_of(engine: SingleEngine) -> list[torch.Tensor]:
    return [x.clone() for state in engine.optimizer.state.values() for x in state.values()]


def same(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("pieces", [(), PIECES], ids=["whole", "pieces"])
def test_it_trains_as_pytorch_s_recipe_does(make_run, pieces):
    """Scale, unscale, clip, step and update written out, from a scale that overflows at first."""
    run = make_run(*FP16, *pieces)
    engine, model, config = engine_at(run, 2.0**26), run.new_model(), run.train
    optimizer, scaler = adamw(model, config), torch.amp.GradScaler("cpu", init_scale=2.0**26)
    skipped = 0
    for step in range(14):
        view = engine.step(step, [run.healthy_sites()])
        batch = torch.from_numpy(run.corpus.batch(run.seed, step, config.batch_size))
        parts = micro_batches(batch, config.micro_batch, config.watched_sequences)
        optimizer.zero_grad()
        for part in parts:
            loss, auxiliary, _ = model(part)
            scaler.scale(len(part) / len(parts[-1]) * (loss + auxiliary)).backward()
        for weight in model.parameters():
            weight.grad /= len(batch) / len(parts[-1])
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        set_learning_rate(optimizer, learning_rate(config, step), run.healthy_sites().lr_scale)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        assert view.skipped == (scaler.get_scale() < before) == (not bool(norm.isfinite()))
        assert view.skipped or torch.equal(view.grad_norm, norm)
        assert (view.scaling.scale, view.scaling.skipped) == (scaler.get_scale(), skipped)
        assert view.loss_scale == before
    assert 2 < skipped < 12
    assert all(torch.equal(x, y) for x, y in zip(engine.model.parameters(), model.parameters(), strict=True))


def test_a_skipped_update_leaves_weights_moments_counters_and_biases(make_run):
    experts = ("model=moe_nano", "model.moe.n_experts=4", "model.moe.bias_update_speed=0.01")
    run = make_run("train.precision=fp16", *experts)
    engine = run.new_engine()
    for step in range(2):
        assert not engine.step(step, [run.healthy_sites()]).skipped
    rescale(engine, OVERFLOWS)
    weights, moments = weights_of(engine), moments_of(engine)
    view = engine.step(2, [run.healthy_sites()])
    assert view.skipped and view.scaling.scale == OVERFLOWS / 2 and view.scaling.skipped == 1
    assert view.tokens == 3 * run.train.batch_size * run.model_config.context_length
    assert same(weights.values(), weights_of(engine).values()) and same(moments, moments_of(engine))
    rescale(engine, 1024.0)
    assert not engine.step(3, [run.healthy_sites()]).skipped
    assert not same(weights.values(), weights_of(engine).values()) and not same(moments, moments_of(engine))


def test_gradients_are_those_of_the_unscaled_loss(make_run):
    """A power of two changes no bit of a gradient that stays within FP16's normal numbers, whoever reads it."""
    run = make_run(*FP16, "fault=gradient_scale", "fault.factor=0.5", "fault.onset=0")
    healthy, faulty = run.healthy_sites(), run.fault.sites(0, run.healthy_sites())
    norms = {}
    for scale in (2.0**12, 2.0**14):
        for site in (healthy, faulty):
            engine = engine_at(run, scale)
            engine.step(0, [site])
            norms[scale, site is healthy] = torch.stack([x.grad.norm() for x in engine.model.parameters()])
    least = 2.0**-24 / 2.0**12  # FP16's spacing at 0, unscaled
    size = sum(x.numel() for x in engine.model.parameters()) ** 0.5
    assert (norms[2.0**12, True] - norms[2.0**14, True]).norm() <= 100 * least * size
    assert 0 < norms[2.0**12, True].norm() <= run.train.clip * (1 + 1e-5)


def test_a_non_finite_loss_is_no_overflow(make_run):
    run = make_run(*FP16)
    engine = run.new_engine()
    with torch.no_grad():
        engine.model.tokens.weight.fill_(torch.nan)
    view = engine.step(0, [run.healthy_sites()])
    assert not view.skipped and view.scaling.skipped == 1 and not view.loss.isfinite()


def test_the_other_precisions_have_no_scale(make_run):
    for precision in ("fp32", "bf16"):
        run = make_run(f"train.precision={precision}")
        engine = run.new_engine()
        view = engine.step(0, [run.healthy_sites()])
        assert (view.scaling, view.loss_scale, view.skipped) == (None, None, False)
        assert engine.state_of(0)["scaler"] == {}


@pytest.mark.slow
def test_no_monitor_raises_an_alarm_for_skipped_updates_and_every_law_holds(make_run, tmp_path):
    names = ("attention_laws", "attention_recomputed", "linear_laws", "logit_laws", "norm_laws")
    every = [f"monitor.{name}.every_steps=2" for name in names]
    run = make_run(*FP16, *PIECES, *every, "fault=fp16_overflow", "fault.onset=3")
    manifest = train(run, tmp_path)
    assert manifest["end_reason"] == "completed" and manifest["dtype"] == "float16"
    signals = trace.read(tmp_path / run.run_id).signals
    scale = signals["loss_scale"]
    assert scale.steps.tolist() == list(range(1, 41))
    skipped = 1 + np.flatnonzero(np.diff(signals["skipped_updates"].values.ravel(), prepend=0))
    assert 4 <= len(skipped) < 20 and skipped[0] == 4
    assert scale.values.ravel()[skipped[0] - 1] == 2.0**31 and scale.values.ravel()[-1] == 2.0 ** (32 - len(skipped))
    read = signals["grad_global_norm"].steps.tolist()
    assert sorted([*read, *skipped.tolist()]) == list(range(1, 41))
    assert signals["nan_inf_events"].values.max() == 0
    for name, series in signals.items():
        assert np.isfinite(series.values[~series.undefined]).all(), name
    ratios = {name: np.sqrt((x.values**2).mean((0, 2))) for name, x in signals.items() if name.endswith("over_noise")}
    assert len(ratios) > 20
    assert all(ratio.min() > 0.4 and ratio.max() < 2.5 for ratio in ratios.values()), ratios


def test_a_run_stopped_among_skipped_updates_resumes_to_the_same_bits(make_run, tmp_path):
    def new_run():
        fault = ("fault=fp16_overflow", "fault.onset=5", "fault.duration=null", "fault.every=12")
        short = ("train.steps=24", "train.held_out_every_steps=8", "train.checkpoint_every_steps=3")
        run = make_run(*FP16, *fault, *short)
        return replace(run, monitors={name: run.monitors[name] for name in ("loss", "loss_scale", "update_to_weight")})

    train(run := new_run(), tmp_path / "whole")
    for step in (9, 21):
        with pytest.raises(Killed):
            train(new_run(), tmp_path / "out", stop_at(step))
    train(new_run(), tmp_path / "out")
    assert_same_result(tmp_path / "out" / run.run_id, tmp_path / "whole" / run.run_id)
    skipped = trace.read(tmp_path / "whole" / run.run_id).signals["skipped_updates"].values.ravel()
    assert skipped[8] == 4 and skipped[20] > skipped[16] > 4  # both stops are among them
