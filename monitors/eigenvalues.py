"""Eigenvalues of many symmetric matrices at once, whichever the device.

On a GPU ``torch.linalg.eigvalsh`` (2.13) takes matrices wider than 32 one after another, for 1 to 5 ms each at widths
of 64 to 128 (pytorch issue 175585); a reading of the spectra of GPT-2 124M asks for thousands. There they are made
tridiagonal together, in one kernel or, wider ones, by one reflection of all of them after another, and their
eigenvalues found by bisection.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

ONE_KERNEL_WIDTH = 32
"""Up to here a GPU's library takes a batch as a whole."""

SQUARINGS = 30
"""Eigenvalues apart by 2^-30 of themselves are e to the one apart after these; FP32's rounding moves them by more."""


def symmetric_eigenvalues(symmetric: Tensor) -> Tensor:
    """Ascending, (..., n, n) -> (..., n), FP64, finite, no empty batch; off by about 1e-16 of the largest magnitude."""
    n = symmetric.shape[-1]
    if not symmetric.is_cuda or n <= ONE_KERNEL_WIDTH or find_spec("triton") is None:
        return torch.linalg.eigvalsh(symmetric)
    return eigenvalues_together(symmetric.reshape(-1, n, n)).view(symmetric.shape[:-1])


def eigenvalues_together(symmetric_Bnn: Tensor) -> Tensor:
    """As ``symmetric_eigenvalues``, (B, n, n) -> (B, n), in as many operations for many matrices as for one; n from 2.

    It needs Triton, which most machines without a GPU do not have.
    """
    from monitors.bisection import tridiagonal_eigenvalues
    from monitors.tridiagonal_kernel import WIDEST, tridiagonal_in_registers

    scale = symmetric_Bnn.abs().amax((-1, -2))
    scale = torch.where(scale > 0, scale, 1.0)  # squares neither overflow nor vanish
    reduced = tridiagonal_in_registers if symmetric_Bnn.shape[-1] <= WIDEST else tridiagonal
    return tridiagonal_eigenvalues(*reduced(symmetric_Bnn / scale[:, None, None])) * scale[:, None]


def tridiagonal(symmetric_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal, (B, n), and squared off-diagonal, (B, n - 1), of tridiagonal matrices with the same eigenvalues.

    Householder's reduction: with x the first column below the diagonal, v = x + sign(x_1) |x| e_1 and
    h = |v|^2 / 2, the reflection 1 - v v^T / h turns x to one entry of size |x|, and the rest A to A - v w^T - w v^T,
    w = u - (v.u / 2h) v, u = A v / h (Golub & Van Loan, section 8.3.1). ``symmetric_Bnn`` is overwritten.
    """
    rest, n = symmetric_Bnn, symmetric_Bnn.shape[-1]
    diagonal, squared = rest.new_empty(len(rest), n), rest.new_empty(len(rest), n - 1)
    for k in range(n - 1):
        diagonal[:, k] = rest[:, 0, 0]
        v, rest = rest[:, 1:, 0].clone(), rest[:, 1:, 1:]
        size2 = torch.linalg.vecdot(v, v)
        squared[:, k] = size2
        first, size = v[:, 0], size2.sqrt()
        h = (size2 + size * first.abs()).clamp_min_(torch.finfo(rest.dtype).tiny)[:, None]  # 0 where v is
        first += torch.copysign(size, first)
        u = torch.bmm(rest, v[..., None])[..., 0] / h
        w = u - v * (torch.linalg.vecdot(v, u)[:, None] / (2 * h))
        rest.baddbmm_(torch.stack((v, w), -1), torch.stack((w, v), -2), alpha=-1)
    diagonal[:, -1] = rest[:, 0, 0]
    return diagonal, squared


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
