"""How soon each detector alarms under each fault, by the fault's size: the tables of the early-warning experiment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from foreshock.analysis.runs.experiment import HEALTHY, Experiment
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.inference import CHANCE, chance_of_alarms
from foreshock.analysis.scores.table import median_step, own_scores
from foreshock.faults.card import InjectionCard

SOON, LATER = 10, 100
"""Optimizer steps from onset within which the table counts alarms."""


@dataclass(frozen=True)
class Size:
    """What a fault does and where, out of its injection card; ``bits`` is what a figure sweeps, the rest is ``where``.

    phase: of attention's pass, empty elsewhere; share: of the elements hit; layers, heads: ``all`` or their numbers;
    onset: its first faulty update.
    """

    sites: str
    phase: str
    rounding: str
    bits: int
    share: float
    layers: str
    heads: str
    onset: int

    @property
    def where(self) -> str:
        """The fault without its bits and onset, in words; what is usual is left out."""
        said = [self.sites]
        said += [] if self.phase in ("", "backward") else [self.phase]
        said += [] if self.rounding == "truncate" else [self.rounding.replace("_", " ")]
        said += [f"{name} {which}" for name, which in (("layer", self.layers), ("head", self.heads)) if which != "all"]
        said += [] if self.share == 1 else [f"{self.share:g} of elements" if self.share else "one element"]
        return ", ".join(said)


def size(card: InjectionCard) -> Size | None:
    """The size of a bit operation on one kernel; None for every other fault, for several at once and for 0 bits."""
    if len(card.injections) != 1 or card.control or "bits" not in card.injections[0].size:
        return None
    (injection,) = card.injections
    where, bits, share = injection.where, injection.size["bits"], injection.size["share"]
    sites = f"{'+'.join(where['modules'])} {where['tensor']}" if "modules" in where else "+".join(where["tensors"])
    layers, heads = (
        "all" if where.get(key) is None else "+".join(str(i) for i in where[key]) for key in ("layers", "heads")
    )
    return Size(sites, where.get("phase", ""), injection.what, bits, share, layers, heads, injection.window.first)


def sizes(experiment: Experiment) -> dict[str, Size]:
    """By name, the faults that are bit operations on one kernel."""
    known = {fault: size(experiment.of("faulty", fault=fault)[0].trace.card) for fault in experiment.faults}
    return {fault: of_fault for fault, of_fault in known.items() if of_fault is not None}


def delays(contest: Contest) -> pd.DataFrame:
    """One row a faulty run and named detector: detector, fault, run_id, delay_steps.

    delay_steps: from onset to the first alarm; NaN where there is none, or one before the onset, which is chance.
    Declined detectors have no rows. Raises ValueError on an axis other than steps.
    """
    experiment = contest.experiment
    if experiment.axis != "steps":
        raise ValueError(f"align={experiment.axis} is not allowed: delays are in optimizer steps")
    scores = own_scores(contest)
    faulty = scores[(scores["fault"] != HEALTHY) & scores["detector"].isin(experiment.named_detectors)]
    faulty = faulty.assign(delay_steps=faulty["delay"].where(faulty["alarmed"]))
    return faulty[["detector", "fault", "run_id", "delay_steps"]].reset_index(drop=True)


def oracles(experiment: Experiment) -> list[str]:
    """The detectors that read the fault itself: they bound what a monitor could know, and compete with none."""
    named = experiment.named_detectors.items()
    return [name for name, signals in named if any(experiment.signals[signal].family == "oracle" for signal in signals)]


def median_delay(delays: pd.Series) -> float:
    """Median of delays in which NaN is later than everything; NaN where the median run has none."""
    return median_step(delays)


def smallest_table(contest: Contest) -> pd.DataFrame:
    """One row a detector and fault of known size: the share of runs alarming within so many steps, and the median.

    reads_every_steps: the detector's cadence; smallest: whether it is the fewest bits of its kind, else alike, that
    most runs alarm within ``LATER`` steps.
    """
    experiment = contest.experiment
    all_delays, known = delays(contest), sizes(experiment)
    rows = []
    for (name, fault), runs in all_delays[all_delays["fault"].isin(known)].groupby(["detector", "fault"], sort=False):
        every = [experiment.signals[signal].every_steps for signal in experiment.named_detectors[name]]
        rows.append(
            {
                "detector": name,
                "fault": fault,
                **vars(known[fault]),
                "reads_every_steps": max(min(every), experiment.score_every),
                "runs": len(runs),
                f"within_{SOON}": float((runs["delay_steps"] <= SOON).mean()),
                f"within_{LATER}": float((runs["delay_steps"] <= LATER).mean()),
                "median_delay_steps": median_delay(runs["delay_steps"]),
            }
        )
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    alike = ["detector", "sites", "phase", "rounding", "share", "layers", "heads", "onset"]
    detected = table["bits"].where(table[f"within_{LATER}"] > 0.5)
    return table.assign(
        smallest=detected.notna() & (detected == detected.groupby([table[key] for key in alike]).transform("min"))
    )


def blind_table(contest: Contest) -> pd.DataFrame:
    """One row a fault for which the experiment's ``family`` alarms no more often than chance explains, at 5 %.

    What the experiment lists as ``controls`` is no fault, and left out.

    by_chance: how likely so many alarms are in healthy runs that share the threshold (``chance_of_alarms``); soonest:
    the other detector of the smallest median delay, empty where none alarms in most runs.
    """
    experiment = contest.experiment
    family = experiment.index["experiment"]["family"]
    if family not in experiment.named_detectors or contest.detectors[family].declined:
        raise ValueError(f"experiment.family={family!r} is not allowed: a detector that can be judged")
    calibration, rows = len(experiment.of("calibration")), []
    for fault, runs in delays(contest).groupby("fault", sort=False):
        if fault in experiment.index["experiment"].get("controls", ()):
            continue
        alarmed = runs.loc[runs["detector"] == family, "delay_steps"].notna()
        by_chance = chance_of_alarms(int(alarmed.sum()), len(alarmed), calibration, experiment.alpha)
        if by_chance < CHANCE:
            continue
        others = runs[~runs["detector"].isin({family, *oracles(experiment)})].groupby("detector", sort=False)[
            "delay_steps"
        ]
        medians = others.apply(median_delay)
        soonest = None if medians.isna().all() else medians.idxmin()
        rows.append(
            {
                "fault": fault,
                "label": " ".join(experiment.label(fault).split()),
                "runs": len(experiment.of("faulty", fault=fault)),
                "family_alarms": float(alarmed.mean()),
                "by_chance": by_chance,
                "soonest": soonest,
                "median_delay_steps": np.nan if soonest is None else medians[soonest],
                "alarms": np.nan if soonest is None else float(others.get_group(soonest).notna().mean()),
            }
        )
    columns = ["fault", "label", "runs", "family_alarms", "by_chance", "soonest", "median_delay_steps", "alarms"]
    return pd.DataFrame(rows, columns=columns)
