"""Symmetric eigenproblems, many at a time, wherever that is quickest."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from foreshock.monitors.trailing import on_trailing_axes

Solver = Callable[[Tensor], tuple[Tensor, ...]]

BATCHED_ON_GPU = torch.__version__ >= (2, 12)  # type: ignore[operator]  # the stub has no comparison with a tuple
"""Before, PyTorch hands a GPU matrices wider than 32 one after the other, some 2 ms each at a width of 100 (pytorch
#174674, #175585). A core of the host takes 0.1 ms for the eigenvalues at a width of 64, 0.5 ms at 128, 50 ms at 768,
and a reading of GPT-2 asks for thousands of the first. ``make gpu-gpt2`` times both ways."""

WIDEST_BATCHED = 32


def values_alone(symmetric: Tensor) -> tuple[Tensor, ...]:
    return (torch.linalg.eigvalsh(symmetric),)


def values_and_vectors(symmetric: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.eigh(symmetric))


def on_host(solve: Solver, symmetric: Tensor) -> tuple[Tensor, ...]:
    """``solve`` of matrices (..., n, n) by LAPACK on all cores of the host, whatever ``train.threads`` says of others.

    Each matrix is one core's; what is found goes back to its device.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lead, threads = symmetric.shape[:-2], torch.get_num_threads()
    matrices = symmetric.reshape(-1, *symmetric.shape[-2:]).cpu()
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = zip(*pool.map(solve, matrices.chunk(4 * cores)), strict=True)
            joined = [torch.cat(parts).to(symmetric.device) for parts in found]
    finally:
        torch.set_num_threads(threads)  # a worker's setting is the default of every thread born later
    return tuple(part.reshape(*lead, *part.shape[1:]) for part in joined)


def _solve(solve: Solver, symmetric: Tensor) -> tuple[Tensor, ...]:
    one_by_one = symmetric.is_cuda and symmetric.shape[-1] > WIDEST_BATCHED and not BATCHED_ON_GPU
    return on_host(solve, symmetric) if one_by_one else solve(symmetric)


@on_trailing_axes
def eigenvalues(symmetric: Tensor) -> Tensor:
    """Of symmetric matrices (..., n, n), of which the lower triangle is read: ascending, (..., n).

    By itself vmap would compute the vectors too, by another method. Raises torch.linalg.LinAlgError on NaN or Inf,
    where LAPACK does.
    """
    (values,) = _solve(values_alone, symmetric)
    return values


def _singular_values_alone(matrix: Tensor) -> tuple[Tensor, ...]:
    return (torch.linalg.svdvals(matrix),)


@on_trailing_axes
def small_singular_values(matrix: Tensor) -> Tensor:
    """Of matrices (..., m, n): descending, (..., min(m, n)), right to about eps sigma_max, the smallest ones too.

    ``monitors.spectra.singular_values`` is faster and right to sqrt(eps) sigma_max. NaN or Inf in a matrix gives NaN.
    """
    broken = ~torch.isfinite(matrix).all(-1).all(-1)
    healthy = torch.where(broken[..., None, None], 0.0, matrix)
    (values,) = on_host(_singular_values_alone, healthy) if healthy.is_cuda else _singular_values_alone(healthy)
    return torch.where(broken[..., None], torch.nan, values)


@on_trailing_axes
def eigenvectors(symmetric: Tensor) -> tuple[Tensor, ...]:
    """``eigenvalues``, and the vectors that belong to them as columns, (..., n, n); up to their signs."""
    return _solve(values_and_vectors, symmetric)
