"""Sizes of an experiment by scale: its own row, a scale's or a command line's own numbers, and what is said without."""

import pytest
from hydra import compose, initialize_config_dir

from foreshock.experiments.cli import CONF
from foreshock.experiments.reproduce import chosen_experiment
from foreshock.experiments.settings import check_sizes, resolved

EXPERIMENT = """# @package _global_
defaults: [fault_sites@experiment, _self_]
sizes_by_scale:
  laptop: {steps: 50, bits: 3}
  desk: {steps: 70, bits: 3}
experiment:
  name: mine
  overrides: ["train.steps=${sizes.steps}"]
"""
SIZES = "localise: {steps: 9, onset: 5, every_steps: 1, rows: 1}"
SCALES = {
    "from_desk": "# @package _global_\ndefaults: [desk]\nscale: {name: from_desk}\n",
    "new": "# @package _global_\ndefaults: [desk]\nscale: {name: new, sizes: new}\n",
    "whole": f"# @package _global_\ndefaults: [desk]\nscale: {{name: whole, sizes: whole, {SIZES}}}\n",
}


@pytest.fixture
def settings_of(tmp_path):
    """Settings of a command line, with an experiment and scales of one's own."""
    for path, content in {"experiment/mine": EXPERIMENT, **{f"scale/{n}": c for n, c in SCALES.items()}}.items():
        file = tmp_path / f"{path}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)

    def settings(*given):
        with initialize_config_dir(CONF, version_base="1.3"):
            return resolved(compose("reproduce", [f"hydra.searchpath=[file://{tmp_path}]", *given]))

    return settings


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (["scale=laptop"], 50),
        (["scale=desk"], 70),
        (["scale=published"], 70),
        (["scale=from_desk"], 70),
        (["scale=gpu", "scale.sizes=desk"], 70),
        (["scale=gpu", "+sizes_by_scale.gpu={steps: 8, bits: 1}"], 8),
        (["sizes_by_scale.laptop.steps=6"], 6),
    ],
)
def test_an_experiment_of_one_s_own_takes_its_row(settings_of, given, steps):
    assert settings_of("experiment=mine", *given)["experiment"]["overrides"] == [f"train.steps={steps}"]


@pytest.mark.parametrize("scale", ["gpu", "new"])
def test_a_scale_without_a_row_is_named_with_those_that_there_are(settings_of, scale):
    with pytest.raises(ValueError, match=rf"scale\.sizes='{scale}' .*: mine has sizes for laptop, desk") as error:
        settings_of("experiment=mine", f"scale={scale}")
    assert f"'+sizes_by_scale.{scale}={{steps: ..., bits: ...}}'" in str(error.value) and "\n" not in str(error.value)


def test_a_row_that_lacks_a_size_is_named(settings_of):
    with pytest.raises(ValueError, match=r"sizes_by_scale\.gpu\.steps is missing: mine needs it at every scale"):
        settings_of("experiment=mine", "scale=gpu", "+sizes_by_scale.gpu={bits: 1}")


def test_a_scale_may_give_an_experiment_its_sizes_itself(settings_of):
    settings = settings_of("experiment=localise", "scale=whole")
    assert settings["scale"]["localise"] == {"steps": 9, "onset": 5, "every_steps": 1, "rows": 1}
    assert "train.steps=9" in settings["experiment"]["overrides"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"steps": 0}, r"sizes\.steps=0 is not allowed: at least 1"),
        ({"warm_steps": 1.5}, r"sizes\.warm_steps=1\.5 is not allowed: .*integer"),
        ({"ramp": {"onset": -1}}, r"sizes\.ramp\.onset=-1 is not allowed: at least 0"),
        ({"batch_steps": {"half": True}}, r"sizes\.batch_steps\.half=True is not allowed"),
        ({"seeds": 1001}, r"sizes\.seeds=1001 is not allowed: at most 1000"),
        ({"slow_seeds": -1}, r"sizes\.slow_seeds=-1 is not allowed: at least 0"),
        ({"monitors": ["loss", "loss"]}, r"sizes\.monitors=.* is not allowed: loss stands there twice"),
        ({"steps": float("nan")}, r"sizes\.steps=nan is not allowed: a finite number"),
    ],
)
def test_a_size_is_judged_by_its_name(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(sizes, "sizes")


def test_sizes_that_may_be_pass():
    check_sizes({"steps": 1, "onset": 0, "rows": 0, "monitors": None, "grid_steps": {"x": 3}, "bits": 2.5}, "sizes")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["experiment=early_warning", "+scale.early_warning.onsett=3"], r"onsett is not a key .* 'onset'"),
        (["experiment=early_warning_small", "scale.seeds.test=9"], r"scale\.seeds\.test=9 has no effect on this .*"),
        (["experiment=early_warning_small", "experiment.only=[o9]"], r"experiment\.only='o9' is not allowed: .* 'o8'"),
        (["experiment=early_warning_small", "experiment.only=[]"], r"experiment\.only=\[\] is not allowed: not empty"),
        (["experiment=early_warning_small", "experiment.only=[o2,o2]"], r"experiment\.only=.* o2 stands there twice"),
    ],
)
def test_what_no_run_takes_up_is_an_error(settings_of, given, message):
    with pytest.raises(ValueError, match=message):
        chosen_experiment(settings_of(*given), given)


def test_only_chosen_faults_are_run(settings_of):
    given = ["experiment=early_warning_small", "experiment.only=[late2,o2]"]
    chosen = chosen_experiment(settings_of(*given), given)
    assert list(chosen["faults"]) == ["o2", "late2"] and "only" not in chosen
    assert len(chosen_experiment(settings_of(given[0], "experiment.only=null"), given[:1])["faults"]) == 24
