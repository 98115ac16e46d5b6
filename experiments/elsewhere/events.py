"""Scalars of TensorBoard's event files, with TensorBoard's own reader (the extra ``tensorboard``)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

EXTRA = "reading TensorBoard's event files needs the extra tensorboard: pip install 'foreshock[tensorboard]'"


def read_events(path: Path) -> pd.DataFrame:
    """Rows tag, step, value of every scalar, in the order in which they were written, as text.

    path: an event file or a folder of them. Raises FileNotFoundError, and ValueError without the extra and where there
    is no scalar.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise ValueError(f"{path}: {EXTRA}") from None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}, purge_orphaned_data=False)
    events.Reload()
    rows = [(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    for tag in events.Tags()["tensors"]:  # where TensorFlow 2 keeps scalars
        for event in events.Tensors(tag):
            value = make_ndarray(event.tensor_proto)
            if value.size == 1 and value.dtype.kind in "fiu":
                rows.append((tag, event.step, float(value.reshape(()))))
    if not rows:
        raise ValueError(f"{path} holds no scalar: an event file of TensorBoard, or a folder of them, is needed")
    table = pd.DataFrame(rows, columns=["tag", "step", "value"]).map(str)
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table
