"""Which runs a campaign has: faults x doses x onsets x seeds, or a random draw of faults, doses, onsets and sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from foreshock.experiments.build import Run, construct
from foreshock.experiments.faults import NEEDS, Row, said
from foreshock.experiments.plan import FIRST_SEED
from foreshock.experiments.validation import Distinct, Node, check_named, distinct
from foreshock.faults.card import BENIGN
from foreshock.faults.fit import check_fits
from foreshock.models.corruption import MODULE_SITES, has_weight
from foreshock.models.numerics import SITES
from foreshock.models.transformer import PARAMETER_GROUPS, TransformerConfig, skeleton

MOST_TRIES = 50
"""Draws of a dose, an onset and a site for one fault, until they fit; and of a fault, until it has any."""
OF_A_CELL = ("fault", "seed", "out")
"""Keys that a campaign sets for each of its runs."""


class Campaign(Node):
    """The keys of ``conf/campaign``, as ``smoke.yaml`` explains them."""

    name: Annotated[str, Field(min_length=1)]
    faults: Annotated[Distinct, Field(min_length=1)] | None
    doses: Literal["largest", "smallest", "all"]
    onsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(distinct)]
    own_onset: Distinct
    seeds: Annotated[int, Field(ge=1, le=1000)]
    draw: Annotated[int, Field(ge=1, le=10_000)] | None
    overrides: list[str]


@dataclass(frozen=True)
class Cell:
    """One faulty run. dose, site: keys of the fault with their values; onset: None for that of the fault's file; needs:
    of ``experiments.faults.NEEDS``."""

    fault: str
    family: str
    needs: str
    seed: int
    dose: Mapping[str, Any] = field(default_factory=dict)
    site: Mapping[str, Any] = field(default_factory=dict)
    onset: int | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """Every key of the fault that the cell sets."""
        return {**self.dose, **self.site, **({} if self.onset is None else {"onset": self.onset})}

    @property
    def overrides(self) -> list[str]:
        """What makes a healthy run of this seed the cell's."""
        return [f"fault={self.fault}", *(f"fault.{key}={said(value)}" for key, value in self.keys.items())]


def chosen_rows(campaign: Campaign, known: Sequence[Row]) -> list[Row]:
    """The faults of a campaign, of all; a draw from all leaves benign controls out, which are no faults.

    Raises ValueError for a fault that is none, and for an override that every run would undo, in one line.
    """
    names = [row.name for row in known]
    check_named(campaign.faults or (), names, "campaign.faults")
    check_named(campaign.own_onset, names, "campaign.own_onset")
    undone = next((line for line in campaign.overrides if line.split("=")[0].split(".")[0] in OF_A_CELL), None)
    if undone is not None:
        raise ValueError(f"campaign.overrides: {undone} has no effect, as every run has its own")
    if campaign.faults is not None:
        return [row for row in known if row.name in campaign.faults]
    return [row for row in known if campaign.draw is None or row.family != BENIGN]


def cells(campaign: Campaign, rows: Sequence[Row], healthy: Mapping[str, Run], seed: int) -> list[Cell]:
    """The faulty runs of a campaign. rows: its faults; healthy: by need of theirs, a run that has what is needed.

    A draw is a pure function of ``seed``, the catalogue and the models. Raises ValueError for an onset after the end.
    """
    steps = min(run.train.steps for run in healthy.values())
    late = next((onset for onset in campaign.onsets if onset >= steps), None)
    if late is not None:
        said_onsets = f"campaign.onsets={said(campaign.onsets)} is not allowed"
        raise ValueError(f"{said_onsets}: {late} is after the end, train.steps={steps}")
    return list(_listed(campaign, rows) if campaign.draw is None else _drawn(campaign, rows, healthy, seed))


def _listed(campaign: Campaign, rows: Sequence[Row]) -> Iterator[Cell]:
    for row in rows:
        onsets = [None] if _keeps_onset(campaign, row) else campaign.onsets
        for dose in _doses(campaign, row):
            for onset in onsets:
                for seed in _seeds(campaign):
                    yield Cell(row.name, row.family, row.needs, seed, dose, {}, onset)


