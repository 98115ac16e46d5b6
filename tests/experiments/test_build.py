import pytest
import torch
from hydra import compose, initialize_config_dir

from foreshock.experiments.build import ROOT, build_run, construct
from foreshock.experiments.plain_config import construct as read_and_construct
from foreshock.experiments.plain_config import read
from foreshock.experiments.training.optimizer import adamw, learning_rate, set_learning_rate
from foreshock.experiments.training.train_config import TrainConfig
from foreshock.faults.base import LearningRateScale

CONF = ROOT / "conf"


GROUPED = ("model=gqa_nano", "model.n_heads=4")


def test_equal_configurations_are_one_run(make_run):
    one = make_run("fault=bf16_shift")
    reordered = {key: one.config[key] for key in reversed(one.config)}
    assert build_run(reordered).run_id == one.run_id == make_run("fault=bf16_shift").run_id
    assert make_run("fault=bf16_shift", "out=elsewhere", "quiet=true").run_id == one.run_id
    assert make_run("fault=bf16_shift", "train.device=cpu").run_id == one.run_id
    assert make_run("fault=bf16_shift", "train.piece_s=60").run_id == one.run_id


@pytest.mark.parametrize(
    "other",
    [
        "train.precision=bf16",
        "train.micro_batch=4",
        "train.watched_sequences=2",
        "seed=1",
        "train.steps=41",
        "fault=bf16_shift",
        "data.held_out=0.1",
        "model.norm=rmsnorm",
    ],
)
def test_whatever_changes_the_result_changes_the_run(make_run, other):
    assert make_run(other).run_id != make_run().run_id


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=bf16_shift", "fault.bits=9"], "bits=9 is not allowed: an integer from 0 to 8"),
        (["fault=bf16_shift", "fault.heads=[7]"], r"heads=\[7\] does not fit the model: it has 2 heads, 0 to 1"),
        (
            [*GROUPED, "fault=bf16_shift", "fault.sites=[o,dk]", "fault.heads=[3]"],
            r"heads=\[3\] does not fit the model: it has 2 key-value heads for 'dk', 0 to 1",
        ),
        ([*GROUPED, "model.n_kv_heads=3"], "model.n_heads=4 is not divisible by model.n_kv_heads=3"),
        (["fault=bf16_shift", "fault.layers=[5]"], r"layers=\[5\] does not fit the model: it has 2 layers"),
        (["fault=bf16_shift", "fault.onset=40"], "fault.onset=40 is after the end: train.steps=40"),
        (["fault=bf16_shift", "model.backend=sdpa"], "model.backend='sdpa' has no fault sites"),
        (["fault=natural_bf16", "model.backend=sdpa"], "model.backend='sdpa' has no fault sites"),
        (["fault=natural_bf16", "fault.beta=2.0"], "beta=2.0 is not allowed: it goes with row_max=dynamic alone"),
        (["fault=bf16_shift", "+fault.bit=3"], r"fault.bit is not a key of BF16Shift \(did you mean 'bits'\?"),
        (
            ["fault=bf16_shift", "fault.bits=seven"],
            "fault.bits='seven' is not allowed: input should be a valid integer",
        ),
        (["fault=bf16_shift", "fault.bits=true"], "fault.bits=True is not allowed: input should be a valid integer"),
        (["fault=bf16_shift", "fault._target_=faults.none.Nothing"], "fault._target_='faults.none.Nothing' cannot"),
        (["~fault.bits", "fault=bf16_shift"], "fault.bits is missing"),
        (["model.d_model=15"], "model.d_model=15 is not divisible by model.n_heads=2"),
        (["model.vocab_size=100"], "model.vocab_size=100 is too small: the data has 256"),
        (["train.steps=1.5"], "train.steps=1.5 is not allowed"),
        (["train.steps=0"], "train.steps=0 is not allowed: at least 1"),
        (["train.device=tpu"], "train.device='tpu' is not allowed"),
        (["train.precision=fp8"], "train.precision='fp8' is not allowed: one of fp32, bf16, fp16"),
        (["train.micro_batch=9"], "train.micro_batch=9 is not allowed: 1 to train.batch_size=8, or null"),
        (["train.micro_batch=0"], "train.micro_batch=0 is not allowed"),
        (["train.watched_sequences=0"], "train.watched_sequences=0 is not allowed: 1 to the 8 sequences"),
        (
            ["train.micro_batch=4", "train.watched_sequences=5"],
            "train.watched_sequences=5 is not allowed: 1 to the 4 sequences of a micro-batch, or null",
        ),
        (
            ["train.compile=true"],
            "train.compile=True would compile nothing: with train.micro_batch=None and train.watched_sequences=None "
            "monitors look at the whole batch, and what they look at is not compiled; set train.watched_sequences to "
            "a few of its 8 sequences",
        ),
        (["train.compile=true", "train.watched_sequences=8"], "train.watched_sequences=8 monitors look at the whole"),
        (["train.compile=true", "train.micro_batch=8"], "train.micro_batch=8 and train.watched_sequences=None"),
        (
            ["train.compile=true", "train.micro_batch=4", "fault=module_shift"],
            "train.compile=True has no fault sites outside attention: set train.compile=false",
        ),
        (["train.compile=true", "train.micro_batch=4", "model=moe_nano"], "with experts in FP32: set train.precision"),
        (
            ["train.micro_batch=4", "model=moe_nano", "model.moe.bias_update_speed=0.01"],
            "train.micro_batch is not allowed with model.moe.bias_update_speed",
        ),
        (
            ["train.watched_sequences=4", "model=moe_nano", "model.moe.bias_update_speed=0.01"],
            "train.watched_sequences is not allowed with model.moe.bias_update_speed",
        ),
        (["train.piece_s=0"], "train.piece_s=0.0 is not allowed: above 0"),
        (["train.betas=[0.9,1.0]"], r"train.betas=\[0.9, 1.0\] is not allowed"),
        (["train.schedule=cosine", "train.warmup_steps=40"], "train.warmup_steps=40 leaves no step to decay"),
        (["data.path=???"], "data.path is missing: it has no default"),
        (["monitor.delta_w.windows=[0]"], "at least 1 step"),
        (["monitor.delta_w.windows=[50,50]"], r"monitor.delta_w.windows=\[50, 50\] is not allowed: distinct"),
        (
            ["+monitor.again={_target_: monitors.optimization.Loss, every_steps: 1, beta: 0.9}"],
            "two monitors both emit",
        ),
        (["seed=-1"], "seed=-1 is not allowed"),
        (["model=moe_nano", "model.moe.top_k=9"], "model.moe.top_k=9 is not allowed: 1 to n_experts=8"),
        (["model=moe_nano", "model.moe.capacity_factor=0.0"], "model.moe.capacity_factor=0.0 is not allowed: above 0"),
        (["model=moe_nano", "+model.moe.topk=2"], r"model.moe.topk is not a key of MoEConfig \(did you mean 'top_k'\?"),
        (["model=moe_nano", "model.moe.top_k=two"], "model.moe.top_k='two' is not allowed"),
        (["model=moe_nano", "model.d_ff=12"], "model.d_ff=12 is not allowed with experts: a multiple of 8"),
        (["fault=lr_scale", "fault.factor=0.0"], "fault.factor=0.0 is not allowed: above 0"),
        (
            ["fault=lr_scale", "fault.groups=[gate]"],
            r"fault.groups=\['gate'\] is not allowed: distinct names of embedding",
        ),
        (["fault=lr_scale", "fault.groups=[router]"], "the learning rate of routers has no effect on a dense model"),
        (["fault=batch_shrink", "fault.factor=0.01"], "fault.factor=0.01 shrinks the batch of 8 below one sequence"),
        (["fault=batch_shrink", "fault.factor=null", "fault.batch_size=9"], "fault.batch_size=9 is above the healthy"),
        (["fault=aux_loss_off"], "changes load balancing, but the model has none"),
        (["fault=aux_loss_off", "model=moe_nano", "model.moe.aux_coef=0.0"], "it needs model.moe.aux_coef above 0"),
        (
            ["fault=combined", "fault.faults.attention.layers=[2]"],
            r"fault.layers=\[2\] does not fit the model: it has 2",
        ),
        (["fault=combined", "fault.faults.attention.bits=9"], "bits=9 is not allowed"),
        (["fault=combined", "fault.faults.attention.onset=99"], "fault.onset=99 is after the end: train.steps=40"),
        (["fault=lr_and_batch", "fault.faults.learning_rate.groups=[router]"], "has no effect on a dense model"),
        (["fault=combined", "+fault.faults.attention.bit=1"], "fault.faults.attention.bit is not a key of BF16Shift"),
        (
            ["fault=combined", "~fault.faults.attention", "~fault.faults.learning_rate"],
            r"fault.faults=\{\} is not allowed",
        ),
        (
            ["fault=combined", "+fault@fault.faults.again=bf16_shift", "fault.faults.again.onset=20"],
            "two faults on site 'o' in the backward pass meet",
        ),
        (["seed=x"], "seed='x' is not allowed"),
    ],
)
def test_an_impossible_configuration_is_one_line_by_name(make_run, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        make_run(*overrides)
    assert "\n" not in str(error.value)


def test_router_monitors_are_left_out_of_every_monitor_and_refused_by_name(make_run):
    """On a dense model all monitors but those; a choice that names one of them is an error."""
    dense, sparse = make_run(), make_run("model=moe_nano")
    routers = ["expert_load", "router_laws", "router_weight", "routing_probability"]
    assert sorted(dense.left_out_monitors) == sorted([*routers, "loss_scale"])
    assert set(sparse.monitors) - set(dense.monitors) == set(routers)
    assert not set(dense.config["monitor"]) & set(dense.left_out_monitors)
    with pytest.raises(ValueError, match=r"monitor\.routing_probability needs the role 'router', and the model has no"):
        make_run("monitor=[loss,routing_probability]", tiny=False)
    make_run("monitor=[loss,routing_probability]", "model=moe_nano", tiny=False)


@pytest.mark.parametrize("dropped", ["loss", "router_laws"])
def test_one_of_every_monitor_can_be_dropped_on_a_dense_model(make_run, dropped):
    run = make_run(f"~monitor.{dropped}")
    assert dropped not in {*run.monitors, *run.left_out_monitors}
    assert "gradient_norm" in run.monitors and "routing_probability" in run.left_out_monitors
    assert "routing_entropy" in run.signals  # a name that is there, though not on this model


def test_a_list_in_yaml_becomes_a_tuple():
    node = {"_target_": "faults.bf16_shift.BF16Shift", "sites": ["o"], "bits": 1, "layers": [0, 1]}
    assert construct(node, "fault").layers == (0, 1)


def test_the_monitors_of_a_run_are_the_files_that_there_are():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        listed = set(compose("config").monitor)
    names = {path.stem for path in (CONF / "monitor").glob("*.yaml")}
    assert listed == {name for name in names if not read_and_construct("monitor", name).needs.attached}


def test_a_monitor_of_attached_loops_alone_is_refused_by_name_where_it_is_chosen(make_run):
    config = dict(make_run().asked)
    chosen = {name: read("monitor", name) for name in ("loss", "tokens")}
    with pytest.raises(ValueError, match=r"^monitor\.tokens reads the loop of foreshock\.attach alone: leave it"):
        build_run({**config, "monitor": chosen})
    run = build_run({**config, "monitor": config["monitor"] | chosen})  # whatever fits
    assert "loss" in run.monitors and "tokens" in run.left_out_monitors


def test_the_loss_scale_is_refused_by_name_where_nothing_scales_the_loss(make_run):
    config = dict(make_run().asked)
    chosen = {name: read("monitor", name) for name in ("loss", "loss_scale")}
    with pytest.raises(ValueError, match=r"^monitor\.loss_scale reads the loss scale of train\.precision=fp16 alone"):
        build_run({**config, "monitor": chosen})
    assert "loss_scale" in make_run().left_out_monitors and "loss_scale" in make_run("train.precision=fp16").monitors


def train_config(**changes) -> TrainConfig:
    fields = dict(
        steps=110,
        batch_size=4,
        learning_rate=1.0,
        warmup_steps=10,
        schedule="constant",
        final_lr_fraction=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        clip=1.0,
        held_out_sequences=4,
        held_out_every_steps=10,
        stop_drawup_nats=None,
        checkpoint_every_steps=10,
        stack=1,
        device="cpu",
        threads=1,
        precision="fp32",
        micro_batch=None,
        watched_sequences=None,
        compile=False,
    )
    return TrainConfig(**(fields | changes))


def test_a_device_that_is_not_there_is_named(make_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"train\.device='cuda' is not allowed here: torch sees no CUDA device"):
        make_run("train.device=cuda").run_id  # noqa: B018


def test_learning_rate_schedules():
    constant, cosine = train_config(), train_config(schedule="cosine")
    for config in (constant, cosine):
        assert [learning_rate(config, step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(constant, 109) == 1.0
    assert learning_rate(cosine, 109) == pytest.approx(0.1)
    middle = 10 + 99 / 2
    assert learning_rate(cosine, int(middle)) == pytest.approx(0.55, abs=0.01)


def test_only_matrices_decay(make_run):
    model = make_run().new_model()
    groups = adamw(model, train_config()).param_groups
    for group in groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
        assert group["weight_decay"] in (0.0, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_parameter_group_learns_at_its_own_rate(make_run):
    model = make_run("model=moe_nano").new_model()
    optimizer = adamw(model, train_config())
    set_learning_rate(optimizer, 0.5, LearningRateScale(router=4.0, norm=0.0))
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate_of[id(p)] for name, p in model.named_parameters()}
    assert rates["blocks.1.mlp.router.weight"] == 2.0
    assert rates["final_norm.weight"] == rates["blocks.0.mlp_norm.bias"] == 0.0
    assert rates["blocks.0.mlp.input.weight"] == rates["blocks.0.attention.q.weight"] == rates["tokens.weight"] == 0.5
