"""Cut finished runs down to golden ones, and write the table that scoring them gives.

    python tests/golden/make_golden.py REPORT RUNS OUT    # an experiment's traces and its lead-time table
    python tests/golden/make_golden.py REDUCED OUT        # a reduced folder and its leaderboard
    python tests/golden/make_golden.py                    # the two tables again, of the golden runs that are there

Keeps 4 reference, 9 calibration and 3 runs of each fault (of a reduced folder also 3 healthy test runs) with the
signals of a few detectors. Run it again only when a table is meant to change, and read the difference.
"""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd

from foreshock.analysis import reduced
from foreshock.analysis.runs.load import load
from foreshock.analysis.scores.contest import contest, run_scores
from foreshock.analysis.scores.leaderboard import board
from foreshock.analysis.scores.table import lead_table
from foreshock.experiments import trace

KEEP = {"reference": 4, "calibration": 9, "test": 0, "faulty": 3}
DETECTORS = {
    "Delta2 entropy": ["qk_delta2_spectrum.entropy.w50"],
    "Delta W entropy": ["delta_w_spectral_entropy.q.w50", "delta_w_spectral_entropy.k.w50"],
}


def main(report: Path, runs: Path, out: Path) -> None:
    index = json.loads((report / "experiment.json").read_text())
    index["runs"] = [
        cell
        for role, count in KEEP.items()
        for cell in sorted((c for c in index["runs"] if c["role"] == role), key=lambda c: c["seed"])[:count]
    ]
    index["scale"] |= {"alpha": 0.10, "seeds": KEEP}
    index["experiment"] |= {"detectors": DETECTORS, "baseline": "Delta W entropy"}
    index["experiment"]["figure"] = {"held-out loss": ["held_out_loss"], **DETECTORS}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "experiment.json").write_text(json.dumps(index, indent=1) + "\n")
    wanted = ["held_out_loss", *(name for names in DETECTORS.values() for name in names)]
    for cell in index["runs"]:
        source, target = runs / cell["run_id"], out / "runs" / cell["run_id"]
        target.mkdir(parents=True)
        manifest = trace.read_manifest(source)
        manifest["signals"] = {name: manifest["signals"][name] for name in wanted}
        rows = pd.read_parquet(source / "trace", filters=[("signal", "in", wanted)])
        rows["signal"] = rows["signal"].astype(str)
        columns = {name: rows[name].to_numpy() for name in trace.SCHEMA.names}
        manifest["files"] = trace.write_part(target, 0, manifest["steps_done"], columns)
        trace.write_manifest(target, manifest)
    golden_leads(out).to_csv(out / "expected.csv", index=False)


def golden_leads(folder: Path) -> pd.DataFrame:
    """The lead-time table of a folder of golden runs."""
    return lead_table(contest(load(folder, folder / "runs"), "reference", singles=True))


REDUCED_KEEP = {"reference": 4, "calibration": 9, "test": 3, "faulty": 3}
REDUCED_DETECTORS = ("Delta2 entropy", "Delta W Tracy-Widom", "routing entropy")  # and the baselines


def main_reduced(source: Path, out: Path) -> None:
    index = json.loads((source / "experiment.json").read_text())
    index["runs"] = [
        cell
        for fault in (None, *index["experiment"]["faults"])
        for role, count in REDUCED_KEEP.items()
        for cell in [c for c in index["runs"] if (c["role"], c["fault"]) == (role, fault)][:count]
    ]
    index["scale"] |= {"alpha": 0.10}
    detectors = index["experiment"]["detectors"]
    index["experiment"]["detectors"] = {
        name: detectors[name] for name in (*index["experiment"]["baseline"], *REDUCED_DETECTORS)
    }
    runs = reduced.read(source)
    kept = [runs[cell["run_id"]] for cell in index["runs"]]
    shutil.rmtree(out, ignore_errors=True)
    reduced.write(index, kept, {run.run_id: run.manifest["labels"] for run in kept}, out)
    golden_leaderboard(out).to_csv(out / "expected.csv", index=False)


def golden_leaderboard(folder: Path) -> pd.DataFrame:
    """The boards of the reference, self and floor tracks of a reduced folder."""
    experiment = load(folder, folder)
    contests = [contest(experiment, track) for track in ("reference", "self", "floor")]
    return pd.concat([board(one, run_scores(one)) for one in contests], ignore_index=True)


def main_tables() -> None:
    here = Path(__file__).parent
    attention, reference_set = here / "paper_attention", here / "reference_set"
    lead_table(contest(load(attention, attention / "runs"), "reference", singles=True)).to_csv(
        attention / "expected.csv", index=False
    )
    golden_leaderboard(reference_set).to_csv(reference_set / "expected.csv", index=False)


if __name__ == "__main__":
    {4: main, 3: main_reduced, 1: main_tables}[len(sys.argv)](*(Path(argument) for argument in sys.argv[1:]))
