"""Bad batches: a share of the sequences is no text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.operation import BatchOperation, Moment
from foreshock.faults.share import ShareFault, chosen_rows

KINDS = ("repeated_token", "random_tokens")
"""One token of the vocabulary over the whole sequence, or each position any token, uniformly."""


@dataclass(frozen=True)
class NoText(BatchOperation):
    """Replace ceil(share x B) sequences by one repeated token each, or by random tokens. kind: of ``KINDS``."""

    share: float
    kind: str

    @property
    def idle(self) -> bool:
        return self.share == 0

    def apply(self, pair_B2T: Tensor, moment: Moment) -> Tensor:
        sequences, _, T = pair_B2T.shape
        rows = chosen_rows("bad_batch", self.share, sequences, moment)
        drawn = (len(rows), 1 if self.kind == "repeated_token" else T + 1)
        tokens = torch.from_numpy(moment.generator("bad_batch tokens").integers(moment.vocab_size, size=drawn))
        tokens = tokens.expand(-1, T + 1)
        out = pair_B2T.clone()
        out[torch.from_numpy(rows)] = torch.stack((tokens[:, :-1], tokens[:, 1:]), dim=1).to(out.device)
        return out


@dataclass(frozen=True)
class BadBatch(ShareFault):
    """A share of the sequences is one repeated token or random tokens, at the steps of a window.

    What breaks: shards of binary files, of padding or of white space that passed the filters. Report:
    facebookresearch/metaseq #521. Equation: ceil(share x B) sequences of the batch, drawn without replacement, become
    x_0 = ... = x_T = u with u uniform over the vocabulary, a token for each sequence, or x_t uniform, independently;
    inputs and targets are of the same sequence. With a vocabulary of bytes, random tokens are random bytes. The
    draws are a pure function of seed and step. Bad text of another kind, such as another language, is not modelled;
    the held-out batch stays right.

    share: 0 (the healthy control) to 1; kind: one of ``KINDS``. Raises ValueError on impossible values, by name.
    """

    kind: str = "repeated_token"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault.kind={self.kind!r} is not allowed: one of {', '.join(KINDS)}")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("batch", (NoText(self.share, self.kind),), self.window)

    def describe(self) -> InjectionCard:
        return self.card(self.kind)
