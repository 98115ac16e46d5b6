"""Near duplicates: a few sequences come again and again, with edits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard
from foreshock.faults.operation import BatchOperation, Moment, Places, SamplingOperation
from foreshock.faults.share import check_share, chosen_rows

PURPOSE = "near_duplicates"
"""Of the draw that both operations share: which sequences of a batch are copies."""

MOST_DOCUMENTS = 65536


@dataclass(frozen=True)
class Copies(SamplingOperation):
    """ceil(share x B) sequences of a batch are copies of ``documents`` sequences that a run has for this."""

    share: float
    documents: int

    @property
    def idle(self) -> bool:
        return self.share == 0

    def apply(self, starts_B: np.ndarray, places: Places, moment: Moment) -> np.ndarray:
        originals = replace(moment, step=0).generator("originals").integers(places.count, size=self.documents)
        rows = chosen_rows(PURPOSE, self.share, len(starts_B), moment)
        moved = starts_B.copy()
        moved[rows] = originals[moment.generator("copies").integers(self.documents, size=len(rows))]
        return moved


@dataclass(frozen=True)
class EditedCopies(BatchOperation):
    """In each of the sequences that ``Copies`` has chosen, ceil(edits x (T + 1)) tokens become others."""

    share: float
    edits: float

    @property
    def idle(self) -> bool:
        return self.share == 0 or self.edits == 0

    def apply(self, pair_B2T: Tensor, moment: Moment) -> Tensor:
        sequences, _, T = pair_B2T.shape
        rows, generator = chosen_rows(PURPOSE, self.share, sequences, moment), moment.generator("edits")
        shift = np.zeros((sequences, T + 1), dtype=np.int64)
        for row in rows:
            edited = generator.permutation(T + 1)[: math.ceil(self.edits * (T + 1))]
            shift[row, edited] = generator.integers(1, moment.vocab_size, size=len(edited))
        shift_B2T = torch.from_numpy(np.stack((shift[:, :-1], shift[:, 1:]), axis=1)).to(pair_B2T.device)
        return (pair_B2T + shift_B2T) % moment.vocab_size


@dataclass(frozen=True)
class NearDuplicates(WindowedFault):
    """A share of the sequences are near copies of a few, at the steps of a window.

    What breaks: a corpus that was not deduplicated, or whose deduplication missed templates. Report: arXiv:2107.06499
    (one passage of 61 words stood 61,036 times in C4). Equation: ``documents`` starts are drawn once from the seed.
    ceil(share x B) sequences of a batch begin at one of them, drawn from seed and step; in each of these,
    ceil(edits x (T + 1)) tokens become other tokens, uniformly over the wrong ones, in inputs and targets alike.
    Insertions and deletions are not modelled: a copy has the length of its original; the held-out batch stays right.

    share: 0 (the healthy control) to 1; edits: share of a copy's tokens, 0 for exact copies; documents: at least 1.
    Raises ValueError on impossible values, by name.
    """

    share: float
    edits: float = 0.05
    documents: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)
        if not 0 <= self.edits <= 1:
            raise ValueError(f"fault.edits={self.edits} is not allowed: 0 (exact copies) to 1")
        if not 1 <= self.documents <= MOST_DOCUMENTS:
            raise ValueError(f"fault.documents={self.documents} is not allowed: 1 to {MOST_DOCUMENTS}")

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        sampling = (*healthy.sampling, Copies(self.share, self.documents))
        edited = (EditedCopies(self.share, self.edits),) if self.edits else ()
        return replace(healthy, sampling=sampling, batch=healthy.batch + edited)

    def describe(self) -> InjectionCard:
        size, control = {"share": self.share, "documents": self.documents}, self.share == 0
        copies = self.injection("copy", {"point": "sampling"}, size, control=control)
        if not self.edits:
            return InjectionCard(self.family, (copies,))
        where, edits = {"point": "batch", "tensors": EditedCopies.changes}, {"share": self.share, "edits": self.edits}
        return InjectionCard(self.family, (copies, self.injection("edit", where, edits, control=control)))
