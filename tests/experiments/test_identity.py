"""What renames a run, and what does not."""

import os
import sys

import pytest

from foreshock.experiments.build import ROOT
from foreshock.experiments.training import equivalences, source_code
from foreshock.experiments.training.identity import (
    CONTRACT,
    INSTRUMENTS,
    TOLD,
    fault_sources,
    monitor_sources,
    training_sources,
    trajectory_sources,
    without_labels,
)
from foreshock.experiments.training.source_code import closure_of, meaning_of

SOURCE = '''
def scaled(x: float, by: float = 2.0) -> float:
    """Twice as much."""
    return x * by
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Twice as much.", "The double."),
        ('    """Twice as much."""\n', ""),
        ("x: float, by: float = 2.0) -> float", "x, by=2.0)"),
        ("return x * by", "return (x * by)  # a comment"),
    ],
)
def test_words_change_no_meaning(old, new):
    assert old in SOURCE and meaning_of(SOURCE) == meaning_of(SOURCE.replace(old, new))


@pytest.mark.parametrize(("old", "new"), [("2.0", "3.0"), ("x * by", "by * x"), ("scaled", "doubled")])
def test_whatever_else_is_written_is_meaning(old, new):
    assert meaning_of(SOURCE) != meaning_of(SOURCE.replace(old, new))


def test_an_annotation_outside_a_class_is_none():
    assert meaning_of("K: int = 3\nx: str") == meaning_of("K = 3")
    assert meaning_of("def f():\n    x: int = 1\n    return x") == meaning_of("def f():\n    x = 1\n    return x")


def test_a_field_of_a_dataclass_is_meaning():
    assert meaning_of("class A:\n    x: int = 1") != meaning_of("class A:\n    x = 1")


def names(files):
    return {name for name, _ in files}


@pytest.mark.parametrize(("stacked", "engine"), [("1", "single_engine"), ("2", "stacked_engine")])
def test_every_module_that_an_engine_runs_is_a_source_or_named_as_none(make_run, stacked, engine):
    """But for kernels of other backends and what monitors share, which an engine hands on."""
    run = make_run(f"train.stack={stacked}", "model.backend=reference")

    def ours(name, path):
        return name.split(".")[0] in ("experiments", "faults", "models")

    imported = {path for _, path in closure_of(f"experiments.training.{engine}", ours)}
    known = {path for _, path in training_sources(run.nodes)}
    left_out = {path.name.removesuffix(".py") for path in imported - known if path.parent.name == "models"}
    flash = {name for name in left_out if name.startswith("flash") or name == "tiles"}
    assert left_out - flash <= {*INSTRUMENTS, "stacked", "compiled"}
    rest = {path for path in imported - known if path.parent.name != "models" and path.name != "__init__.py"}
    looks_on = {path for path in rest if path.parent.name == "anatomies"}
    assert {f"{path.parent.name}.{path.stem}" for path in rest - looks_on} <= set(TOLD)


def test_another_fault_or_monitor_is_no_source_of_a_run(make_run):
    sources = names(trajectory_sources(make_run("fault=bf16_shift").nodes))
    assert "faults.bf16_shift" in sources
    assert not {name for name in sources if name.startswith("monitors")} and "faults.lr_scale" not in sources


def test_a_phase_of_zero_is_in_no_name_and_any_other_is(make_run):
    runs = [make_run("fault=bf16_shift", "fault.every=4", *more) for more in ([], ["fault.window_phase=1"])]
    fault = dict(runs[0].config["fault"])
    assert fault.pop("window_phase") == 0
    assert without_labels(runs[0].config["fault"]) == without_labels(fault)
    assert runs[0].run_id != runs[1].run_id


def test_all_layers_of_a_frozen_router_are_in_no_name_and_a_layer_is(make_run):
    runs = [make_run("model=moe_nano", "fault=router_frozen", *more) for more in ([], ["fault.layers=[0]"])]
    fault = dict(runs[0].config["fault"])
    assert fault.pop("layers", 0) is None
    assert without_labels(runs[0].config["fault"]) == without_labels(fault)
    assert runs[0].run_id != runs[1].run_id
    other = {"_target_": "faults.bf16_shift.BF16Shift", "layers": None}
    assert without_labels(other) == other


def test_faults_inside_a_fault_are_sources(make_run):
    assert {"faults.combined", "faults.bf16_shift", "faults.lr_scale"} <= names(
        fault_sources(make_run("fault=combined").nodes["fault"])
    )


def test_kernels_of_another_backend_are_no_sources(make_run):
    reference = names(training_sources(make_run("model.backend=reference").nodes))
    assert "models.attention" in reference and "models.flash_forward" not in reference
    triton = {"model": {"backend": "triton"}, "train": {"stack": 1, "compile": False}}
    assert "models.flash_forward" in names(training_sources(triton))


def test_a_monitor_s_mathematics_are_its_sources_and_the_contract_is_not():
    sources = names(monitor_sources("monitors.attention_laws"))
    assert {"monitors.attention_laws", "monitors.conservation", "monitors.attention_twin"} <= sources
    assert not sources & set(CONTRACT) and "monitors.router" not in sources


def test_data_that_is_spelled_otherwise_is_the_same(make_run, text, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    spellings = [str(text), os.path.relpath(text), f"{text.parent}/./{text.name}", str(copy)]
    assert len({make_run(f"data.path={path}").run_id for path in spellings}) == 1


PLUGIN = """
from dataclasses import dataclass, replace
from foreshock.faults.base import WindowedFault
from foreshock.faults.card import InjectionCard
from {helper} import FACTOR
@dataclass(frozen=True, kw_only=True)
class Mine(WindowedFault):
    def sites(self, step, healthy):
        return replace(healthy, lr_scale=healthy.lr_scale.times(FACTOR))
    def describe(self):
        return InjectionCard(self.family, (self.injection("scale", {"point": "lr_scale"}, {"factor": FACTOR}),))
"""


@pytest.mark.parametrize("edited", ["mine_{}.py", "helper_{}.py"])
def test_an_edited_fault_from_elsewhere_renames_its_runs_and_no_other(make_run, tmp_path, monkeypatch, edited):
    def run_ids(number, text_of):
        own = tmp_path / str(number)
        own.mkdir()
        for name, text in text_of.items():
            (own / name.format("x")).write_text(text)
        monkeypatch.syspath_prepend(str(own))
        for module in ("mine_x", "helper_x"):
            sys.modules.pop(module, None)
        mine = ["plugins=[mine_x]", "fault=none", "fault._target_=mine_x.Mine"]
        return make_run(*mine).run_id, make_run("fault=bf16_shift").run_id

    texts = {"mine_{}.py": PLUGIN.replace("{helper}", "helper_x"), "helper_{}.py": "FACTOR = 2.0\n"}
    mine, other = run_ids(0, texts)
    assert run_ids(1, {**texts, edited: texts[edited] + "# a comment\n"}) == (mine, other)
    changed, still = run_ids(2, {**texts, edited: texts[edited] + "EXTRA = 1\n"})
    assert changed != mine and still == other


def test_sources_that_are_known_to_train_alike_keep_their_runs(make_run, monkeypatch, tmp_path):
    monkeypatch.setattr(equivalences, "EQUIVALENCES", tmp_path / "equivalences.json")
    before = make_run().identity["source_sha256"]
    equivalences.add("new", before, evidence={"steps": 200})
    equivalences.add("newer", "new", evidence={"steps": 200})
    assert equivalences.canonical("newer") == equivalences.canonical("new") == before
    equivalences._older.cache_clear()
    assert source_code.ROOT == ROOT


def test_a_plugin_s_relative_imports_and_what_it_inherits_are_its_sources(tmp_path, monkeypatch):
    (tmp_path / "mypkg").mkdir()
    for name, text in {
        "__init__": "",
        "f": "from .helper import FACTOR\nfrom . import other\nfrom faults.gradient_scale import GradientScale\n",
        "helper": "FACTOR = 2\n",
        "other": "",
    }.items():
        (tmp_path / "mypkg" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    sources = names(fault_sources({"_target_": "mypkg.f.Mine"}))
    assert {"mypkg.f", "mypkg.helper", "mypkg.other", "faults.gradient_scale", "faults.corrupt"} <= sources
