"""Which tensors of the past a fault will read, known before the run begins."""

from __future__ import annotations

from foreshock.faults.base import Fault, Sites
from foreshock.faults.operation import Training
from foreshock.faults.past import Past
from foreshock.models.transformer import TransformerConfig, skeleton

POINTS = ("gradients", "weights")
"""The points whose operations may read the past of that point."""
BEGIN = "start"
"""The point whose past changes of modules may read: the weights with which a step begins."""


def past_of(fault: Fault, model: TransformerConfig, train: Training) -> Past:
    """An empty past that knows what to keep for this fault: nothing where no operation has a lookback."""
    reads: dict[tuple[str, int], tuple[int, frozenset[str]]] = {}
    healthy = Sites(batch_size=train.batch_size)
    for step in range(train.steps if fault.onset is None else fault.onset, train.steps):
        sites = fault.sites(step, healthy)
        for point in POINTS if sites is not healthy else ():
            for operation in getattr(sites, point):
                if operation.lookback_steps and not operation.idle:
                    key = point, step - operation.lookback_steps
                    names = operation.touches(name for name, _ in skeleton(model).named_parameters())
                    _, others = reads.get(key, (0, frozenset()))
                    reads[key] = step, others | frozenset(names)
        for change in sites.modules if sites is not healthy else ():
            if change.reads is not None and not change.idle:
                begin, name = change.reads
                _, others = reads.get((BEGIN, begin), (0, frozenset()))
                reads[BEGIN, begin] = step, others | {name}
    return Past(reads)
