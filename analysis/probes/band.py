"""The healthy band of a canary: a few short healthy runs, and the thresholds that they set."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foreshock.analysis.detect.calibration import REFERENCE, SETS_SCALES, calibrated
from foreshock.analysis.detect.thresholds import Thresholds
from foreshock.analysis.runs.conf import conf
from foreshock.experiments import trace
from foreshock.experiments.files import damage, sealed, sha256, unsealed, write_whole
from foreshock.experiments.trace import Trace, TraceError

HEALTHY, THRESHOLDS, SETTINGS = "healthy", "thresholds.json", "canary.json"
CHART = "ewma"
"""Of ``conf/rule``: the primary chart of the protocol."""
LEFT_BEHIND = ("*.safetensors", "*.pt", "*.partial", "evidence")
"""Files of a run that a band does without."""


@dataclass(frozen=True)
class Band:
    """What a canary is held against.

    thresholds: joint ones on the reference track (``analysis.detect.calibration``); runs: the healthy runs by id;
    overrides: of ``foreshock train``, which all runs have; empty for runs that were trained elsewhere.
    """

    thresholds: Thresholds
    runs: Mapping[str, Trace]
    overrides: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """The length of a canary in optimizer steps: that of the shortest healthy run."""
        return self.thresholds.horizon_steps

    @property
    def seeds(self) -> list[int]:
        """Of the healthy runs that set thresholds, and so no part of the band that they are held against."""
        return sorted(self.runs[run].manifest["seed"] for run in self.thresholds.runs)

    def twin(self, run: Trace) -> Trace | None:
        """The healthy run of the same seed; where seeds are not known, of the same folder name."""
        seed = run.manifest["seed"]
        if trace.ATTACHED in run.manifest or seed < 0:
            return self.runs.get(run.run_id)
        return next((healthy for healthy in self.runs.values() if healthy.manifest["seed"] == seed), None)


def check_new(folder: Path) -> None:
    """Raises ValueError where a folder holds a band already."""
    if (folder / SETTINGS).exists():
        raise ValueError(f"band={folder} is not allowed here: it holds a band already; name another folder")


def check_no_copies(runs: Sequence[Trace]) -> None:
    """Raises ValueError where two runs have the same readings to the byte: they are one run, and count as one."""
    seen: dict[tuple[str, ...], str] = {}
    for run in runs:
        parts = tuple(digest for name, digest in run.manifest.get("files", {}).items() if name.startswith(trace.TRACE))
        if parts and parts in seen:
            raise ValueError(f"runs {seen[parts]} and {run.run_id} are copies of one run: other seeds are needed")
        seen[parts] = run.run_id


def check_count(runs: int, alpha: float) -> None:
    """Raises ValueError for too few runs for alpha, before they are trained."""
    needed = SETS_SCALES + math.ceil(1 / alpha - 1 - 1e-9)
    if runs < needed:
        raise ValueError(f"store={runs} is not allowed with alpha={alpha:g}: at least {needed} healthy runs are needed")


def store(folder: Path, runs: Sequence[Trace], alpha: float, overrides: Sequence[str] = ()) -> Band:
    """Set the thresholds of healthy runs, and keep them with the runs' traces in a folder.

    alpha: the probability that a healthy run stands outside in any signal. Raises ValueError for too few runs for
    alpha, and TraceError for runs of different models or signals.
    """
    check_no_copies(runs)
    thresholds = calibrated(runs, alpha=alpha, track=REFERENCE, chart=conf("rule", CHART), joint=True)
    for run in runs:
        kept = folder / HEALTHY / run.run_id
        if run.folder.resolve() != kept.resolve():
            shutil.copytree(run.folder, kept, ignore=shutil.ignore_patterns(*LEFT_BEHIND), dirs_exist_ok=True)
    thresholds.write(folder / THRESHOLDS)
    settings = {
        "overrides": list(overrides),
        "runs": sorted(run.run_id for run in runs),
        "thresholds": sha256((folder / THRESHOLDS).read_bytes()),
    }
    write_whole(folder / SETTINGS, sealed(settings))
    return Band(thresholds, {run.run_id: run for run in runs}, tuple(overrides))


def read(folder: Path) -> Band:
    """The band that ``store`` has kept. Raises ValueError where there is none, TraceError where it is damaged."""
    try:
        settings = unsealed((folder / SETTINGS).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"band={folder} holds no band: store one with store=19, or with healthy=DIR") from None
    except ValueError as error:
        raise TraceError(f"{folder / SETTINGS} is damaged ({error}): store the band again") from None
    reason = damage(folder / THRESHOLDS, settings["thresholds"])
    if reason is not None:
        raise TraceError(f"{folder / THRESHOLDS} is damaged ({reason}): store the band again")
    runs = {run: trace.read(folder / HEALTHY / run) for run in settings["runs"]}
    return Band(Thresholds.read(folder / THRESHOLDS), runs, tuple(settings["overrides"]))
