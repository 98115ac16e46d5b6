"""A run from elsewhere as a trace: manifest and one Parquet part, as ``experiments.trace`` reads them; no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.experiments import trace
from foreshock.experiments.elsewhere.readings import Readings
from foreshock.experiments.names import check_name
from foreshock.experiments.trace import ELSEWHERE, Series
from foreshock.monitors.signal import Signal


@dataclass(frozen=True)
class ImportedRun:
    """A run that was trained elsewhere. Runs of one cell are seed twins: alike in all but the seed.

    role: of ``experiments.plan``, or ``faulty``; None lets scoring find it by the run's own loss. source: format, file,
    its SHA-256, the run's name there and the column of every signal.
    """

    run_id: str
    cell: str
    seed: int
    role: str | None
    signals: Mapping[str, Signal]
    readings: Mapping[str, Readings]
    source: Mapping[str, Any]

    @property
    def last_step(self) -> int:
        return max(int(readings.steps[-1]) for readings in self.readings.values())

    def described(self) -> dict[str, dict[str, Any]]:
        """Every signal as a manifest has it, at the cadence of its readings."""
        return {
            name: asdict(replace(self.signals[name], every_steps=readings.every_steps))
            for name, readings in self.readings.items()
        }

    def manifest(self) -> dict[str, Any]:
        """The manifest, without ``files``. What nobody knows of a run from elsewhere is said to be ``elsewhere``."""
        failed = self.role == "faulty"
        first = min(int(readings.steps[0]) for readings in self.readings.values())
        return {
            "schema": trace.SCHEMA_VERSION,
            "run_id": self.run_id,
            "seed": self.seed,
            "config": {
                "train": {"steps": self.last_step},
                "model": {"cell": self.cell, "d_model": None, "moe": None},
                "data": {},
                "seed": self.seed,
                "fault": {"_target_": "elsewhere.Failure" if failed else "faults.none.NoFault"},
            },
            "onset_step": first if failed else None,
            "signals": self.described(),
            "end_reason": "completed",
            "steps_done": self.last_step,
            "tokens_done": max(int(readings.tokens[-1]) for readings in self.readings.values()),
            "source_sha256": ELSEWHERE,
            "data_sha256": ELSEWHERE,
            "torch": ELSEWHERE,
            "git_commit": None,
            "git_dirty": None,
            "versions": {},
            "device": ELSEWHERE,
            ELSEWHERE: {**self.source, "cell": self.cell, "role": self.role},
        }

    def series(self) -> dict[str, Series]:
        """The signals as a trace gives them."""
        return {
            name: Series(r.steps, r.tokens, r.values[:, None, None], np.zeros((len(r.steps), 1, 1), bool))
            for name, r in self.readings.items()
        }

    def check_free(self, out: Path) -> None:
        """Raises ValueError where ``out`` has a run of this name, or the name is no file's."""
        folder = out / check_name(self.run_id, "run_id")
        if folder.exists():
            raise ValueError(f"{folder} is there already: remove it, or import into another folder")

    def write(self, out: Path) -> Path:
        """Write the run's folder into ``out``. Raises ValueError as ``check_free`` does."""
        self.check_free(out)
        folder = out / self.run_id
        folder.mkdir(parents=True)
        columns: dict[str, np.ndarray] = {
            "step": np.concatenate([r.steps for r in self.readings.values()]),
            "tokens": np.concatenate([r.tokens for r in self.readings.values()]),
            "signal": np.repeat([*self.readings], [len(r.steps) for r in self.readings.values()]).astype(object),
            "value": np.concatenate([r.values for r in self.readings.values()]),
        }
        rows = len(columns["step"])
        columns |= {"layer": np.full(rows, -1), "head": np.full(rows, -1), "undefined": np.zeros(rows, bool)}
        files = trace.write_part(folder, int(columns["step"].min()), self.last_step, columns)
        trace.write_manifest(folder, {**self.manifest(), "files": files})
        return folder
