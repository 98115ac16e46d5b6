"""Eigenvalues of many symmetric matrices at once, whichever the device.

On a GPU ``torch.linalg.eigvalsh`` (2.10) takes matrices wider than 32 one after another, for 1 to 5 ms each at widths
of 64 to 128 (pytorch issue 175585); a reading of the spectra of GPT-2 124M asks for thousands. There they are made
tridiagonal together, and their eigenvalues found by bisection.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from monitors.trailing import on_trailing_axes

ONE_KERNEL_WIDTH = 32
"""Up to here a GPU's library takes a batch as a whole."""

SQUARINGS = 30
"""Eigenvalues apart by 2^-30 of themselves are e to the one apart after these; FP32's rounding moves them by more."""


@on_trailing_axes
def symmetric_eigenvalues(symmetric: Tensor) -> Tensor:
    """Ascending, (..., n, n) -> (..., n), FP64, finite, no empty batch; off by about 1e-16 of the largest magnitude.

    vmap would have ``torch.linalg.eigvalsh`` compute the vectors too, by another method.
    """
    n = symmetric.shape[-1]
    if not symmetric.is_cuda or n <= ONE_KERNEL_WIDTH or find_spec("triton") is None:
        return torch.linalg.eigvalsh(symmetric)
    return eigenvalues_together(symmetric.reshape(-1, n, n)).view(symmetric.shape[:-1])


def eigenvalues_together(symmetric_Bnn: Tensor) -> Tensor:
    """As ``symmetric_eigenvalues``, (B, n, n) -> (B, n), in as many operations for many matrices as for one; n from 2.

    It needs Triton, which most machines without a GPU do not have.
    """
    from monitors.bisection import tridiagonal_eigenvalues
    from monitors.tridiagonal import tridiagonal

    scale = symmetric_Bnn.abs().amax((-1, -2))
    scale = torch.where(scale > 0, scale, 1.0)  # squares neither overflow nor vanish
    return tridiagonal_eigenvalues(*tridiagonal(symmetric_Bnn / scale[:, None, None])) * scale[:, None]


def top_eigenvector(semidefinite: Tensor) -> Tensor:
    """Of the largest eigenvalue, up to its sign: (..., n, n), no negative eigenvalue -> (..., n), in its dtype.

    On a GPU NaN for a zero matrix.
    """
    if not semidefinite.is_cuda:
        return torch.linalg.eigh(semidefinite).eigenvectors[..., -1]
    return top_eigenvector_by_squaring(semidefinite)


def top_eigenvector_by_squaring(semidefinite: Tensor) -> Tensor:
    """As ``top_eigenvector``, from the column that A^(2^k) tends to: u u^T, u the eigenvector; in FP64 inside."""
    power = semidefinite.double()
    for _ in range(SQUARINGS):
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        power = power @ power
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1, keepdim=True)
    column = power.gather(-1, largest[..., None, :].expand(*power.shape[:-1], 1))[..., 0]
    return (column / torch.linalg.vector_norm(column, dim=-1, keepdim=True)).to(semidefinite.dtype)
