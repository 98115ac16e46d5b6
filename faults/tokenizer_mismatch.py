"""A tokenizer of another vocabulary: a share of the sequences has its token ids permuted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.operation import BatchOperation, Moment
from foreshock.faults.share import ShareFault, chosen_rows


def other_vocabulary(moment: Moment) -> Tensor:
    """The id that each id becomes, (V,) int64: one random cycle through the vocabulary, the same at every step."""
    order = torch.from_numpy(replace(moment, step=0).generator("vocabulary").permutation(moment.vocab_size))
    ids = torch.empty_like(order)
    ids[order] = order.roll(-1)
    return ids


@dataclass(frozen=True)
class PermutedVocabulary(BatchOperation):
    """Every token id of ceil(share x B) sequences becomes another one, by one permutation."""

    share: float

    @property
    def idle(self) -> bool:
        return self.share == 0

    def apply(self, pair_B2T: Tensor, moment: Moment) -> Tensor:
        rows = chosen_rows("tokenizer_mismatch", self.share, len(pair_B2T), moment)
        rows_in_torch = torch.from_numpy(rows).to(pair_B2T.device)
        hit = pair_B2T[rows_in_torch]
        ids = other_vocabulary(moment).to(pair_B2T.device)
        out = pair_B2T.clone()
        out[rows_in_torch] = ids[hit.clamp(min=0)]  # an ignored target is no id
        return out


@dataclass(frozen=True)
class TokenizerMismatch(ShareFault):
    """A share of the sequences is encoded with a permuted vocabulary, at the steps of a window.

    What breaks: shards that another version of the tokenizer has encoded, with other ids for the same pieces. No
    public report is named. Equation: in ceil(share x B) sequences of the batch, drawn from seed and step, x <- pi(x)
    for inputs and targets. pi is one random cycle through the whole vocabulary, a function of the run's seed alone, so
    that every id of a hit sequence is wrong and the wrong text has the structure of text. Pieces that another tokenizer
    cuts elsewhere are not modelled; the held-out batch stays right.

    share: 0 (the healthy control) to 1. Raises ValueError on impossible values, by name.
    """

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("batch", (PermutedVocabulary(self.share),), self.window)

    def describe(self) -> InjectionCard:
        return self.card("permute_vocabulary")
