"""Every leaf of conf/ refuses values that make no sense, in one line that names it, before anything is trained."""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foreshock.experiments.build import build_run
from foreshock.experiments.cli import CONF
from foreshock.experiments.plain_config import construct
from foreshock.experiments.reproduce import chosen_experiment
from foreshock.experiments.scoring import check_settings
from foreshock.experiments.settings import ReproduceCommand, check_command
from foreshock.experiments.trace import TraceError

BAD = (None, "", -1, 0, float("nan"), float("inf"), 1e300, "x", [], [1], 10**29, {"a": 1})
RUN_GROUPS = ("data", "fault", "model", "train")
EXPERIMENTS = (
    "early_warning",
    "early_warning_committed",
    "natural_bf16",
    "paper_attention",
    "paper_router_batch",
    "paper_router_grid",
    "reference_set_dense",
)
"""Between them they have every key of an experiment that is scored."""


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (Path(CONF) / group).glob("*.yaml"))


@functools.cache
def composed(config: str, *overrides: str) -> dict:
    with initialize_config_dir(CONF, version_base="1.3"):
        return OmegaConf.to_container(compose(config, list(overrides)), resolve=True)


def leaves(node: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths to every value of a node; of names that are the user's own, the first."""
    for index, (key, value) in enumerate(node.items()):
        if index and path[-1:] in (("faults",), ("detectors",), ("figure",), ("should_ignore",), ("cases",), ("laws",)):
            return
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, key))
        elif key != "_target_":
            yield (*path, key)


def changed(node: Mapping, path: Sequence[str], value: object) -> dict:
    """A node with another value at a path; what is beside the path is shared."""
    key, *deeper = path
    return {**node, key: changed(node[key], deeper, value) if deeper else value}


def corpus(config, context_length) -> SimpleNamespace:
    return SimpleNamespace(vocab_size=256, digest="d")


def refusal(check, node: Mapping, path: tuple[str, ...], value: object) -> str | None:
    """What is said of a changed value, or None where it is taken. Any other error is a failure of the test."""
    try:
        check(changed(node, path, value))
    except (ValueError, OSError, TraceError) as error:
        return str(error)
    return None


