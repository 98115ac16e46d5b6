"""``foreshock faults`` lists every file of conf/fault, and the page of the docs is what it makes today."""

import dataclasses
import re

import pytest

from foreshock.experiments import faults
from foreshock.experiments.build import ROOT
from foreshock.faults.base import Sites
from foreshock.faults.card import FAMILIES


@pytest.fixture(scope="module")
def rows():
    return faults.rows()


def test_every_fault_says_what_it_breaks_where_and_when_it_fits(rows):
    files = {path.stem for path in (ROOT / "conf" / "fault").glob("*.yaml")} - {"none"}
    assert {row.name for row in rows} == files
    points = {field.name for field in dataclasses.fields(Sites)}
    for row in rows:
        assert row.what and row.text and row.points and set(row.points) <= points and row.family in FAMILIES, row.name
    needs = {row.name: row.needs for row in rows}
    expected = {
        "expert_dead": "experts",
        "rope_bf16": "RoPE",
        "gradient_bf16_accumulation": "micro-batches",
        "lr_scale": "",
    }
    assert {name: needs[name] for name in expected} == expected
    reports = {row.name: row.report for row in rows}
    assert reports["mask_shift"] == "huggingface/transformers #31673; keras #23038"


def test_a_dose_that_the_fault_cannot_have_is_named():
    node = {"_target_": "faults.label_noise.LabelNoise", "share": 0.1, "doses": [{"share": 0.2}, {"share": 1.5}]}
    with pytest.raises(
        ValueError, match=r"^conf/fault/mine\.yaml: doses: share=1\.5: fault\.share=1\.5 is not allowed"
    ):
        faults._check_doses("mine", node)


def test_the_page_of_the_docs_is_of_today(rows):
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert page == faults.markdown(rows), "run: foreshock faults markdown=docs/faults.md"


def test_filters_choose(rows):
    assert {row.name for row in faults.chosen(rows, {"point": "clip"})} == {"clip_off", "clip_scope"}
    assert {row.family for row in faults.chosen(rows, {"family": "data", "needs": "none"})} == {"data"}
    with pytest.raises(
        ValueError, match=re.escape("family='date' is not allowed: one of attention_numerics, benign, combined, data")
    ):
        faults.chosen(rows, {"family": "date"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["clip_scop"], "the nearest are 'clip_scope', 'clip_off'"),
        (
            ["familly=data"],
            "option='familly' is not allowed: one of family, point, needs, markdown; the nearest is 'family'",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        faults.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and len(error.splitlines()) == 1


def test_one_fault_is_shown_whole(capsys):
    faults.main(["clip_scope"])
    said = capsys.readouterr().out
    assert "Equation:" in said and "scope: tensor" in said
