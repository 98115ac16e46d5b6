"""The eigenvalues that monitors of spectra ask for: their way against the library's, which is a loop on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from experiments.gpt2_training import in_turns
from monitors.eigenvalues import symmetric_eigenvalues

TURNS = 3
LARGEST_ERROR = 1e-12
"""Over the largest eigenvalue of the same matrix."""


def eigenvalue_costs(shapes: Iterable[tuple[int, int]], device: torch.device) -> dict[str, Any]:
    """Milliseconds of both, and how far apart they are, for so many Gram matrices of such a width."""
    found: dict[str, Any] = {}
    for matrices, width in shapes:
        rows = torch.randn(
            matrices, width, 2 * width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).to(device)
        gram = rows @ rows.mT
        ways = {"monitors": partial(symmetric_eigenvalues, gram), "library": partial(torch.linalg.eigvalsh, gram)}
        ours, theirs = (way() for way in ways.values())
        error = ((ours - theirs).abs().amax(-1) / theirs[:, -1]).amax().item()
        taken = in_turns(ways, device, TURNS)
        found[f"{matrices} of width {width}"] = {
            **{f"{name}_ms": 1e3 * value for name, value in taken.items()},
            "error": error,
        }
    return found | {"ok": all(one["error"] <= LARGEST_ERROR for one in found.values())}
