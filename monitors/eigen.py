"""Symmetric eigenproblems, many at a time, wherever that is quickest."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from monitors.trailing import on_trailing_axes

Solver = Callable[[Tensor], tuple[Tensor, ...]]

BATCHED_ON_GPU = torch.__version__ >= (2, 12)
"""Before, PyTorch hands a GPU matrices wider than 32 one after the other (pytorch #175585), 2 ms and more for each. A
reading of GPT-2 has thousands, and the host's cores side by side are an order of magnitude quicker."""

WIDEST_BATCHED = 32


def values_alone(symmetric: Tensor) -> tuple[Tensor, ...]:
    return (torch.linalg.eigvalsh(symmetric),)


def values_and_vectors(symmetric: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.eigh(symmetric))


def on_host(solve: Solver, symmetric: Tensor) -> tuple[Tensor, ...]:
    """``solve`` of matrices (..., n, n) by LAPACK on all cores of the host, each matrix on one; back on its device."""
    lead, cores, threads = symmetric.shape[:-2], len(os.sched_getaffinity(0)), torch.get_num_threads()
    matrices = symmetric.reshape(-1, *symmetric.shape[-2:]).cpu()
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = zip(*pool.map(solve, matrices.chunk(4 * cores)), strict=True)
            joined = [torch.cat(parts).to(symmetric.device) for parts in found]
    finally:
        torch.set_num_threads(threads)  # what a worker sets is the process's
    return tuple(part.reshape(*lead, *part.shape[1:]) for part in joined)


def _solve(solve: Solver, symmetric: Tensor) -> tuple[Tensor, ...]:
    one_by_one = symmetric.is_cuda and symmetric.shape[-1] > WIDEST_BATCHED and not BATCHED_ON_GPU
    return on_host(solve, symmetric) if one_by_one else solve(symmetric)


@on_trailing_axes
def eigenvalues(symmetric: Tensor) -> Tensor:
    """Of symmetric matrices (..., n, n), of which the lower triangle is read: ascending, (..., n). vmap keeps to it.

    Raises torch.linalg.LinAlgError on NaN or Inf, where LAPACK does.
    """
    (values,) = _solve(values_alone, symmetric)
    return values


@on_trailing_axes
def eigenvectors(symmetric: Tensor) -> tuple[Tensor, ...]:
    """``eigenvalues``, and the vectors that belong to them as columns, (..., n, n); up to their signs."""
    return _solve(values_and_vectors, symmetric)
