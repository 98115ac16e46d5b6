"""Lead over divergence against the dose of one fault, a line for each detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from foreshock.analysis.figures.lead_by_dose import lead_by_dose_figure
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.lead_by_dose import lead_by_dose


class LeadByDose(Kind):
    pictures = (("figure", lead_by_dose_figure),)
    every_model = True
    needs = ("dose",)

    def check(self, experiment: Mapping[str, Any]) -> None:
        super().check(experiment)
        for name, fault in experiment["faults"].items():
            if fault.get("dose") is None:
                raise ValueError(f"experiment.faults.{name}.dose is missing: experiment.draw={self.name} needs it")

    def model_tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        return {"lead_by_dose": lead_by_dose(contest)}
