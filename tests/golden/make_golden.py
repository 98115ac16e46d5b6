"""Cut a finished experiment down to a golden one: python tests/golden/make_golden.py REPORT RUNS OUT

Keeps 4 reference, 9 calibration and 3 faulty runs with the signals of the detectors below, and writes
the table that scoring them gives. Run it again only when a table is meant to change, and read the difference.
"""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd

from analysis.experiment import load
from analysis.table import lead_table
from experiments import trace

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
        trace.write_manifest(target, manifest)
        rows = pd.read_parquet(source / "trace", filters=[("signal", "in", wanted)])
        rows["signal"] = rows["signal"].astype(str)
        trace.write_part(
            target, 0, manifest["steps_done"], {name: rows[name].to_numpy() for name in trace.SCHEMA.names}
        )
    lead_table(load(out, out / "runs")).to_csv(out / "expected.csv", index=False)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
