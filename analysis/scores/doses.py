"""One run a dose of one fault: its signals by step, and when they part from the one healthy run's.

There are no twins, so nothing here has a false-alarm rate but the conservation laws, whose threshold needs no healthy
run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from foreshock.analysis.detect.tracks.universal import universal_threshold
from foreshock.analysis.runs.labels import divergence_step

ALPHA = 0.05
COLUMNS = ["bits", "step", "signal", "max", "min", "mean"]
LAWS = (
    "key_shift_residual.over_noise",
    "value_shift_residual.over_noise",
    "qk_gauge_residual.over_noise",
    "qk_gauge_residual.matrix.over_noise",
    "vo_gauge_residual.over_noise",
    "vo_gauge_residual.matrix.over_noise",
)
"""Attention's conservation laws, as ratios to predicted rounding noise."""

GRADIENT_NORM, GRADIENT_SAMPLES = "grad_global_norm", 50
"""Read at every step, and judged and drawn as a rolling median over so many steps, which is causal."""

HELD_OUT, DELTA_W, DELTA_2 = "held_out_loss", "delta_w_spectral_entropy.q.w50", "qk_delta2_spectrum.entropy.w50"


@dataclass(frozen=True)
class Dose:
    """The signals of one run, each by step. bits: truncated, 0 for the healthy run.

    worst_law: the largest ratio of all laws, layers and heads; entropies, in nats: of the head with the smallest.
    """

    bits: int
    held_out: pd.Series
    gradient_norm: pd.Series
    delta_w: pd.Series
    delta_2: pd.Series
    worst_law: pd.Series

    @property
    def steps(self) -> int:
        return int(self.gradient_norm.index[-1])


def doses_of(readings: pd.DataFrame) -> list[Dose]:
    """The runs of a table of readings, the healthy one first. Raises ValueError where it lacks one, or a signal."""
    missing = [column for column in COLUMNS if column not in readings]
    if missing:
        raise ValueError(f"no column {missing[0]!r}: needs {', '.join(COLUMNS)}")
    doses = []
    for bits, run in readings.groupby("bits"):
        by_signal = {name: rows.set_index("step").sort_index() for name, rows in run.groupby("signal", observed=True)}
        lost = [name for name in (HELD_OUT, GRADIENT_NORM, DELTA_W, DELTA_2, *LAWS) if name not in by_signal]
        if lost:
            raise ValueError(f"the run of {bits} bits has no signal {lost[0]!r}")
        norm = by_signal[GRADIENT_NORM]["max"].rolling(GRADIENT_SAMPLES, min_periods=1).median()
        worst = pd.concat([by_signal[name]["max"] for name in LAWS], axis=1).max(axis=1)
        delta_w, delta_2 = by_signal[DELTA_W]["min"], by_signal[DELTA_2]["min"]
        doses.append(Dose(int(str(bits)), by_signal[HELD_OUT]["max"], norm, delta_w, delta_2, worst))
    if not doses or doses[0].bits != 0:
        raise ValueError("no run of 0 bits: one healthy run is needed")
    return doses


def laws_threshold(steps: int, every_steps: int, heads: int) -> float:
    """The ``universal`` threshold of all laws in every head, read every so many steps of a run, at 5 %."""
    return universal_threshold(steps // every_steps * heads * len(LAWS), ALPHA)


def dose_table(doses: list[Dose], limit: float) -> pd.DataFrame:
    """One row a run: when it diverges, when its signals part from the healthy run's, how far the laws stand.

    Steps are those of the first reading concerned; empty where there is none. ``compared_at``: the last held-out
    evaluation that the run and the healthy one share.
    """
    healthy = doses[0]
    rows = []
    for dose in doses:
        shared = dose.held_out.index.intersection(healthy.held_out.index)[-1]
        until = healthy.held_out[: dose.held_out.index[-1]]
        rows.append(
            {
                "bits": dose.bits,
                "steps": dose.steps,
                "diverges": divergence_step(
                    dose.held_out.to_numpy(), steps=dose.held_out.index.to_numpy(), healthy_losses=[until.to_numpy()]
                ),
                "laws_alarm": _first(dose.worst_law > limit),
                "threshold": limit,
                "first_law_reading": dose.worst_law.iloc[0],
                "largest_law_reading": dose.worst_law.max(),
                "delta_w_half_of_healthy": _first(_ratio(dose.delta_w, healthy.delta_w) <= 0.5),
                "delta_2_half_of_healthy": _first(_ratio(dose.delta_2, healthy.delta_2) <= 0.5),
                "gradient_norm_twice_healthy": _first(_ratio(dose.gradient_norm, healthy.gradient_norm) >= 2),
                "compared_at": shared,
                "held_out_loss": dose.held_out[shared],
                "healthy_held_out_loss": healthy.held_out[shared],
            }
        )
    whole = {name: "Int64" for name in rows[0] if name.endswith(("alarm", "diverges", "healthy"))}
    return pd.DataFrame(rows).astype(whole)


def _ratio(series: pd.Series, healthy: pd.Series) -> pd.Series:
    return (series / healthy).dropna()


def _first(where: pd.Series) -> int | None:
    """The first step at which a condition holds, or None."""
    hits = np.flatnonzero(where.to_numpy())
    return int(where.index[hits[0]]) if len(hits) else None
