"""Every operation reaches its point of the step, in a single run and in a stack, and nothing before its onset."""

import pytest
import torch

from foreshock.experiments import trace
from foreshock.experiments.training.loop import train, train_stack
from foreshock.experiments.training.stacking import why_single
from foreshock.faults.base import Sites
from foreshock.models.batch import inputs_and_targets
from foreshock.models.transformer import parameter_group

ONSET = 3
FAULTS = {
    "gradient_scale": ["fault=gradient_scale", "fault.group=mlp", "fault.factor=-2.0"],
    "adam_constants": ["fault=adam_constants"],
    "weight_bitflip": ["fault=weight_bitflip"],
    "label_noise": ["fault=label_noise"],
    "data_repeat": ["fault=data_repeat"],
    "bad_batch": ["fault=bad_batch"],
    "label_shift": ["fault=label_shift"],
    "tokenizer_mismatch": ["fault=tokenizer_mismatch"],
    "near_duplicates": ["fault=near_duplicates"],
    "padding_counted": ["fault=padding_counted"],
    "shuffle_off": ["fault=shuffle_off"],
    "domain_shift": ["fault=domain_shift"],
    "rounded_module": ["fault=rounded_module"],
    "mask_shift": ["fault=mask_shift"],
    "score_scale": ["fault=score_scale"],
    "kv_group_swap": ["fault=kv_group_swap", "model.n_heads=4", "model.n_kv_heads=2"],
}
CONTROLS = {
    "gradient_scale": ["fault=gradient_scale", "fault.factor=1.0"],
    "weight_bitflip": ["fault=weight_bitflip", "fault.bit=0"],
    "label_noise": ["fault=label_noise", "fault.share=0.0"],
    "data_repeat": ["fault=data_repeat", "fault.back=0", "fault.onset=0"],
    "bad_batch": ["fault=bad_batch", "fault.share=0.0"],
    "label_shift": ["fault=label_shift", "fault.shift=0"],
    "tokenizer_mismatch": ["fault=tokenizer_mismatch", "fault.share=0.0"],
    "near_duplicates": ["fault=near_duplicates", "fault.share=0.0"],
    "padding_counted": ["fault=padding_counted", "fault.share=0.0"],
    "shuffle_off": ["fault=shuffle_off", "fault.share=0.0"],
    "domain_shift": ["fault=domain_shift", "fault.share=0.0"],
    "rounded_module": ["fault=rounded_module", "fault.format=fp32"],
    "mask_shift": ["fault=mask_shift", "fault.shift=0"],
    "score_scale": ["fault=score_scale", "fault.times=1"],
    "kv_group_swap": ["fault=kv_group_swap", "model.n_heads=4", "model.n_kv_heads=2", "fault.offset=0"],
    "bf16_shift": ["fault=bf16_shift", "fault.bits=0"],
    "module_shift": ["fault=module_shift", "fault.bits=0"],
    "lr_scale": ["fault=lr_scale", "fault.factor=1.0"],
}


def weights_after(run, steps: int) -> list[dict[str, torch.Tensor]]:
    """The weights after each update."""
    engine, healthy, weights = run.new_engine(), run.healthy_sites(), []
    for step in range(steps):
        engine.step(step, [run.fault.sites(step, healthy)])
        weights.append({name: weight.detach().clone() for name, weight in engine.model.named_parameters()})
    return weights


def of_the_model(overrides: list[str]) -> list[str]:
    """Those that a healthy twin has too."""
    return [line for line in overrides if line.startswith("model.")]


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("name", FAULTS)
def test_the_weights_differ_from_the_onset_on_and_in_no_bit_before(make_run, name):
    faulty = weights_after(make_run(*FAULTS[name], f"fault.onset={ONSET}"), ONSET + 1)
    healthy = weights_after(make_run(*of_the_model(FAULTS[name])), ONSET + 1)
    assert [bool(differing(*pair)) for pair in zip(faulty, healthy, strict=True)] == [False] * ONSET + [True]


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_healthy_bit_for_bit(make_run, name):
    control = weights_after(make_run(*CONTROLS[name]), 3)
    healthy = weights_after(make_run(*of_the_model(CONTROLS[name])), 3)
    assert not any(differing(*pair) for pair in zip(control, healthy, strict=True))


def test_without_a_clip_a_scaled_gradient_changes_the_weights_of_its_group_alone(make_run):
    faulty = weights_after(make_run("fault=gradient_scale", "fault.group=mlp", "train.clip=null"), 1)[0]
    healthy = weights_after(make_run("train.clip=null"), 1)[0]
    assert differing(faulty, healthy) == {name for name in healthy if parameter_group(name) == "mlp"}


def test_a_scaled_gradient_enters_the_norm_that_the_clip_takes(make_run):
    runs = [make_run("fault=gradient_scale", "fault.group=null", f"fault.factor={factor}") for factor in (1.0, 3.0)]
    norms = [run.new_engine().step(0, [run.fault.sites(0, run.healthy_sites())]).grad_norm for run in runs]
    assert float(norms[1]) == pytest.approx(3 * float(norms[0]))