NONE, ZERO, TEXT, EMPTY, ONE = (None,), (0,), ("x",), ([],), ([1],)
TAKEN: dict[str, tuple[tuple, str]] = {
    "stdlib/data.path": (NONE, "the standard library has none"),
    "bpe*/data.path": (NONE, "the standard library has none"),
    "text/data.path": (TEXT, "a folder: whether it is there shows when it is read"),
    "tokens/data.path": (TEXT, "a file: whether it is there shows when it is read"),
    "data.pattern": (TEXT, "a name of files"),
    "data.bpe_vocab_size": (NONE, "raw bytes"),
    "stdlib/data.vocab_size": (NONE, "found out from the data"),
    "bpe*/data.vocab_size": (NONE, "found out from the data"),
    "text/data.vocab_size": (NONE, "found out from the data"),
    "data.repeats": (NONE, "the corpus as it is"),
    "fault*.onset": (ZERO, "the first update"),
    "*fault*.doses": (EMPTY, "none"),
    "fault*.duration": (NONE, "to the end"),
    "fault*.bits": (ZERO, "the healthy control on the same kernel"),
    "fault*.layers": (NONE + ONE, "every layer, or the second"),
    "fault*.heads": (NONE + ONE, "every head, or the second"),
    "fault*.share": (ZERO, "one element"),
    "fault*.ramp_steps": (ZERO, "at once"),
    "fault*.groups": (NONE, "every parameter"),
    "fault*.batch_size": (NONE, "factor is given instead"),
    "fault*.pv_block": (NONE, "the whole row"),
    "fault*.bit": (ZERO, "the healthy control"),
    "gradient_scale/fault.factor": ((-1, 0), "turned round; dropped"),
    "adam_constants/fault.beta1": (NONE + ZERO, "the run's own; no momentum"),
    "adam_constants/fault.beta2": (ZERO, "no memory of squares"),
    "adam_constants/fault.epsilon": (NONE + ZERO, "the run's own; none"),
    "data_repeat/fault.back": (NONE + ZERO, "to the first batch; the healthy control"),
    "data_repeat/fault.cycle": (NONE, "no end"),
    "label_shift/fault.shift": ((-1, 0), "the input is the target; the healthy control"),
    "near_duplicates/fault.edits": (ZERO, "exact copies"),
    "domain_shift/fault.source": (ZERO, "the first"),
    "aux_loss_scale/fault.factor": (ZERO, "off"),
    "router_frozen/fault.factor": (ZERO, "frozen"),
    "expert_dead/fault.layer": (ZERO, "the first"),
    "expert_dead/fault.expert": (NONE + ZERO, "the healthy control; the first"),
    "mask_shift/fault.shift": (ZERO, "the healthy control"),
    "score_scale/fault.times": (ZERO, "missing"),
    "kv_group_swap/fault.offset": (ZERO, "the healthy control"),
    "*fault*.window_phase": (ZERO, "the first of a period"),
    "fault.group": (NONE, "every parameter"),
    "adam_state_format/fault.moment": (NONE, "both"),
    "clip_*/fault.factor": (NONE, "no clip"),
    "decay_wrong/fault.factor": (ZERO, "no decay"),
    "gradient_stale/fault.lag": (ZERO, "the healthy control"),
    "fp8_*/fault.modules": (NONE, "every linear layer of the blocks"),
    "benign_fp8/fault.modules": (NONE, "every linear layer of the blocks"),
    "benign_mixture/fault.source": (ZERO, "the first"),
    "benign_order/fault.draw": (ZERO, "the run's own order"),
    "fp8_stale_scale/fault.lag": (ZERO, "the recipe's own, but for the factor"),
    "mx_linear/fault.modules": (NONE, "every linear layer of the blocks"),
    "mx_linear/fault.gradient_format": (NONE, "as format"),
    "mx_linear/fault.block": (NONE, "the format's own"),
    "schedule_restart/fault.back_steps": (NONE + ZERO, "to the first step; the healthy control"),
    "resume_lossy/fault.forget": (EMPTY, "the healthy control"),
    "checkpoint_corrupt/fault.back_steps": (NONE + ZERO, "to the start; the healthy control"),
    "loader_stall/fault.delay_s": (ZERO, "the healthy control"),
    "telemetry_gap/fault.delay": (ZERO, "at once"),
    "tied_gradient_double/fault.factor": (ZERO, "dropped"),
    "untied/fault.stale_copy": (NONE, "the healthy control"),
    "weight_tile/fault.rows": (ZERO, "the healthy control"),
    "fault*.beta": (NONE, "goes with another row_max"),
    "natural_bf16/fault.offset": (NONE, "goes with another row_max"),
    "model.n_kv_heads": (NONE, "as many as n_heads"),
    "model.window": (NONE, "every earlier key"),
    "model.vocab_size": (NONE, "the data's"),
    "model.query_init_std": (NONE + ZERO, "as init_std; uniform attention"),
    "model.dropout": (ZERO, "none"),
    "model.tiles": (NONE, "pinned to the head dim"),
    "model.moe": (NONE, "dense"),
    "model.moe.capacity_factor": (NONE, "drops nothing"),
    "model.moe.aux_coef": (ZERO, "no such loss"),
    "model.moe.z_coef": (ZERO, "no such loss"),
    "model.moe.shared_d_ff": (NONE, "no shared expert"),
    "model.moe.bias_update_speed": (NONE, "no balancing bias"),
    "train.warmup_steps": (ZERO, "no warm-up"),
    "train.final_lr_fraction": (ZERO, "a decay to nothing"),
    "train.weight_decay": (ZERO, "no decay"),
    "train.clip": (NONE, "no clip"),
    "train.stop_drawup_nats": (NONE, "train on"),
    "train.micro_batch": (NONE, "the whole batch"),
    "train.watched_sequences": (NONE, "all of them"),
    "train.piece_s": (NONE, "no end"),
    "monitor.*.rows": (ZERO, "all rows"),
    "monitor.*.windows": (ONE, "one step is a window"),
    "seed": (ZERO, "the first seed"),
    "out": (TEXT, "a folder"),
    "report": (TEXT, "a folder"),
    "align": (NONE, "as the experiment asks"),
    "at_once": ((-1,), "a run on every core"),
    "experiment.name": (TEXT, "a name"),
    "experiment.title": (TEXT, "a title"),
    "experiment.*.label": (TEXT, "a label"),
    "experiment.overrides": (EMPTY, "nothing that all runs have"),
    "experiment.controls": (EMPTY, "no controls"),
    "experiment.cost_faults": (EMPTY, "no choice"),
    "experiment.headline": (EMPTY, "no sentence"),
    "experiment.monitors": (NONE, "all monitors"),
    "experiment.only": (NONE, "all faults"),
    "experiment.groups": (EMPTY, "no lines"),
    "experiment.should_ignore.*": (EMPTY, "nothing to ignore"),
    "experiment.claims": (EMPTY, "no claims"),
    "experiment.laws.*": (("", *TEXT), "a signal: monitors tell whether one has it, once runs are built"),
    "experiment.seeds.test": (ZERO, "no healthy test runs"),
    "label.healthy_factor": (ZERO, "the margin is min_drawup_nats"),
    "scale.name": (TEXT, "a name"),
    "scale.seeds.test": (ZERO, "no healthy test runs"),
    "scale.moe_seeds.*": (ZERO, "judged where an experiment takes them"),
    "scale.dense": (TEXT, "a model: Hydra tells whether there is one"),
    "scale.moe": (TEXT, "a model: Hydra tells whether there is one"),
    "scale.untied": (TEXT, "a model: Hydra tells whether there is one"),
    "scale.sizes": (TEXT, "a row of sizes: resolving tells whether there is one"),
    "scale.attention_monitors": (NONE, "all monitors"),
    "scale.attention_bits": (ZERO, "the healthy control"),
    "scale.*.onset": (ZERO, "the first update"),
    "scale.*.ramp_steps": (ZERO, "at once"),
    "scale.localise.rows": (ZERO, "all rows"),
    "scale.healthy_zoo.slow_seeds": (ZERO, "none of the slow cases"),
    "scale.healthy_zoo.fault_seeds": (ZERO, "healthy cases alone"),
    "rule.drift": (ZERO, "no allowance"),
    "page_hinkley/rule.delta": (ZERO, "no allowance, of Page and Hinkley's test"),
    "rule.seed": (NONE + ZERO, "of a generator"),
    "rule.shifts": (ONE, "one shift"),
}
"""Of the values that make no sense elsewhere, those that a leaf takes, and what they mean there.

A pattern with a slash is of some options of its group alone.
"""

