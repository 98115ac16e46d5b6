"""Dynamic loss scaling: what ``train.precision=fp16`` needs beside autocast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foreshock.faults.loss_scale import ScaleOperation
from foreshock.models.corruption import Log
from foreshock.monitors.base import LossScaling


class LossScaler:
    """PyTorch's ``torch.amp.GradScaler`` around the updates of one run (Micikevicius et al., arXiv:1710.03740).

        scaler.corrupt(operations, log)      # INJECT: scaling
        scaler.scaled(loss).backward()       # for every micro-batch
        overflow = scaler.unscale(optimizer)
        if not overflow:
            optimizer.step()
        scaler.update()

    The scale begins at 2^16, halves after an update that overflows, and doubles after 2,000 in a row that do not. An
    update overflows where a gradient is NaN or Inf as it is unscaled. enabled: False for a scaler that does nothing, of
    the other precisions; skipped: updates that have overflowed so far.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled, self.skipped = enabled, 0
        self._scaler = torch.amp.GradScaler(device.type, enabled=enabled)

    @property
    def scale(self) -> float:
        """The factor on the next loss, 1 without scaling. Waits for the device."""
        return float(self._scaler.get_scale())

    @property
    def scaling(self) -> LossScaling | None:
        """What a monitor sees after an update, None without scaling."""
        return LossScaling(self.scale, self.skipped) if self.enabled else None

    def corrupt(self, operations: Sequence[ScaleOperation], log: Log | None = None) -> None:
        """Change the scale before an update; the scaler then goes on from there by itself."""
        for operation in operations:
            if not operation.idle:
                before = self.scale
                after = operation.apply(before)
                self._scaler.load_state_dict(self._scaler.state_dict() | {"scale": after})
                if log is not None:
                    log.add("scaling", operation, "scale", *torch.tensor([[before], [after]], dtype=torch.float64))

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale, the loss itself without scaling."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide all gradients by the scale; whether they have overflowed, for which it waits for the device."""
        if not self.enabled:
            return False
        self._scaler.unscale_(optimizer)
        gradients: list[Any] = [
            weight.grad for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None
        ]
        overflow = not bool(torch.stack(torch._foreach_norm(gradients, torch.inf)).isfinite().all())
        self.skipped += overflow
        return overflow

    def update(self) -> None:
        """Let the scale follow what ``unscale`` has met."""
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "scaler": self._scaler.state_dict()} if self.enabled else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; an empty one, of another precision, changes nothing."""
        if state:
            self.skipped = state["skipped"]
            self._scaler.load_state_dict(state["scaler"])
