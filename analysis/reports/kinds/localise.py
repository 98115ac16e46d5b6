"""Which kernel is broken: where the laws say that the fault sits, held against where it does."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from foreshock.analysis.figures.localise import localise_figure
from foreshock.analysis.locate.localise import confusion, localise, sentences, shares_right
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.scores.contest import Contest
from foreshock.monitors.signal import Signal


class Localise(Kind):
    pictures = (("figure", lambda contest, path: localise_figure(contest.experiment, path)),)
    every_model = True

    def model_tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        runs = localise(contest.experiment).table
        return {"localisation": runs, "confusion": confusion(runs).join(shares_right(runs)).reset_index()}

    def sentences(self, contest: Contest) -> str:
        return sentences(localise(contest.experiment))

    def check_signals(self, signals: Iterable[Signal]) -> None:
        if not any(signal.law for signal in signals):
            raise ValueError(
                f"experiment.draw={self.name} is not allowed: no configured monitor has a conservation law"
            )
