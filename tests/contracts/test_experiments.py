"""Every conf/experiment file, at every scale, composes, and runs in fast mode from training to report."""

import hashlib
import shutil
from collections import Counter
from functools import partial

import pandas as pd
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foreshock.analysis.reports.kinds.by_name import DRAWINGS
from foreshock.analysis.scores.cases import ALL_CASES
from foreshock.experiments import reproduce
from foreshock.experiments.build import ROOT, build_run
from foreshock.experiments.plan import FIRST_CASE_SEED, FIRST_SEED, plan
from foreshock.experiments.reproduce import build_all, chosen_experiment, planned_runs
from foreshock.experiments.scoring import check_runs, check_settings, unwatched
from foreshock.experiments.train import describe
from foreshock.experiments.training.loop import train
from foreshock.models.transformer import Transformer

CONF = ROOT / "conf"
SHORT = {
    "attention_steps": "60",
    "router_steps": "60",
    "combined_steps": "60",
    "ramp": "{steps: 60, onset: 10, ramp_steps: 40}",
    "router_ramp": "{onset: 10, ramp_steps: 40}",
    "batch_steps": "{half: 60, quarter: 60, eighth: 60}",
    "grid_steps": "{quarter: 60, eighth: 60}",
    "early_warning": "{steps: 60, onset: 30}",
    "smallest_fault": "{steps: 60, onset: 30}",
    "localise": "{steps: 60, onset: 20, every_steps: 5, rows: 0}",
    "natural_bf16": "{steps: 60}",
    "reference_set": "{steps: 60, ramp: {onset: 10, ramp_steps: 40}}",
}
"""By size of some experiment, which stands in its scale, a smaller one."""
FILES = sorted((CONF / "experiment").glob("*.yaml"))
NODES = {path.stem: yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) for path in FILES}
OF_CASES = [name for name, node in NODES.items() if "cases" in node.get("experiment", node)]
EXPERIMENTS = [name for name in NODES if name not in OF_CASES]
DERIVED = [
    name
    for name, node in NODES.items()
    if any(isinstance(base, str) and base.split("@")[0] in NODES for base in node.get("defaults", ()))
]
"""Experiments that are others with some faults, seeds or sizes of their own: a report of the other is one of theirs."""
WHOLE = [name for name in EXPERIMENTS if name not in DERIVED]
SCALES = sorted(path.stem for path in (CONF / "scale").glob("*.yaml"))
QUICK = ("paper_attention", "paper_router_lr")
"""One experiment of a dense model, which every suite composes and trains, and one of experts, which it composes; the
others are slow."""


FEWER_MONITORS = ("early_warning_silence",)
"""Experiments that choose monitors of some detectors alone; the others' detectors and panels are all recorded."""


