"""Which kernel is broken: where the laws say that the fault sits, held against where it does."""

from __future__ import annotations

import pandas as pd

from foreshock.analysis.figures.localise import localise_figure
from foreshock.analysis.locate.localise import confusion, localise, sentences, shares_right
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.scores.contest import Contest


class Localise(Kind):
    name = "localise"
    pictures = (("figure", lambda contest, path: localise_figure(contest.experiment, path)),)
    every_model = True

    def model_tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        runs = localise(contest.experiment).table
        return {"localisation": runs, "confusion": confusion(runs).join(shares_right(runs)).reset_index()}

    def sentences(self, contest: Contest) -> str:
        return sentences(localise(contest.experiment))