def _keeps_onset(campaign: Campaign, row: Row) -> bool:
    """Whether a fault has the onset of its file; one that is made of others has one for each."""
    return row.name in campaign.own_onset or "onset" not in row.node


def _doses(campaign: Campaign, row: Row) -> Sequence[Mapping[str, Any]]:
    """Of a fault; one without a list has its file's values."""
    doses = row.doses or [{}]
    return {"largest": doses[-1:], "smallest": doses[:1], "all": doses}[campaign.doses]


def _seeds(campaign: Campaign) -> range:
    return range(FIRST_SEED["faulty"], FIRST_SEED["faulty"] + campaign.seeds)


def _drawn(campaign: Campaign, rows: Sequence[Row], healthy: Mapping[str, Run], seed: int) -> Iterator[Cell]:
    """Distinct cells: a family and one of its faults, each as likely, then a dose, an onset and a site that fit."""
    generator, seeds = np.random.Generator(np.random.PCG64(seed)), _seeds(campaign)
    assert campaign.draw is not None
    families = sorted({row.family for row in rows})
    seen: list[dict[str, Any]] = []
    for index in range(campaign.draw):
        for _ in range(MOST_TRIES):
            family = _choice(families, generator)
            row = _choice([row for row in rows if row.family == family], generator)
            tries = (_draw(campaign, row, healthy, seeds[index % len(seeds)], generator) for _ in range(MOST_TRIES))
            cell = next((cell for cell in tries if cell is not None and vars(cell) not in seen), None)
            if cell is not None:
                break
        else:
            raise ValueError(f"n={campaign.draw} is not allowed: no {index + 1} different faults of these fit")
        seen.append(vars(cell))
        yield cell


def _draw(
    campaign: Campaign, row: Row, healthy: Mapping[str, Run], seed: int, generator: np.random.Generator
) -> Cell | None:
    """A dose, an onset and a site of one fault; None where they do not fit."""
    run, dose = healthy[row.needs], _choice(_doses(campaign, row), generator)
    onset = int(generator.integers(min(campaign.onsets), max(campaign.onsets) + 1))
    free = [key for key in row.parameters if key not in dose]
    site = {key: value for key, value in _site(run.model_config, generator).items() if key in free}
    cell = Cell(row.name, row.family, row.needs, seed, dose, site, None if _keeps_onset(campaign, row) else onset)
    try:
        fault = construct({**row.node, **cell.keys}, "fault")
        check_fits(fault, run.model_config, run.train)
    except ValueError:
        return None
    return cell


def _choice(options: Sequence[Any], generator: np.random.Generator) -> Any:
    return options[int(generator.integers(len(options)))]


def _site(model: TransformerConfig, generator: np.random.Generator) -> dict[str, Any]:
    """A site by every key that faults have for one, each drawn from what the model has."""
    whole = skeleton(model)
    matrices = sorted(name for name, weight in whole.named_parameters() if weight.ndim >= 2)
    modules = sorted(name for name, module in whole.named_modules() if has_weight(module))
    layer = int(generator.integers(model.n_layers))
    return {
        "parameter": _choice(matrices, generator),
        "modules": [_choice(modules, generator)],
        "site": _choice(MODULE_SITES, generator),
        "sites": [_choice(SITES, generator)],
        "group": _choice(PARAMETER_GROUPS, generator),
        "groups": [_choice(PARAMETER_GROUPS, generator)],
        "layer": layer,
        "layers": [layer],
        "heads": [int(generator.integers(model.n_heads))],
        "expert": int(generator.integers(model.moe.n_experts)) if model.moe else 0,
    }


def needed(these: Sequence[Cell | Row]) -> dict[str, list[str]]:
    """By need of these cells or faults, the overrides of a run that has it."""
    return {needs: NEEDS[needs] for needs in dict.fromkeys(each.needs for each in these)}
