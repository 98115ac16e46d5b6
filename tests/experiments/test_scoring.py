"""What an experiment's scoring asks for is judged before a step is trained."""

import copy
import dataclasses

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foreshock.experiments.cli import CONF
from foreshock.experiments.plan import PlannedRun
from foreshock.experiments.reproduce import chosen_experiment
from foreshock.experiments.scoring import check_runs, check_settings, unwatched


def settings_of(*given):
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = OmegaConf.to_container(compose("reproduce", list(given)), resolve=True)
    return settings, chosen_experiment(settings, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["scale.seeds=3"], r"scale\.seeds=3 is not allowed: keys with values"),
        (["scale.seeds.reference=3"], r"scale\.seeds\.reference=3 is not allowed: scoring needs at least 4"),
        (["scale.alpha=0.05"], r"scale\.seeds\.calibration=9 is not allowed: .* the smallest is 0\.1"),
        (["experiment.faults=null"], r"experiment\.faults=null is not allowed: keys with values"),
        (["+experiment.faults.mine.nope=1"], r"experiment\.faults\.mine\.nope is not a key"),
        (["+experiment.faults.mine.label=x"], r"experiment\.faults\.mine\.overrides is missing"),
        (["experiment.draw=grid"], r"experiment\.healthy_cell is missing: experiment\.draw=grid needs it"),
        (["experiment.draw=pie"], r"experiment\.draw='pie' is not allowed: one of central"),
        (["experiment.draw=cases"], r"experiment\.draw='cases' is not allowed: one of central"),
        (["experiment.draw=paired"], r"experiment\.control is missing"),
        (["~experiment.detectors"], r"experiment\.detectors is missing"),
        (["experiment.baseline=gradient nom"], r"experiment\.baseline='gradient nom' .* 'gradient norm'"),
        (["+experiment.groups=[nope]"], r"experiment\.groups='nope' is not allowed"),
        (["+experiment.detectors.never=[train_loss_raw]"], r"experiment\.detectors\.never is not allowed: tables have"),
        (["+experiment.faults.healthy.overrides=['fault=none']"], r"experiment\.faults\.healthy is not allowed"),
        (["experiment=early_warning", "align=tokens"], r"align=tokens is not allowed with"),
        (["experiment.baseline=[]"], r"experiment\.baseline=\[\] is not allowed: a name or a list of names"),
        (["experiment.baseline=null"], r"experiment\.baseline=null is not allowed: a name or a list of names"),
        (["experiment.baseline=[5]"], r"experiment\.baseline=\[5\] is not allowed: a name or a list of names"),
        (["experiment.baseline=[training loss,training loss]"], r"experiment\.baseline=.*: training loss stands there"),
        (["experiment.align=[steps,steps]"], r"experiment\.align=.* is not allowed: steps stands there twice"),
        (["experiment.models=[mha_nano,mha_nano]"], r"experiment\.models=.* mha_nano stands there twice"),
        (["experiment.monitors=[loss,loss]"], r"experiment\.monitors=.* loss stands there twice"),
        (["+experiment.detectors.mine=[train_loss_raw,train_loss_raw]"], r"\.detectors\.mine=.* stands there twice"),
        (["+experiment.groups=[training loss,training loss]"], r"experiment\.groups=.* stands there twice"),
        (["experiment.headline=[training loss,training loss]"], r"experiment\.headline=.* stands there twice"),
        (["+experiment.controls=[attention,attention]"], r"experiment\.controls=.* attention stands there twice"),
        (["+experiment.cost_faults=[attention,attention]"], r"experiment\.cost_faults=.* attention stands there twice"),
        (["+experiment.drift=[train_loss_raw,train_loss_raw]"], r"experiment\.drift=.* stands there twice"),
        (["+experiment.should_ignore={training loss: [attention,attention]}"], r"\.training loss=.* stands"),
        (["+experiment.figure.mine.signals=[grad_global_norm,grad_global_norm]"], r"\.mine\.signals=.* stands there"),
        (["experiment=healthy_zoo", "experiment.models=[mha_nano,moe_nano]"], r"experiment\.models=.* at most 1"),
        (["rule.weight=2"], r"rule\.weight=2\.0 is not allowed: above 0, at most 1"),
        (["label.ema_span=0"], r"label\.ema_span=0 is not allowed: at least 1"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_scored_is_one_line_by_name(given, message):
    with pytest.raises(ValueError, match=message) as error:
        check_settings(*settings_of(*given), given)
    assert "\n" not in str(error.value)


def test_what_the_command_line_dropped_may_still_be_referred_to():
    given = ["experiment=paper_selectivity", "~experiment.faults.lr10"]
    settings, experiment = settings_of(*given)
    check_settings(settings, experiment, given)
    with pytest.raises(ValueError, match=r"experiment\.should_ignore\.Delta-spectrum family='lr10' is not"):
        check_settings(settings, experiment, [])


@pytest.fixture
def dense(make_run):
    """Settings, experiment, plan and runs of one healthy and one faulty dense run."""
    settings, experiment = settings_of("label.consecutive=3")
    runs = [make_run(), make_run("fault=bf16_shift", "seed=3000")]
    roles = (("reference", None), ("faulty", "attention"))
    planned = [PlannedRun("mha_nano", *role, run.seed, ()) for role, run in zip(roles, runs, strict=True)]
    experiment = copy.deepcopy(experiment)
    experiment["detectors"] = {"loss": ["train_loss_raw"]}
    experiment["figure"] = {"held-out loss": {"signals": ["held_out_loss"]}}
    return settings, experiment, planned, runs


def test_a_signal_that_only_another_model_has_stays_usable(dense):
    settings, experiment, planned, runs = dense
    experiment["detectors"]["router"] = ["routing_entropy"]
    check_runs(settings, experiment, planned, runs)


def test_a_detector_of_a_monitor_that_is_left_out_is_not_scored(dense):
    settings, experiment, planned, runs = dense
    runs = [dataclasses.replace(run, monitors={"loss": run.monitors["loss"]}, left_out_monitors={}) for run in runs]
    experiment |= {
        "detectors": {"loss": ["train_loss_raw"], "norm": ["grad_global_norm"]},
        "baseline": ["loss", "norm"],
    }
    check_runs(settings, experiment, planned, runs)
    assert unwatched(experiment, runs) == ["norm"]
    for change, message in (
        ({"baseline": "norm"}, r"experiment\.baseline=norm: no configured monitor has their signals"),
        ({"family": "norm"}, r"experiment\.family=norm: no configured monitor has its signals"),
        ({"figure": {"it": {"signals": ["grad_global_norm"]}}}, r"experiment\.figure=it: no configured monitor"),
    ):
        with pytest.raises(ValueError, match=message):
            check_runs(settings, experiment | change, planned, runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detectors": {"mine": ["grad_globl_norm"]}}, r"experiment\.detectors\.mine: .* 'grad_globl_norm'; the"),
        ({"figure": {"mine": {"signals": ["held_out_los"]}}}, r"experiment\.figure\.mine.*: .* 'held_out_loss'"),
        ({"detectors": {"train_loss_raw": ["grad_global_norm"]}}, r"experiment\.detectors\.train_loss_raw is not"),
        ({"score_every": 100_000}, r"experiment\.score_every=100000 is not allowed: at most \d+, the steps"),
        ({"drift": ["train_loss_raw"]}, r"experiment\.drift='train_loss_raw' is not allowed: a signal of layers"),
    ],
)  # fmt: skip
def test_a_signal_that_no_monitor_has_is_named_with_the_nearest(dense, change, message):
    settings, experiment, planned, runs = dense
    with pytest.raises(ValueError, match=message):
        check_runs(settings, experiment | change, planned, runs)


def test_a_label_that_no_run_is_long_enough_for_is_refused(dense):
    settings, experiment, planned, runs = dense
    settings["label"]["consecutive"] = 6
    with pytest.raises(ValueError, match=r"label\.consecutive=6 is not allowed: .* has 5 evaluations"):
        check_runs(settings, experiment, planned, runs)


def test_a_fault_that_is_none_or_another_one_is_refused(dense, make_run):
    settings, experiment, planned, runs = dense
    with pytest.raises(ValueError, match=r"experiment\.faults\.attention\.overrides switch no fault on"):
        check_runs(settings, experiment, planned, [runs[0], make_run("seed=3000")])
    again = PlannedRun("mha_nano", "faulty", "again", 3000, ())
    with pytest.raises(ValueError, match=r"experiment\.faults\.again is not allowed: it has the runs of 'attention'"):
        check_runs(settings, experiment, [*planned, again], [*runs, runs[1]])
