"""Adam's step counter stands still."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from foreshock.faults.adam_state import StuckCounters
from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.of_group import GroupFault
from foreshock.faults.operation import Training


@dataclass(frozen=True)
class AdamStepStuck(GroupFault):
    """The step counter, from which Adam corrects its moments' bias, does not advance at the steps of a window.

    What breaks: an optimizer that never increments its counter. Report: allenai/OLMo-core #317, where the learning rate
    was in effect 2.2 times too high.
    Equation (arXiv:1412.6980): t stays t_0, the counter at the onset, so that each faulty update is corrected as number
    t_0 + 1: w <- w - lr (m / (1 - beta1^(t_0 + 1))) / (sqrt(v / (1 - beta2^(t_0 + 1))) + epsilon). From step 0 on, in
    the long run, the update is sqrt(1 - beta2) / (1 - beta1) times too long: 2.2 with (0.9, 0.95). An onset from where
    1 - beta^(onset + 1) rounds to 1 in FP32, 324 updates with (0.9, 0.95), would change nothing and is refused. The
    increments of the window stay lost after it.

    group: of ``models.transformer.PARAMETER_GROUPS``, or None for all. Raises ValueError for another group.
    """

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("optimizer", (StuckCounters(self.group),), self.window)

    def check_begins(self, train: Training) -> None:
        slowest, half_unit = max(train.betas), torch.finfo(torch.float32).eps / 2
        # update ``first`` corrects by beta^(first + 1), and the next one shows that the counter stands still
        first = 0 if slowest == 0 else math.ceil(math.log(half_unit) / math.log(slowest)) - 1
        if self.window.first >= first:
            raise ValueError(
                f"fault.onset={self.onset} is too late: from update {first} on the bias correction is 1 in FP32 with "
                f"train.betas={list(train.betas)}, and the counter changes nothing"
            )

    def describe(self) -> InjectionCard:
        where = {"point": "optimizer", "group": self.group, "tensors": ("step",)}
        return InjectionCard(self.family, (self.injection("stuck", where, {}),))
