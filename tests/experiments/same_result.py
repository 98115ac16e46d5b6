"""Whether two finished runs came to the same bits."""

from pathlib import Path

import numpy as np

from foreshock.experiments import trace

WEIGHTS = "weights.safetensors"


def assert_same_result(one: Path, other: Path) -> None:
    """The same final weights, and of every signal the same steps, values (NaN where the other has it) and mask."""
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    a, b = trace.read(one).signals, trace.read(other).signals
    assert a.keys() == b.keys()
    for name in a:
        for field in ("steps", "values", "undefined"):
            np.testing.assert_array_equal(getattr(a[name], field), getattr(b[name], field), name)
