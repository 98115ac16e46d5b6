"""Eigenproblems side by side on the host are those of one batched call."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from foreshock.monitors import eigen
from foreshock.monitors.fragility import score_condition
from foreshock.monitors.spectra import singular_values
from foreshock.monitors.spectral_alignment import top_right_singular_vector

pytestmark = pytest.mark.numeric


def symmetric(*shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x @ x.mT


@pytest.mark.parametrize("lead", [(), (1,), (3, 50), (0,)])
def test_on_the_host_nothing_changes(lead):
    matrices = symmetric(*lead, 33, 33)
    (values,) = eigen.on_host(eigen.values_alone, matrices)
    again, vectors = eigen.on_host(eigen.values_and_vectors, matrices)
    assert vectors.shape == matrices.shape
    for found in (values, again):
        torch.testing.assert_close(found, torch.linalg.eigvalsh(matrices), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrices @ vectors, vectors * values[..., None, :])


def test_threads_born_later_have_as_many_of_their_own_as_before():
    torch.set_num_threads(2)
    eigen.on_host(eigen.values_alone, symmetric(4, 33, 33))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


def test_values_ascend_and_vectors_belong_to_them():
    matrices = symmetric(4, 20, 20)
    values, vectors = eigen.eigenvectors(matrices)
    assert torch.equal(eigen.eigenvalues(matrices), torch.linalg.eigvalsh(matrices))
    assert (values.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(matrices @ vectors, vectors * values[:, None, :])


@pytest.mark.parametrize(
    ("width", "batched", "on_gpu", "chosen"),
    [(33, False, True, True), (32, False, True, False), (33, True, True, False), (33, False, False, False)],
)
def test_the_host_takes_what_an_older_pytorch_would_do_one_by_one(monkeypatch, width, batched, on_gpu, chosen):
    """A tensor that says it is on a GPU: its device is all that is looked at."""

    class There(torch.Tensor):
        is_cuda = on_gpu

    asked = []
    monkeypatch.setattr(eigen, "BATCHED_ON_GPU", batched)
    monkeypatch.setattr(eigen, "on_host", lambda solve, x: asked.append(x) or solve(x))
    eigen._solve(eigen.values_alone, symmetric(2, width, width).as_subclass(There))
    assert bool(asked) == chosen


def test_monitors_ask_here(monkeypatch):
    asked = []
    monkeypatch.setattr(eigen, "_solve", lambda solve, x: asked.append(tuple(x.shape)) or solve(x))
    singular_values(torch.ones(2, 3, 5))
    score_condition(torch.ones(6, 4), torch.ones(6, 4))
    top_right_singular_vector(torch.ones(7, 9))
    assert asked == [(2, 3, 3), *[(4, 4)] * 4, (7, 7)]


def test_stacked_runs_are_one_call_on_the_host_too(monkeypatch):
    monkeypatch.setattr(eigen, "_solve", eigen.on_host)
    matrices = symmetric(3, 5, 8, 8)
    values, vectors = torch.vmap(eigen.eigenvectors)(matrices)
    torch.testing.assert_close(matrices @ vectors, vectors * values[..., None, :])