LATER = (
    "adam_state_bitflip",
    "adam_state_reset",
    "checkpoint_corrupt",
    "data_repeat",
    "gradient_stale",
    "resume_lossy",
    "schedule_restart",
)
"""Faults that need something before them: they refuse an onset of 0."""
NAMED = ("tied_gradient_double/fault.share",)
"""Leaves that are names where others of their key are numbers."""


def takes(option: str, path: str, value: object) -> bool:
    if (option in LATER and path == "fault.onset") or f"{option}/{path}" in NAMED:
        return False
    known = [
        values
        for pattern, (values, _) in TAKEN.items()
        if fnmatchcase(f"{option}/{path}", pattern if "/" in pattern else f"*/{pattern}")
    ]
    return any(type(value) is type(known_value) and value == known_value for values in known for known_value in values)


def walk(check, node: Mapping, part: str, option: str = "", keys: Collection[str] | None = None) -> None:
    """Every leaf of a node below ``part``, of ``keys`` alone where they are given, against every value."""
    for path in leaves(node):
        if path[0] != part or (keys is not None and path[1] not in keys):
            continue
        name = ".".join(path)
        for value in BAD:
            said = refusal(check, node, path, value)
            assert (said is None) == takes(option, name, value), f"{name}={value!r}: {said}"
            assert said is None or (name in said and "\n" not in said), f"{name}={value!r}: {said}"


def build(node: Mapping) -> None:
    build_run(node, corpus)


