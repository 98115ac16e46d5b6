"""A report kind is one file, found by its name; its page holds names out of files as text."""

from pathlib import Path

import pandas as pd
import pytest

from foreshock.analysis.reports.kinds import by_name
from foreshock.analysis.reports.kinds.by_name import DRAWINGS, KINDS, kind_of
from foreshock.analysis.reports.page import TEMPLATES, verdict


def test_every_kind_is_a_file_of_its_name():
    files = {path.stem for path in Path(by_name.__file__).parent.glob("*.py")}
    assert files - {"__init__", "base", "by_name"} == set(KINDS) == set(DRAWINGS) - {"cases"}
    assert all(type(kind).__module__.endswith(f".{name}") for name, kind in KINDS.items())


def test_a_kind_says_what_it_needs():
    needs = {name: kind.needs for name, kind in KINDS.items()}
    assert needs["grid"] == ("healthy_cell",) and needs["paired"] == ("control", "drift") and needs["central"] == ()
    assert [name for name, kind in KINDS.items() if kind.by_size] == ["early_warning", "smallest"]


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"experiment\.draw='pie' is not allowed: one of central, .*smallest"):
        kind_of({"experiment": {"draw": "pie"}})


def test_a_page_without_claims_and_views_is_still_a_page():
    names = {"title": "<b>", "headlines": ["a & b"], "figures": [("x < y", "AA==")], "provenance": {"<k>": "v"}}
    page = TEMPLATES.get_template("report.html.j2").render(**names, claims=[], views=[])
    assert "&lt;b&gt;" in page and "a &amp; b" in page and "x &lt; y" in page and "&lt;k&gt;" in page
    assert "claims</h2>" not in page and page.strip().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("holds", "words"), [(True, "holds"), (False, "does not hold"), (None, "no verdict"), (pd.NA, "no verdict")]
)
def test_a_verdict_is_words(holds, words):
    assert verdict(holds) == words
