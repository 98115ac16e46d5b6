"""The training loop: what a fault, a monitor and a non-finite loss do to a run, and what its manifest says."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from foreshock.experiments import trace
from foreshock.experiments.build import build_run
from foreshock.experiments.training import single_engine
from foreshock.experiments.training.loop import train
from foreshock.experiments.training.out_of_memory import OutOfMemory
from foreshock.models.transformer import Transformer
from tests.experiments.same_result import WEIGHTS, assert_same_result


def test_a_device_without_memory_left_is_one_line_with_the_setting_to_lower(make_run, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB.\nMore lines")

    monkeypatch.setattr(single_engine, "backward", full)
    with pytest.raises(OutOfMemory, match=r"^cpu is out of memory at 4 of train\.batch_size=8 sequences of ") as error:
        train(make_run("train.micro_batch=4"), tmp_path)
    assert "model.context_length=16" in str(error.value) and str(error.value).endswith("lower train.micro_batch")
    assert "\n" not in str(error.value)
    with pytest.raises(OutOfMemory, match=r"lower model\.context_length"):
        train(make_run("train.micro_batch=1"), tmp_path)


@pytest.mark.parametrize(
    "overrides", [(), ("train.precision=bf16", "train.micro_batch=4"), ("train.watched_sequences=2",)]
)
def test_monitors_do_not_change_a_bit_of_training(make_run, tmp_path, overrides):
    watched = make_run(*overrides)
    train(watched, tmp_path / "watched")
    config = dict(watched.config)
    config["monitor"] = {"loss": config["monitor"]["loss"]}
    alone = build_run(config)
    train(alone, tmp_path / "alone")
    assert alone.run_id == watched.run_id
    weights = [tmp_path / how / alone.run_id / WEIGHTS for how in ("watched", "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_split_products_are_added_up_in_fp32(make_run, tmp_path):
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    train(make_run("train.steps=1", "train.warmup_steps=1", "train.held_out_every_steps=1"), tmp_path)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("pieces", [("train.micro_batch=4",), ("train.micro_batch=4", "train.watched_sequences=3")])
def test_under_autocast_every_law_has_its_ratio_and_a_broken_product_shows(make_run, tmp_path, pieces):
    names = ("attention_laws", "attention_recomputed", "linear_laws", "logit_laws", "norm_laws")
    every = [f"monitor.{name}.every_steps=2" for name in names]
    mixed = (*every, "train.precision=bf16", *pieces, "model.tie_embeddings=false")
    broken = ("fault=module_shift", "fault.modules=[blocks.1.mlp.output]", "fault.bits=4", "fault.onset=20")
    runs = [make_run(*mixed, *fault) for fault in ((), broken)]
    found = []
    for run in runs:
        train(run, tmp_path)
        signals = trace.read(tmp_path / run.run_id).signals
        found.append({name: one.values for name, one in signals.items() if name.endswith(".over_noise")})
        assert all(len(values) == 20 and np.isfinite(values).all() for values in found[-1].values())
    healthy, faulty = ({name: np.sqrt((x[10:] ** 2).mean((0, 2))) for name, x in of.items()} for of in found)
    assert {"linear_euler_residual.head.over_noise", "linear_input_residual.qkv.over_noise"} < healthy.keys()
    assert all(ratio.min() > 0.4 and ratio.max() < 2.5 for ratio in healthy.values()), healthy
    over = {name: ratio > 5 for name, ratio in faulty.items()}
    assert over.pop("linear_euler_residual.output.over_noise").tolist() == [False, True]
    assert not any(ratio.any() for ratio in over.values()), faulty


def test_a_fault_changes_nothing_before_its_onset(make_run, tmp_path):
    healthy, faulty = make_run(), make_run("fault=bf16_shift", "fault.onset=20")
    for run in (healthy, faulty):
        train(run, tmp_path)
    a, b = (trace.read(tmp_path / run.run_id).signals for run in (healthy, faulty))
    assert trace.read(tmp_path / faulty.run_id).onset == 21
    for name in a:
        early = a[name].steps <= 20
        assert np.array_equal(a[name].values[early], b[name].values[early], equal_nan=True), name
    after = a["grad_global_norm"].steps == 21
    assert a["grad_global_norm"].values[after] != b["grad_global_norm"].values[after]


def test_zero_bits_is_the_healthy_run_bit_for_bit(make_run, tmp_path):
    healthy, control = make_run(), make_run("fault=bf16_shift", "fault.bits=0")
    for run in (healthy, control):
        train(run, tmp_path)
    assert_same_result(tmp_path / healthy.run_id, tmp_path / control.run_id)


def test_a_non_finite_loss_ends_the_run_as_data(make_run, tmp_path):
    run = make_run("fault=lr_scale", "fault.factor=1e33", "fault.onset=0", "train.warmup_steps=0", "train.clip=null")
    manifest = train(run, tmp_path)
    assert manifest["end_reason"] == "non_finite"
    assert manifest["steps_done"] < 40
    read = trace.read(tmp_path / run.run_id)
    assert read.signals["held_out_loss"].steps[-1] == manifest["steps_done"]
    assert not np.isfinite(read.signals["train_loss_raw"].values).all()
    assert read.signals["nan_inf_events"].values[-1] > 0


def test_a_loss_that_breaks_after_the_last_evaluation_is_still_non_finite(make_run, tmp_path):
    broken = ["fault=lr_scale", "fault.factor=1e30", "fault.onset=10", "train.clip=null"]
    assert train(make_run(*broken, "train.steps=19"), tmp_path)["end_reason"] == "non_finite"


def test_a_run_may_end_as_diverged(make_run, tmp_path):
    run = make_run("train.stop_drawup_nats=0.5", "train.learning_rate=3.0", "train.warmup_steps=0", "train.steps=200")
    manifest = train(run, tmp_path)
    assert manifest["end_reason"] in ("diverged", "non_finite")
    assert manifest["steps_done"] < 200


def test_an_output_that_is_no_folder_is_an_error(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(make_run(), tmp_path / "file")


def test_the_manifest_says_where_a_result_comes_from(make_run, tmp_path):
    run = make_run("seed=7")
    manifest = train(run, tmp_path)
    assert manifest["seed"] == 7
    assert manifest["data_sha256"] == run.corpus.digest
    assert len(manifest["source_sha256"]) == 64
    assert manifest["steps_done"] == 40
    assert manifest["tokens_done"] == 40 * 8 * 16
    assert manifest["versions"]["torch"].startswith(manifest["torch"])
    assert manifest["onset_step"] is None
    assert {"wall_s", "cpu_s", "git_commit", "git_dirty", "device", "dtype"} <= manifest.keys()
    recorded = set(trace.read(tmp_path / run.run_id).signals)
    assert recorded <= set(manifest["signals"])
    parts_it_lacks = ("linear_", "logit_shift_residual.head", "norm_orthogonality_residual.", "loss_spike_score")
    assert all(signal.startswith(parts_it_lacks) for signal in set(manifest["signals"]) - recorded)


def final_weights(run, out) -> dict:
    train(run, out)
    return load_file(out / run.run_id / WEIGHTS)


def test_tokens_are_counted_as_they_were_trained_on(make_run, tmp_path):
    """8 sequences of 16 for 20 steps, then 2 of them."""
    run = make_run("fault=batch_shrink", "fault.factor=0.25", "fault.onset=20")
    manifest = train(run, tmp_path)
    loss = trace.read(tmp_path / run.run_id).signals["train_loss_raw"]
    sizes = np.diff(loss.tokens, prepend=0)
    assert sizes.tolist() == [8 * 16] * 20 + [2 * 16] * 20
    assert manifest["tokens_done"] == loss.tokens[-1] == sizes.sum()


def test_a_shrunk_batch_is_the_head_of_the_healthy_one(make_run, tmp_path, monkeypatch):
    seen = {}
    for name in ("fault=none", "fault=batch_shrink"):
        run = make_run(name, "train.steps=3", "train.held_out_every_steps=3")
        original, batches = run.corpus.batch, []
        monkeypatch.setattr(
            run.corpus,
            "batch",
            lambda *a, batches=batches, original=original: batches.append(original(*a)) or batches[-1],
        )
        train(run, tmp_path / name)
        seen[name] = batches
    for healthy, shrunk in zip(seen["fault=none"], seen["fault=batch_shrink"], strict=True):
        assert np.array_equal(healthy[: len(shrunk)], shrunk) and len(shrunk) == 1


def test_a_batch_smaller_than_what_is_watched_is_watched_whole(make_run, tmp_path):
    pieces = ("train.micro_batch=4", "train.watched_sequences=3", "train.steps=8", "train.held_out_every_steps=8")
    run = make_run("fault=batch_shrink", "fault.factor=null", "fault.batch_size=2", "fault.onset=6", *pieces)
    assert train(run, tmp_path)["tokens_done"] == (6 * 8 + 2 * 2) * 16


def test_a_zero_learning_rate_factor_would_freeze_only_its_group(make_run, tmp_path):
    """A factor of 1e-12 on the router leaves its weights where they began, and the rest learns."""
    run = make_run("model=moe_nano", "fault=lr_scale", "fault.factor=1e-12", "fault.groups=[router]")
    before = {name: p.clone() for name, p in run.new_model().named_parameters()}
    after = final_weights(run, tmp_path)
    for name, weight in before.items():
        moved = float(np.abs(after[name] - weight.detach().numpy()).max()) if name in after else 1.0
        assert (moved < 1e-9) == (".router." in name), name


def test_without_its_auxiliary_loss_only_the_gradient_of_the_nll_is_left(make_run, tmp_path):
    off = final_weights(
        make_run("model=moe_nano", "fault=aux_loss_off", "train.steps=5", "train.held_out_every_steps=5"),
        tmp_path / "off",
    )
    never = final_weights(
        make_run("model=moe_nano", "model.moe.aux_coef=0.0", "train.steps=5", "train.held_out_every_steps=5"),
        tmp_path / "never",
    )
    healthy = final_weights(
        make_run("model=moe_nano", "train.steps=5", "train.held_out_every_steps=5"), tmp_path / "healthy"
    )
    assert all(np.array_equal(off[name], never[name]) for name in off)
    assert not np.array_equal(off["blocks.0.mlp.router.weight"], healthy["blocks.0.mlp.router.weight"])


def test_a_dense_run_says_which_monitors_it_left_out(make_run, tmp_path):
    manifest = train(make_run("train.steps=1", "train.held_out_every_steps=1"), tmp_path)
    of_experts = {"expert_load", "router_laws", "router_weight", "routing_probability"}
    assert {*manifest["left_out_monitors"]} == {*of_experts, "loss_scale"}
    experts = make_run("train.steps=1", "train.held_out_every_steps=1", "model=moe_nano")
    assert train(experts, tmp_path)["left_out_monitors"] == ["loss_scale"]


def test_what_a_step_was_tapped_for_is_gone_before_the_next(make_run, tmp_path, monkeypatch):
    """It is as large as the step's activations, and would take the memory that the next step needs."""
    made, seen, alive = make_run("train.steps=12", "monitor.attention_laws.every_steps=1"), [], []
    laws, objective = made.monitors["attention_laws"], Transformer.forward
    run, observe = replace(made, monitors={"attention_laws": laws}), laws.observe

    def remember(view):
        seen.append(weakref.ref(view.taps))
        return observe(view)

    def count(*arguments):
        alive.append(sum(taps() is not None for taps in seen))
        return objective(*arguments)

    monkeypatch.setattr(laws, "observe", remember)
    monkeypatch.setattr(Transformer, "forward", count)
    train(run, tmp_path)
    assert len(seen) == 12 and not any(alive)
