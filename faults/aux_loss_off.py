"""Load balancing switched off: the router's auxiliary loss, and the balancing bias where there is one."""

from __future__ import annotations

from dataclasses import dataclass, field

from foreshock.faults.aux_loss_scale import AuxLossScale


@dataclass(frozen=True)
class AuxLossOff(AuxLossScale):
    """The load-balance loss's coefficient becomes 0, and a balancing bias stands still, at the steps of a window.

    ``AuxLossScale`` with a factor of 0. Report: NVIDIA-NeMo/Automodel #1408; source: arXiv:2606.28116 (auxiliary loss
    1e-4 -> 0). The z-loss stays.
    """

    factor: float = field(default=0.0, init=False)