def test_a_flipped_bit_is_one_weight_of_one_parameter(make_run):
    faulty, healthy = (weights_after(make_run(*overrides), 1)[0] for overrides in (FAULTS["weight_bitflip"], []))
    assert differing(faulty, healthy) == {"blocks.0.attention.q.weight"}
    places = faulty["blocks.0.attention.q.weight"] != healthy["blocks.0.attention.q.weight"]
    assert places.sum() == 1


def test_label_noise_leaves_inputs_and_the_held_out_loss_alone(make_run):
    run = make_run("fault=label_noise", "fault.share=0.5", "train.micro_batch=4")
    engine, healthy = run.new_engine(), run.healthy_sites()
    clean = [inputs_and_targets(part) for part in engine.micro_batches(0, healthy)]
    noisy = [inputs_and_targets(part) for part in engine.micro_batches(0, run.fault.sites(0, healthy))]
    for (clean_inputs, clean_targets), (inputs, targets) in zip(clean, noisy, strict=True):
        assert torch.equal(inputs, clean_inputs) and not torch.equal(targets, clean_targets)
    assert torch.equal(engine.held_out_loss([healthy]), engine.held_out_loss([run.fault.sites(0, healthy)]))
    assert (
        engine.step(0, [run.fault.sites(0, healthy)]).tokens == run.train.batch_size * run.model_config.context_length
    )


def test_composed_faults_act_at_each_point(make_run):
    run = make_run(
        "fault=combined",
        "~fault.faults.attention",
        "~fault.faults.learning_rate",
        "+fault@fault.faults.flip=weight_bitflip",
        "+fault@fault.faults.scale=gradient_scale",
        "+fault@fault.faults.noise=label_noise",
        "fault.faults.noise.onset=1",
    )
    engine = run.new_engine()
    for step in range(2):
        engine.step(step, [run.fault.sites(step, Sites(batch_size=run.train.batch_size))])
    entries = engine.logs[0].entries()
    steps = {entry["point"]: entry["steps"] for entry in entries}
    assert steps == {"batch": 1, "gradients": 2, "weights": 1}
    assert [entry["elements"] for entry in entries if entry["point"] == "weights"] == [1]


def test_the_manifest_has_the_card_and_what_was_changed(make_run, tmp_path):
    run = make_run("fault=label_noise", "fault.share=0.25", "train.steps=12")
    manifest = train(run, tmp_path)
    (injection,) = manifest["injection"]["injections"]
    assert manifest["injection"]["family"] == "data"
    assert injection["where"]["point"] == "batch" and injection["size"] == {"share": 0.25}
    targets = run.train.batch_size * run.model_config.context_length // 4
    (entry,) = trace.read_manifest(tmp_path / run.run_id)["injected"]
    assert (entry["tensor"], entry["steps"], entry["elements"]) == ("targets", 10, 10 * targets)


def test_an_injection_that_changes_nothing_ends_the_run_by_name(make_run, tmp_path):
    """Where a query sees its own key alone, P is 1, whose low bits are 0."""
    run = make_run("model.window=1", "fault=bf16_shift", "fault.sites=[p]", "fault.phase=forward")
    with pytest.raises(ValueError, match="fault: p forward at 'numerics' changed no element in its first 10 steps"):
        train(run, tmp_path)
    assert trace.read_manifest(tmp_path / run.run_id)["end_reason"] == "failed"


@pytest.mark.parametrize("name", ["gradient_scale", "weight_bitflip", "shuffle_off", "mask_shift", "kv_group_swap"])
def test_in_a_stack_each_run_has_its_own_fault(make_run, tmp_path, name):
    steps = ["train.steps=6", "train.held_out_every_steps=6", "train.stack=3", *of_the_model(FAULTS[name])]
    of_all = [[], FAULTS[name], ["fault=bf16_shift"]]
    runs = [make_run(*steps, *overrides, f"seed={seed}") for seed, overrides in enumerate(of_all)]
    alone = [make_run(*steps, f"seed={seed}") for seed in range(3)]
    manifests = train_stack(runs, tmp_path / "faulty")
    healthy = train_stack(alone, tmp_path / "healthy")
    sums = [[m["files"]["weights.safetensors"] for m in stack] for stack in (manifests, healthy)]
    assert [one == other for one, other in zip(*sums, strict=True)] == [True, False, False]
    points = [{entry["point"] for entry in manifest["injected"]} for manifest in manifests]
    assert points == [set(), {runs[1].fault.corrupt.where}, {"numerics"}]


@pytest.mark.parametrize("name", ["adam_constants", "label_noise"])
def test_what_does_not_stack_says_so(make_run, name):
    operation = make_run(*FAULTS[name]).fault.corrupt.operation[0]
    assert why_single(make_run(*FAULTS[name])) == (
        f"fault: {operation} is not allowed with train.stack: it is applied in single runs alone"
    )


def test_the_log_goes_on_after_a_resume(make_run):
    run = make_run("fault=gradient_scale")
    healthy = run.healthy_sites()
    sites = run.fault.sites(0, healthy)
    whole, first, resumed = (run.new_engine() for _ in range(3))
    for step in range(12):
        whole.step(step, [sites])
    for step in range(4):
        first.step(step, [sites])
    resumed.load([first.state_of(0)])
    for step in range(4, 12):
        resumed.step(step, [sites])
    assert resumed.logs[0].entries() == whole.logs[0].entries()
    assert {entry["steps"] for entry in resumed.logs[0].entries()} == {10}