def slow_but(quick, names):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("experiment", slow_but(QUICK, EXPERIMENTS))
def test_every_cell_composes_and_builds(experiment, scale, text):
    given = [f"experiment={experiment}", f"scale={scale}", "data=text", f"data.path={text}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        if scale == "paper":
            given += ["data.held_out=0.3"]
        settings = OmegaConf.to_container(compose("reproduce", given), resolve=True)
        experiment = chosen_experiment(settings, given)
        check_settings(settings, experiment, given)
        seeds = experiment.get("seeds", settings["scale"]["seeds"])
        cells = plan(seeds, experiment["faults"], experiment["models"], experiment.get("overrides", ()))
        one_of_each = list({(cell.model, cell.fault, cell.role): cell for cell in cells}.values())
        if scale != "laptop":  # what a cell takes from its scale was resolved above; here first, last and healthy ones
            faulty = [cell for cell in one_of_each if cell.fault is not None]
            one_of_each = list(dict.fromkeys([faulty[0], faulty[-1], one_of_each[-1]]))
        runs = build_all([[*given, *cell.overrides] for cell in one_of_each])
    if scale == "laptop":
        check_runs(settings, experiment, one_of_each, runs)
    for cell, run in zip(one_of_each, runs, strict=True):
        assert run.seed == cell.seed
        assert (run.fault.onset is None) == (cell.fault is None)
    assert len({run.run_id for run in runs}) == len(runs)
    assert len({run.train.steps for cell, run in zip(one_of_each, runs, strict=True) if cell.fault is None}) == 1
    known = {signal.name for run in runs for monitor in run.monitors.values() for signal in monitor.signals}
    panels = [*experiment["figure"].values(), *(c["panel"] for c in experiment.get("claims", []) if "panel" in c)]
    used = [*experiment["detectors"].values(), *(panel["signals"] for panel in panels)]
    whole = {name for names in used for name in names} <= known | {"held_out_loss"}
    assert whole == (experiment["name"] not in FEWER_MONITORS) == (not unwatched(experiment, runs))
    baseline = experiment["baseline"]
    assert {*([baseline] if isinstance(baseline, str) else baseline)} <= set(experiment["detectors"])
    assert experiment["draw"] in DRAWINGS
    with torch.device("meta"):
        Transformer(runs[0].model_config)
    assert "parameters" in describe(runs[0])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_name_that_an_experiment_uses_exists(experiment):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = OmegaConf.to_container(compose("reproduce", [f"experiment={experiment}"]), resolve=True)[
            "experiment"
        ]
    faults, detectors = {*settings["faults"], "healthy"}, set(settings["detectors"])
    baseline = settings["baseline"]
    assert {*([baseline] if isinstance(baseline, str) else baseline)} <= detectors
    assert {*settings.get("groups", []), *settings.get("headline", [])} <= detectors
    assert settings.get("family") in {None, *detectors}
    for claim in settings.get("claims", []):
        assert ("alarms" in claim) + ("falls" in claim) + ("rises" in claim) == 1, claim
        assert claim.get("align", settings["align"][0]) in settings["align"]
        assert claim.get("model", settings["models"][0]) in settings["models"]
        if "alarms" in claim:
            assert claim["alarms"]["detector"] in settings["detectors"] and claim["alarms"]["fault"] in faults
        else:
            assert {*claim.get("falls", []), *claim.get("rises", [])} <= faults
    for family, ignored in settings.get("should_ignore", {}).items():
        assert family in settings["detectors"] and set(ignored) <= faults


@pytest.mark.slow
def test_experiments_of_a_scale_share_their_healthy_runs(text):
    """At laptop scale router experiments have one set of healthy runs, dense ones another, paper_attention its own."""
    healthy: dict[str, set[str]] = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name in WHOLE:
            given = [f"experiment={name}", "data=text", f"data.path={text}"]
            settings = OmegaConf.to_container(compose("reproduce", given), resolve=True)
            experiment = chosen_experiment(settings, given[1:])
            for model in experiment["models"]:
                overrides = [f"model={model}", *experiment.get("overrides", ()), "fault=none", "seed=0"]
                run = build_run(compose("reproduce", [*given, *overrides]))
                healthy.setdefault(model, set()).add(run.run_id)
    assert {model: len(ids) for model, ids in healthy.items()} == {"mha_nano": 2, "moe_nano": 1, "moe_untied": 1}


def short(experiment):
    """Overrides of the experiment's sizes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        scale = compose("reproduce", [f"experiment={experiment}"]).scale
    return [f"scale.{name}={size}" for name, size in SHORT.items() if name in scale]


def test_a_detector_has_a_file_of_its_own_and_a_name_of_its_own():
    """So a name means the same signals in every table."""
    names = [name for path in sorted((CONF / "detector").glob("*.yaml")) for name in OmegaConf.load(path)]
    assert len(names) == len(list((CONF / "detector").glob("*.yaml")))
    assert [name for name, count in Counter(names).items() if count > 1] == []


def train_healthy(members, out):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        runs = build_all(members)
    for run in runs:
        train(run, out)


@pytest.mark.parametrize("experiment", slow_but(QUICK[:1], WHOLE))
def test_it_runs_in_fast_mode_from_training_to_report(experiment, text, tiny, once, tmp_path, monkeypatch):
    """The real command with its launcher, on the tiny model: three faults, few seeds and 60 steps at most.

    It finds its healthy runs there, as it would those of another experiment: they are trained once a suite.
    """
    small = [
        "data=text", f"data.path={text}", *tiny, "train.steps=60", *short(experiment),
        "monitor.qk_increment.every_steps=10", "monitor.delta_w.every_steps=10",
        "scale.seeds={reference: 4, calibration: 1, test: 1, faulty: 1}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = OmegaConf.to_container(compose("reproduce", [f"experiment={experiment}", *small]), resolve=True)
    settings, scale = chosen_experiment(settings, small), settings["scale"]
    faults, models = list(settings["faults"]), settings["models"]
    arguments = [
        f"experiment={experiment}", *small, "scale.alpha=0.5", *(f"~experiment.faults.{name}" for name in faults[3:]),
        f"out={tmp_path / 'runs'}", f"report={tmp_path / 'report'}",
    ]  # fmt: skip
    for model in models:
        planned = plan(scale["seeds"], {}, [model], settings.get("overrides", ()))
        alike = hashlib.sha256(repr(planned[0].overrides).encode()).hexdigest()[:12]
        members = [[f"experiment={experiment}", *small, *cell.overrides] for cell in planned]
        healthy = once(f"healthy-{alike}", partial(train_healthy, members))
        shutil.copytree(healthy, tmp_path / "runs", dirs_exist_ok=True)
    healthy_runs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert len(healthy_runs) == len(models) * 6

    if experiment != "paper_attention":  # which has the launcher's processes; they take seconds to start
        arguments.append("at_once=1")
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
    reproduce.main()
    report = tmp_path / "report"
    written = {path.name for path in report.iterdir()}
    assert {"index.html", "figure.png", "experiment.json"} <= written
    for axis in settings["align"]:
        suffix = "" if axis == "steps" else f"-{axis}"
        assert {f"{table}{suffix}.csv" for table in ("leadtime", "runs", "ends")} <= written
    assert ("claims.csv" in written) == bool(settings.get("claims"))
    trained = {path.name for path in (tmp_path / "runs").iterdir()} - healthy_runs
    assert len(trained) == len(models) * len(faults[:3])


@pytest.mark.parametrize("scale", slow_but(("laptop",), SCALES))
@pytest.mark.parametrize("experiment", OF_CASES)
def test_every_case_composes_and_differs_from_the_others(experiment, scale, text):
    given = [f"experiment={experiment}", f"scale={scale}", "data=text", f"data.path={text}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = OmegaConf.to_container(compose("reproduce", given), resolve=True)
        experiment = chosen_experiment(settings, given)
        planned = planned_runs(experiment, settings["scale"])
        one_of_each = list({cell.fault: cell for cell in reversed(planned)}.values())
        runs = build_all([[*given, *cell.overrides] for cell in one_of_each])
    assert len(runs) == len({run.run_id for run in runs}) == len(experiment["cases"])
    for run in runs:
        signals = {signal.name for monitor in run.monitors.values() for signal in monitor.signals}
        assert set(experiment["laws"].values()) <= signals
    seeds = {cell.seed for cell in planned}
    assert min(seeds) >= FIRST_CASE_SEED and not seeds & {seed + i for seed in FIRST_SEED.values() for i in range(1000)}
    assert experiment["draw"] in DRAWINGS


def test_the_zoo_has_fifteen_healthy_cases_and_two_slow_ones_and_two_faults(text):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = ["experiment=healthy_zoo", "scale=desk", "data=text", f"data.path={text}"]
        settings = OmegaConf.to_container(compose("reproduce", given), resolve=True)
        planned = planned_runs(chosen_experiment(settings, given), settings["scale"])
        one_of_each = {cell.fault: cell for cell in planned}
        built = build_all([[*given, *cell.overrides] for cell in one_of_each.values()])
    runs = dict(zip(one_of_each, built, strict=True))
    healthy = {case for case, run in runs.items() if run.fault.onset is None}
    counts = Counter(cell.fault for cell in planned)
    assert Counter(counts[case] for case in healthy) == {40: 15, 10: 2}
    assert [counts[case] for case in runs if case not in healthy] == [10, 10]
    tokens = {case: run.train.batch_size * run.model_config.context_length for case, run in runs.items()}
    assert {case for case, count in tokens.items() if count != 1024} == {"padding_256"}
    assert {run.train.steps for run in runs.values()} == {300}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", OF_CASES)
def test_cases_run_in_fast_mode_from_training_to_report(experiment, text, tiny, tmp_path, monkeypatch):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cases = OmegaConf.to_container(compose("reproduce", [f"experiment={experiment}"]).experiment.cases)
    kept = [*list(cases)[:2], list(cases)[-1]]
    arguments = [
        f"experiment={experiment}", "data=text", f"data.path={text}", *tiny,
        f"scale.{experiment}={{seeds: 1, slow_seeds: 1, fault_seeds: 1, steps: 40}}", "at_once=1",
        *(f"~experiment.cases.{name}" for name in cases if name not in kept),
        f"out={tmp_path / 'runs'}", f"report={tmp_path / 'report'}",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
    reproduce.main()
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"experiment.json", "zoo.csv", "figure.png"}
    table = pd.read_csv(tmp_path / "report" / "zoo.csv")
    assert set(table["case"]) == {*kept, ALL_CASES}
    assert (table["readings"] > 0).all() and table["rms"].notna().all()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.parquet")}
    reproduce.main()  # finished runs are not trained again
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.parquet")}
