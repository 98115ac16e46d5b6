"""The committed tables say what their counts give."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from foreshock.analysis.locate.localise import shares_right
from foreshock.analysis.scores.inference import CHANCE, chance_of_alarms

RESULTS = Path(__file__).parents[3] / "results"
CLAIMS = sorted(RESULTS.glob("*/claims.csv"))
ALARMS = re.compile(r"in (\d+) of (\d+) runs.*\(by chance ([^)]+)\)", re.DOTALL)


def test_there_are_claims():
    assert len(CLAIMS) >= 10


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.parent.name)
def test_alarms_are_held_against_one_shared_threshold(path):
    index = json.loads((path.parent / "experiment.json").read_text())
    should = {claim["says"]: claim["alarms"]["should"] for claim in index["experiment"]["claims"] if "alarms" in claim}
    calibration, alpha = index["scale"]["seeds"]["calibration"], index["scale"]["alpha"]
    for row in pd.read_csv(path).itertuples():
        if found := ALARMS.search(row.measured):
            chance = chance_of_alarms(int(found[1]), int(found[2]), calibration, alpha)
            assert found[3] == f"{chance:.2g}", row.claim
            assert row.holds == ((chance < CHANCE) == should[row.claim]), row.claim
        else:
            assert "p at most" in row.measured, row.claim


@pytest.mark.parametrize("name", ["localise-desk", "localise-60-steps"])
def test_places_are_counted_by_fault(name):
    runs = pd.read_csv(RESULTS / name / "localisation.csv")
    stated = pd.read_csv(RESULTS / name / "confusion.csv").set_index("true")
    counted = shares_right(runs)
    pd.testing.assert_frame_equal(
        stated[list(counted.columns)], counted.loc[stated.index], check_dtype=False, check_names=False, rtol=1e-5
    )
