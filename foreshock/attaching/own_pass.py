"""The watched rows run once more, uncompiled, for taps that a compiled forward does not let be set."""

from __future__ import annotations

from collections.abc import Collection

import torch

from foreshock.attaching.sight import Sight, taps_on
from foreshock.models.anatomies.router_capture import RouterCapture
from foreshock.models.anatomies.watched_rows import WatchedRows, apart
from foreshock.models.moe import Routing
from foreshock.models.taps import Taps
from foreshock.models.transformer import Transformer


def run_again(
    sight: Sight, rows: WatchedRows, places: Collection[str], routed: bool
) -> tuple[Taps, tuple[Routing, ...]]:
    """Taps and routings of these rows at the present weights. Parameters, gradients, buffers, generators stay.

    Raises NoObjective where the model returns nothing that can be minimised.
    """
    anatomy, model = sight.anatomy, sight.anatomy.model
    device = next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    routers = RouterCapture(anatomy) if routed and not isinstance(model, Transformer) else None
    before, sight.apart = sight.apart, True
    try:
        with apart(device), torch.enable_grad(), taps_on(anatomy, places) as taps:
            if routers is not None:
                routers.__enter__()
            with torch.autocast(device.type, rows.autocast, enabled=rows.autocast is not None):
                output = rows.called(model, buffers)
            loss = rows.objective(output, anatomy.head_shape)
            weights = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(loss, weights, allow_unused=True)
    finally:
        sight.apart = before
        if routers is not None:
            routers.__exit__(None, None, None)
            sight.router_failure = routers.failure
    if isinstance(model, Transformer):
        return taps, output[2]
    return taps, routers.routings if routers is not None else ()
