"""Which implementation of attention a model runs on: chosen before a run is named, because its results belong to it."""

from __future__ import annotations

import importlib.util

import torch

from foreshock.models.flash import D_HEADS, load_kernels, takes_d_head

BACKENDS = ("auto", "reference", "triton", "sdpa")
"""``reference``: ``models.attention``, plain PyTorch on any device. ``triton``: ``models.flash``, the same with the
speed of a GPU kernel. ``sdpa``: PyTorch's own, without fault sites. ``auto``: ``triton`` on a GPU where that can run,
else ``reference``."""

FAULT_SITES = ("reference", "triton")
"""Backends in which a fault can touch attention."""


def resolve_backend(name: str, device: torch.device, d_model: int, n_heads: int) -> str:
    """The backend that ``auto`` stands for on this device, or the named one.

    Raises ValueError, in one line that names the field, where the named one cannot run.
    """
    d_head = d_model // n_heads
    if name == "auto":
        runs = device.type == "cuda" and takes_d_head(d_head) and importlib.util.find_spec("triton") is not None
        return "triton" if runs else "reference"
    if name == "triton":
        if not takes_d_head(d_head):
            raise ValueError(
                f"model.d_model={d_model} with model.n_heads={n_heads} is d_head={d_head}, which "
                f"model.backend='triton' does not take: {D_HEADS}"
            )
        try:
            load_kernels(device)
        except (ModuleNotFoundError, ValueError) as error:
            raise ValueError(f"model.backend='triton' is not allowed here: {error}") from None
    return name
