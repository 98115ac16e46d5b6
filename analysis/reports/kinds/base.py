"""What every kind of report has: pictures, tables and sentences, and what an experiment must say for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from foreshock.analysis.scores.contest import Contest
from foreshock.monitors.signal import Signal

Picture = Callable[[Contest, Path], str]
"""Draws one view of an experiment into a file and returns the caption."""


@dataclass(frozen=True)
class Kind:
    """A kind of report: what an experiment's key ``draw`` names.

    name: that of its file in ``conf/report_kind``; pictures: file names and what draws them; every_model: they are
    drawn for each model, not for the first view alone; needs: keys of the experiment without which they cannot be
    drawn; by_size: faults are told apart by their number of bits, and delays are in steps.
    """

    name: str

    pictures: ClassVar[tuple[tuple[str, Picture], ...]] = ()
    every_model: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    by_size: ClassVar[bool] = False

    def check(self, experiment: Mapping[str, Any]) -> None:
        """Raise ValueError, in one line that names the key, where this kind cannot be made of an experiment.

        experiment: its configuration, before a run is built.
        """
        for key in self.needs:
            if not experiment.get(key):
                raise ValueError(f"experiment.{key} is missing: experiment.draw={self.name} needs it")
        if self.by_size and experiment["align"] != ["steps"]:
            raise ValueError(
                f"align={','.join(experiment['align'])} is not allowed with experiment.draw={self.name}: steps alone"
            )

    def check_signals(self, signals: Iterable[Signal]) -> None:
        """Raise ValueError where this kind cannot be made of the signals of an experiment's runs."""

    def draw(self, views: Sequence[Contest], report: Path) -> list[tuple[str, Path]]:
        """Draw the pictures into a folder; the caption and the file of each."""
        chosen = one_of_each_model(views) if self.every_model else [("", views[0])]
        paths = [
            (picture, contest, report / f"{name}{suffix}.png")
            for suffix, contest in chosen
            for name, picture in self.pictures
        ]
        return [(picture(contest, path), path) for picture, contest, path in paths]

    def model_tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        """By file name, tables that hold all models, each with a column ``model``: the part of one model."""
        return {}

    def tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        """By file name, tables of the first view; the last of them is printed too."""
        return {}

    def sentences(self, contest: Contest) -> str:
        """What came out of this kind's own analysis, for the summary of a view; empty where there is none."""
        return ""


def one_of_each_model(views: Sequence[Contest]) -> list[tuple[str, Contest]]:
    """One view of each model, with what its files' names end in: nothing for the first model."""
    first = {contest.experiment.model: contest for contest in reversed(views)}
    models = dict.fromkeys(contest.experiment.model for contest in views)
    return [(f"-{model}" if i else "", first[model]) for i, model in enumerate(models)]
