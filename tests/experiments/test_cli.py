import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foreshock.experiments.build import ROOT
from foreshock.experiments.cli import CONF, check_overrides
from foreshock.experiments.plan import FIRST_SEED, plan
from foreshock.experiments.reproduce import chosen_experiment

SEEDS = {"reference": 2, "calibration": 3, "test": 1, "faulty": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fault=bf16shift"], r"fault=bf16shift is not an option of fault \(did you mean 'bf16_shift'\?"),
        (["modle=mha_nano"], r"modle is not a key of the configuration \(did you mean 'model'\?"),
        (["train.stepz=3"], r"train.stepz is not a key of the configuration \(did you mean 'steps'\?"),
        (["fault=bf16_shift", "fault.bit=3"], r"fault.bit is not a key .* \(did you mean 'bits'\?"),
        (["fault=bf16_shift,bf16shift", "-m"], "fault=bf16shift is not an option"),
        (["fault=[unclosed"], r"fault=\[unclosed cannot be read"),
        (["fault=bf16_shift,none"], "fault=bf16_shift,none lists several values: add -m"),
        (["train.steps"], "'train.steps' is not allowed: key=value"),
        (["--multi"], r"--multi is not a flag of this command \(did you mean '--multirun'"),
        (["--cfg", "nope"], "--cfg nope is not allowed: job or hydra or all"),
        (["hydra/launcher=nope"], "Could not find 'hydra/launcher/nope' Available options"),
        (["hydra.job.chdir=maybe"], "Error merging override hydra.job.chdir=maybe: Value 'maybe' is not a valid bool"),
    ],
)
def test_a_wrong_override_is_one_line_with_the_nearest_match(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        check_overrides("config", arguments)
    assert "\n" not in str(error.value)


def test_right_overrides_and_sweeps_pass():
    check_overrides("config", ["-m", "fault=bf16_shift", "fault.bits=5,7", "seed=0,1"])


@pytest.mark.parametrize("module", ["experiments.train", "experiments.reproduce"])
def test_a_mistake_ends_a_command_with_one_line_and_exit_code_2(module, tmp_path):
    mistake = {"experiments.train": ["fault=bf16_shift", "fault.bits=9"], "experiments.reproduce": ["scale=desktop"]}
    done = subprocess.run(
        [sys.executable, "-m", module, *mistake[module], f"out={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_plan_has_every_run_once_with_disjoint_seeds():
    runs = plan(SEEDS, {"a": {"overrides": ["fault=bf16_shift"]}, "b": {"overrides": ["fault=none"]}}, ["mha_nano"])
    assert [run.role for run in runs].count("faulty") == 4
    assert {role: [r.role for r in runs].count(role) for role in SEEDS if role != "faulty"} == {
        "reference": 2,
        "calibration": 3,
        "test": 1,
    }
    seeds = {role: {r.seed for r in runs if r.role == role} for role in FIRST_SEED}
    assert sum(map(len, seeds.values())) == len(set().union(*seeds.values()))
    assert all(run.overrides[-1] == f"seed={run.seed}" for run in runs)


@pytest.mark.parametrize("seeds", [{**SEEDS, "other": 1}, {**SEEDS, "test": -1}, {**SEEDS, "faulty": 1001}])
def test_impossible_seed_numbers_are_errors(seeds):
    with pytest.raises(ValueError, match=r"scale\.seeds"):
        plan(seeds, {}, ["mha_nano"])


def test_every_model_has_all_the_runs_of_one():
    faults = {"a": {"overrides": ["fault=bf16_shift", "train.steps=9"]}}
    both = plan(SEEDS, faults, ["mha_nano", "moe_nano"], ["train.steps=5"])
    for model in ("mha_nano", "moe_nano"):
        assert [run for run in both if run.model == model] == plan(SEEDS, faults, [model], ["train.steps=5"])
    assert both[0].overrides == (
        "model=mha_nano", "train.steps=5", "fault=bf16_shift", "train.steps=9", f"seed={FIRST_SEED['faulty']}"
    )  # fmt: skip


@pytest.mark.parametrize("models", [[], ["mha_nano", "mha_nano"]])
def test_an_experiment_needs_distinct_models(models):
    with pytest.raises(ValueError, match=r"experiment.models=\["):
        plan(SEEDS, {}, models)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["model=mha_small"], "model=mha_small has no effect on an experiment: set experiment.models"),
        (["align=token"], "align=token is not allowed: steps or tokens"),
        (["seed=77"], r"seed=77 has no effect on an experiment: .* set scale\.seeds"),
        (["fault=none"], r"fault=none has no effect on an experiment: .* set .experiment\.faults"),
        (["experiment=natural_bf16", "train.steps=7"], "train.steps=7 has no effect on this experiment"),
    ],
)
def test_settings_that_an_experiment_would_not_use_are_errors(given, message):
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = OmegaConf.to_container(compose("reproduce", overrides=given), resolve=True)
    with pytest.raises(ValueError, match=message):
        chosen_experiment(settings, given)


@pytest.mark.parametrize("line", ["+modle.d_model=32", "++a.b=1", "+monitors=[loss]"])
def test_a_key_beside_those_of_the_configuration_is_refused(line):
    with pytest.raises(ValueError, match=r"has no effect: (modle|a|monitors) is not a key of the configuration"):
        check_overrides("config", [line])
    check_overrides("config", ["++model.d_model=32", "++hydra.verbose=false"])