SMALL = ("monitor=[loss]", "train.device=cpu")
NEEDS = {
    "dropout_mismatch": ("model.dropout=0.1",),
    "aux_loss_off": ("model=moe_nano",),
    "aux_loss_scale": ("model=moe_nano",),
    "router_frozen": ("model=moe_nano",),
    "expert_dead": ("model=moe_nano",),
    "expert_capacity": ("model=moe_nano",),
    "rope_bf16": ("model.positions=rope",),
    "gradient_bf16_accumulation": ("train.micro_batch=4",),
    "fp16_overflow": ("train.precision=fp16",),
    "kv_group_swap": ("model=gqa_nano",),
    "benign_batch": ("fault.onset=3",),
    "benign_fp8": ("fault.onset=3",),
    "benign_lr_decay": ("fault.onset=3",),
    "benign_mixture": ("fault.onset=3",),
    "benign_order": ("fault.onset=3",),
    "adam_state_bitflip": ("fault.onset=3",),
    "adam_state_reset": ("fault.onset=3",),
    "schedule_restart": ("fault.onset=3",),
    "checkpoint_corrupt": ("fault.onset=3",),
    "resume_lossy": ("fault.onset=3",),
    "text": ("data.path=x",),
    "tokens": ("data.path=x",),
    "bpe_50k": ("model.vocab_size=50257",),
}


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in RUN_GROUPS for option in options(group)])
def test_a_leaf_of_a_run_refuses_what_makes_no_sense(group, option):
    steps = () if group == "train" else ("train.steps=20",)
    walk(build, composed("config", *SMALL, *steps, f"{group}={option}", *NEEDS.get(option, ())), group, option)


NEEDS_OF_MONITORS = {"loss_scale": ("train.precision=fp16",)}
OF_RUNS = [name for name in options("monitor") if not construct("monitor", name).needs.attached]


@pytest.mark.parametrize("name", OF_RUNS)
def test_a_leaf_of_a_monitor_does(name):
    needs = NEEDS_OF_MONITORS.get(name, ())
    node = composed("config", "model=moe_nano", "train.device=cpu", "train.steps=20", *needs)
    walk(build, {**node, "monitor": {name: node["monitor"][name]}}, "monitor")


def test_the_seed_does():
    walk(build, composed("config", *SMALL), "seed")


def check_scoring(node: Mapping) -> None:
    """All that ``experiments.reproduce`` judges before it builds its runs."""
    check_command(ReproduceCommand, node)
    check_settings(node, chosen_experiment(node, []), [])


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "healthy_zoo"])
def test_a_leaf_of_an_experiment_does(experiment):
    walk(check_scoring, composed("reproduce", f"experiment={experiment}"), "experiment")


@pytest.mark.parametrize("option", options("scale"))
def test_a_leaf_of_a_scale_does(option):
    walk(check_scoring, composed("reproduce", f"scale={option}"), "scale")


SIZED = ("early_warning", "healthy_zoo", "localise", "natural_bf16", "reference_set_dense", "smallest_fault")
ROUTERS = ("paper_combined", "paper_router_grid", "paper_router_ramp", "paper_selectivity")


@pytest.mark.parametrize("experiment", [*SIZED, *ROUTERS])
def test_a_leaf_of_an_experiment_s_sizes_does(experiment):
    node = composed("reproduce", f"experiment={experiment}")
    sizes = set(node["scale"]) - set(composed("reproduce")["scale"])
    assert sizes
    walk(check_scoring, node, "scale", keys=sizes)


@pytest.mark.parametrize("option", options("rule"))
def test_a_leaf_of_a_rule_does(option):
    walk(check_scoring, composed("reproduce", f"rule={option}"), "rule", option)


@pytest.mark.parametrize("part", ["label", "out", "dry_run", "quiet", "report", "align", "score_only", "at_once"])
def test_a_setting_of_a_command_does(part):
    walk(check_scoring, composed("reproduce"), part)


def test_every_key_of_an_experiment_is_walked():
    walked = {key for name in EXPERIMENTS for key in composed("reproduce", f"experiment={name}")["experiment"]}
    walked |= {key for key in composed("reproduce", "experiment=healthy_zoo")["experiment"]}
    nodes = [OmegaConf.to_container(OmegaConf.load(path)) for path in (Path(CONF) / "experiment").rglob("*.yaml")]
    files = {key for node in nodes for key in node.get("experiment", node)}
    assert files <= walked | {"defaults", "sizes_by_scale", "scale"}
