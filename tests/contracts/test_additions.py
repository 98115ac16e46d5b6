"""One new Python file and one YAML add a fault, a monitor or an experiment, from a folder outside the clone too.

``test_additions_to_analysis`` adds a detector, a rule, a track and a kind of report.
"""

import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from foreshock.experiments.build import ROOT, build_run
from foreshock.experiments.cli import check_overrides
from tests.contracts.added import MONITOR

FAULT = """
from dataclasses import dataclass, replace

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard


@dataclass(frozen=True)
class LRFlicker(WindowedFault):
    factor: float

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        return replace(healthy, lr_scale=healthy.lr_scale.times(self.factor))

    def describe(self) -> InjectionCard:
        injection = self.injection("scale", where={"point": "lr_scale"}, size={"factor": self.factor})
        return InjectionCard(self.family, (injection,))
"""
FILES = {
    "my_fault.py": FAULT,
    "my_monitor.py": MONITOR,
    "conf/fault/lr_flicker.yaml": (
        "_target_: my_fault.LRFlicker\nfactor: 10.0\nonset: 5\nduration: 5\nevery: 2\nfamily: schedule\n"
    ),
    "conf/monitor/last_loss.yaml": ("# @package monitor.last_loss\n_target_: my_monitor.LastLoss\nevery_steps: 10\n"),
}
PLUGINS = "plugins=[my_fault,my_monitor]"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of one's own, whose modules can be imported and whose conf/ is given by ``--config-dir``."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    experiment = (ROOT / "conf/experiment/fault_sites.yaml").read_text().replace("name: fault_sites", "name: my_sites")
    (tmp_path / "conf/experiment").mkdir()
    (tmp_path / "conf/experiment/my_sites.yaml").write_text(experiment)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "conf"
    for module in ("my_fault", "my_monitor"):
        sys.modules.pop(module, None)


@pytest.fixture
def run_with(mine, text, tiny):
    def build(*overrides: str, folders: str = f"file://{mine}"):
        given = [f"hydra.searchpath=[{folders}]", "data=text", f"data.path={text}", *tiny, *overrides]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return build_run(compose("config", given))

    return build


def test_a_fault_and_a_monitor_from_outside_build_and_rename_no_run(run_with):
    before = run_with("monitor=[loss]", folders="").run_id
    faulty = run_with("fault=lr_flicker", "monitor=[loss,last_loss]", PLUGINS)
    assert type(faulty.fault).__module__ == "my_fault" and "last_loss" in faulty.monitors
    healthy = faulty.healthy_sites()
    assert faulty.fault.sites(0, healthy) == healthy != faulty.fault.sites(5, healthy)
    assert run_with("monitor=[loss,last_loss]", PLUGINS).run_id == before
    assert run_with("monitor=[loss]").run_id == before


def test_a_class_from_outside_needs_its_module_among_the_plugins(run_with):
    with pytest.raises(ValueError, match="my_fault"):
        run_with("fault=lr_flicker")


def test_commands_take_a_configuration_folder_of_ones_own(mine):
    check_overrides("config", ["--config-dir", str(mine), "fault=lr_flicker", PLUGINS])
    check_overrides("reproduce", [f"--config-dir={mine}", "experiment=my_sites"])
    with pytest.raises(ValueError, match="lr_flicker"):
        check_overrides("config", ["fault=lr_flicker", PLUGINS])
    with pytest.raises(ValueError, match="there is no such folder"):
        check_overrides("config", ["--config-dir", str(mine / "none"), "fault=none"])


def test_an_experiment_from_outside_is_composed_under_its_own_name(mine):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = compose("reproduce", [f"hydra.searchpath=[file://{mine}]", "experiment=my_sites"])
    assert OmegaConf.select(settings, "experiment.name") == "my_sites"


def test_a_mistake_beside_files_of_ones_own_is_the_one_that_is_named(mine):
    given = ["--config-dir", str(mine), "fault=lr_flicker", PLUGINS]
    with pytest.raises(ValueError, match=r"train\.stepz is not a key of the configuration"):
        check_overrides("config", [*given, "train.stepz=5"])
    with pytest.raises(ValueError, match=r"fault=lr_fliker is not an option of fault \(did you mean 'lr_flicker'"):
        check_overrides("config", ["--config-dir", str(mine), "fault=lr_fliker", PLUGINS])


@pytest.mark.parametrize(("group", "name"), [("fault", "none"), ("monitor", "all")])
def test_a_file_of_ones_own_needs_a_name_that_conf_has_not(mine, group, name):
    (mine / group / f"{name}.yaml").write_text("_target_: my_fault.LRFlicker\nfactor: 2.0\n")
    said = rf"{group}/{name}\.yaml is not allowed: {group}={name} is there already; give yours another name$"
    with pytest.raises(ValueError, match=said):
        check_overrides("config", ["--config-dir", str(mine), PLUGINS])
