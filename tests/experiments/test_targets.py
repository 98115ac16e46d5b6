"""What a configuration may name: classes that the project or a listed plugin defines, and nothing else is imported."""

import sys

import pytest

from foreshock.experiments.cli import check_overrides
from foreshock.experiments.targets import check_targets, target_class

PLUGIN = """
from foreshock.faults.card import InjectionCard
import subprocess
from dataclasses import dataclass
print("imported")

@dataclass(frozen=True)
class Odd:
    onset: int = 3
    def sites(self, step, healthy):
        return healthy
    def describe(self):
        return InjectionCard("other")

class Half:
    onset = 3
    def sites(self, step, healthy):
        return healthy
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "odd_faults.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "odd_faults"
    sys.modules.pop("odd_faults", None)


@pytest.mark.parametrize(
    "config",
    [
        {"fault": {"_target_": "subprocess.Popen"}},
        {"fault": {"faults": {"x": {"_target_": "os.system"}}}},
        {"model": {"moe": {"_target_": "builtins.eval"}}},
        {"monitor": {"loss": {"_target_": "odd_faults.Odd"}}},
        {"rule": {"charts": [{"_target_": "faultsy.base.Window"}]}},
        {"data": {"_target_": "faults"}},
        {"fault": {"_target_": "analysis.detect.isolation.Worker", "path": "mine.py"}},
        {"fault": {"faults": {"x": {"_target_": "experiments.training.data.Corpus"}}}},
        {"model": {"_target_": "monitors.loss.Loss"}},
        {"train": {"_target_": ["faults.none.NoFault"]}},
    ],
)
def test_a_class_from_elsewhere_is_refused_at_any_depth_before_anything_is_imported(config, plugin, capsys):
    with pytest.raises(ValueError, match=r"_target_=.* is not allowed: .*(plugins=\[\]|defines no class)"):
        check_targets(config)
    assert plugin not in sys.modules and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("experiments.training.manifest.subprocess.Popen", "cannot be loaded"),
        ("faults.base.os.system", "cannot be loaded"),
        ("experiments.training.manifest.subprocess", "defines no class subprocess"),
        ("faults.bf16_shift.AttentionNumerics", "defines no class AttentionNumerics"),
        ("experiments.cli.check_overrides", "defines no class check_overrides"),
        ("faults.bf16_shift.BF16Shfit", "did you mean 'faults.bf16_shift.BF16Shift'"),
    ],
)
def test_what_a_module_merely_imported_is_not_its_own(target, message):
    group = "data" if target.startswith("experiments") else "fault"
    with pytest.raises(ValueError, match=f"{group}._target_='{target}' .*{message}"):
        check_targets({group: {"_target_": target}})


def test_a_plugin_s_own_class_is_allowed_and_what_it_imported_is_not(plugin):
    check_targets({"fault": {"_target_": "odd_faults.Odd"}}, [plugin])
    assert target_class("odd_faults.Odd", "fault._target_").__name__ == "Odd"
    with pytest.raises(ValueError, match=r"odd_faults.subprocess.Popen' cannot be loaded"):
        check_targets({"fault": {"_target_": "odd_faults.subprocess.Popen"}}, [plugin])


@pytest.mark.parametrize("plugins", ["odd_faults", [1], ["../odd"], [""]])
def test_plugins_are_a_list_of_module_names(plugins):
    with pytest.raises(ValueError, match=r"plugins=.* is not allowed: a list of module names"):
        check_targets({}, plugins)


def test_a_run_takes_a_plugin_by_the_key(make_run, plugin):
    overrides = ["fault=none", "fault._target_=odd_faults.Odd"]
    with pytest.raises(ValueError, match=r"fault._target_='odd_faults.Odd' is not allowed"):
        make_run(*overrides)
    overrides = [*overrides, f"plugins=[{plugin}]"]
    run = make_run(*overrides)
    assert run.fault.onset == 3 and "plugins" not in run.config
    with pytest.raises(ValueError, match="it makes a Half, and a Fault is needed: it has no describe"):
        make_run(*overrides, "fault._target_=odd_faults.Half")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fault=none", "fault._target_=faults.base.LearningRateScale"], "fault._target_ .* a Fault is needed"),
        (["fault=combined", "+fault.faults.x={_target_: faults.window.Window}"], "fault.faults.x._target_ .* Window"),
        (["fault=none", "fault._target_=monitors.loss.Loss"], "fault._target_='monitors.loss.Loss' is not allowed"),
        (["+model.moe={_target_: models.transformer.Rotary}"], "model.moe"),
        (["+monitor.x={_target_: monitors.base.Lookback}"], "monitor.x"),
        (["train._target_=experiments.training.data.DataConfig"], "train."),
    ],
)
def test_a_class_of_another_kind_is_refused_by_field(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)


@pytest.mark.parametrize(
    "line",
    [
        "+hydra.callbacks.x._target_=os.system",
        "hydra.launcher._target_=subprocess.Popen",
        "+hydra={callbacks:{x:{_target_:pathlib.Path.touch}}}",
        "++hydra@hydra={launcher:{_target_:os.system}}",
    ],
)
def test_hydra_itself_takes_no_class_from_the_command_line(line):
    with pytest.raises(ValueError, match=r"_target_.* is not allowed"):
        check_overrides("config", [line])
