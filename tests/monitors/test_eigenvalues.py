"""Eigenvalues of a batch at once against LAPACK's, and against closed forms."""

import math

import pytest
import torch

from monitors.eigenvalues import (
    eigenvalues_together,
    symmetric_eigenvalues,
    top_eigenvector_by_squaring,
)
from tests.models.attention_in_triton import DEVICE

bisection, tridiagonal = (
    pytest.importorskip(f"monitors.{name}", exc_type=ModuleNotFoundError) for name in ("bisection", "tridiagonal")
)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

REACH = 1e-14
"""Of an eigenvalue, over the largest magnitude."""


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_eigenvalues(symmetric, expected):
    got = eigenvalues_together(symmetric.to(DEVICE)).cpu()
    assert got.shape == expected.shape and (got.diff(dim=-1) >= 0).all()
    assert (got - expected).abs().max() <= REACH * expected.abs().amax()


@pytest.mark.parametrize("n", [2, 3, 13])
def test_of_gram_matrices(n):
    x = randn(2, n, n + 5)
    gram = x @ x.mT
    assert_eigenvalues(gram, torch.linalg.eigvalsh(gram))


@pytest.mark.parametrize("size", [1e-160, 1e-20, 1e160])
def test_of_indefinite_matrices_whatever_their_size(size):
    x = randn(2, 9, 9)
    assert_eigenvalues((x + x.mT) * size, torch.linalg.eigvalsh(x + x.mT) * size)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_of_matrices_of_low_rank(rank):
    x = randn(2, 6, rank)
    gram = x @ x.mT
    assert_eigenvalues(gram, torch.linalg.eigvalsh(gram))


def test_of_equal_eigenvalues():
    assert_eigenvalues(torch.eye(7).double()[None] * 3, torch.full((1, 7), 3.0).double())


def test_of_a_path_graph_has_a_closed_form():
    """The second difference: 2 - 2 cos(k pi / (n + 1))."""
    n = 9
    matrix = 2 * torch.eye(n).double() - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
    expected = 2 - 2 * (torch.arange(1, n + 1).double() * math.pi / (n + 1)).cos()
    assert_eigenvalues(matrix[None], expected[None])


def test_more_eigenvalues_than_a_program_has(monkeypatch):
    monkeypatch.setattr(bisection, "BLOCK", 4)
    x = randn(2, 7, 7)
    assert_eigenvalues(x + x.mT, torch.linalg.eigvalsh(x + x.mT))


def test_a_tridiagonal_matrix_stays_what_it_is():
    x = torch.diag_embed(randn(2, 6)) + torch.diag_embed(randn(2, 5, seed=1), 1)
    symmetric = x + x.triu(1).mT
    diagonal, squared = tridiagonal.tridiagonal(symmetric.to(DEVICE).clone())
    torch.testing.assert_close(diagonal.cpu(), symmetric.diagonal(dim1=-2, dim2=-1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(squared.cpu(), symmetric.diagonal(1, -2, -1) ** 2, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("n", "rows", "columns"), [(2, 16, 128), (5, 16, 128), (20, 16, 128), (13, 2, 4), (9, 4, 2)])
def test_a_reduction_keeps_the_spectrum(n, rows, columns, monkeypatch):
    """Whatever the tiles; a row that is clear from the start among them."""
    monkeypatch.setattr(tridiagonal, "ROWS", rows)
    monkeypatch.setattr(tridiagonal, "COLUMNS", columns)
    x = randn(3, n, n)
    symmetric = x + x.mT
    symmetric[0, 1:, 0] = symmetric[0, 0, 1:] = 0
    expected = torch.linalg.eigvalsh(symmetric)
    diagonal, squared = (part.cpu() for part in tridiagonal.tridiagonal(symmetric.to(DEVICE).clone()))
    made = torch.diag_embed(diagonal) + sum(torch.diag_embed(squared.sqrt(), offset) for offset in (1, -1))
    assert (torch.linalg.eigvalsh(made) - expected).abs().max() <= REACH * expected.abs().max()


def test_a_cpu_keeps_its_library():
    x = randn(2, 3, 40, 40)
    assert torch.equal(symmetric_eigenvalues(x + x.mT), torch.linalg.eigvalsh(x + x.mT))


@pytest.mark.parametrize("gap", [1.0, 1e-3, 1e-7])
@pytest.mark.parametrize("size", [1e-30, 1.0])
def test_squaring_finds_the_top_eigenvector(gap, size):
    basis = torch.linalg.qr(randn(2, 8, 8)).Q
    values = size * torch.tensor([1.0 + gap, 1.0, 0.5, 0.1, 1e-3, 1e-8, 0.0, 0.0], dtype=torch.float64)
    found = top_eigenvector_by_squaring(basis @ (values[:, None] * basis.mT))
    assert (found * basis[..., 0]).sum(-1).abs().sub(1).abs().max() <= 1e-9


def test_squaring_passes_nan_on_and_gives_it_for_zero():
    broken = torch.eye(3).double().repeat(2, 1, 1)
    broken[0] = 0
    broken[1, 0, 0] = math.nan
    assert top_eigenvector_by_squaring(broken).isnan().all()
