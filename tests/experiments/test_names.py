"""Names that become paths: none of them leaves its folder."""

import copy
import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foreshock.analysis.report import make_report
from foreshock.analysis.runs.conf import conf
from foreshock.analysis.runs.discover import find
from foreshock.analysis.runs.load import label_runs, load
from foreshock.experiments.build import ROOT
from foreshock.experiments.cli import CONF
from foreshock.experiments.names import check_index_names, check_name
from foreshock.experiments.reproduce import chosen_experiment
from foreshock.experiments.trace import TraceError

BAD = ["../../x", "a/b", "/etc/passwd", "..", ".", "", " ", "a\\b", "a\nb", "a\0b", "x" * 101, None, 7, ["a"], "end "]
INDEX = json.loads((ROOT / "results" / "reference_set" / "dense" / "experiment.json").read_text())
FIELDS = {
    "experiment.name": ("experiment", "name"),
    "scale.name": ("scale", "name"),
    "experiment.models": ("experiment", "models", 0),
    "run_id": ("runs", 0, "run_id"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_plain_file_name_is_refused_by_field_and_value(name):
    with pytest.raises(ValueError, match=r"scale.name=.* is not allowed: a plain file name") as error:
        check_name(name, "scale.name")
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["paper_attention", "dense d_model=16 (2)", "mine-2.1", "Größe", "7 bits"])
def test_plain_names_pass(name):
    assert check_name(name, "scale.name") == name


def broken(field):
    index = copy.deepcopy(INDEX)
    node = index
    *path, last = FIELDS[field]
    for key in path:
        node = node[key]
    node[last] = "../../x"
    return index


@pytest.mark.parametrize("field", FIELDS)
def test_an_index_is_refused_before_anything_is_read_or_written(field, tmp_path):
    check_index_names(INDEX)
    report = tmp_path / "a" / "b" / "report"
    report.mkdir(parents=True)
    (report / "experiment.json").write_text(json.dumps(broken(field)))
    before = sorted(tmp_path.rglob("*"))
    for command in (
        lambda: label_runs(broken(field), report),
        lambda: load(report, report),
        lambda: make_report(report, report),
        lambda: find(report),
    ):
        with pytest.raises((ValueError, TraceError), match=f"{field}='../../x' is not allowed: a plain file name"):
            command()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("field", ["experiment", "scale"])
def test_an_experiment_that_would_report_elsewhere_is_refused(field):
    with initialize_config_dir(CONF, version_base="1.3"):
        settings = OmegaConf.to_container(compose("reproduce"), resolve=True)
    assert chosen_experiment(settings, [])["name"] == "paper_attention"
    settings[field]["name"] = "../../x"
    with pytest.raises((ValueError, TraceError), match=f"{field}.name='../../x' is not allowed"):
        chosen_experiment(settings, [])


@pytest.mark.parametrize("name", ["../model/mha_nano", "ewmaa", "/etc/hosts", ".."])
def test_a_file_of_conf_is_chosen_by_its_name_alone(name):
    with pytest.raises(ValueError, match=r"rule=.* is not allowed: one of adwin, cusum"):
        conf("rule", name)
