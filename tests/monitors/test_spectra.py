"""Spectral statistics against closed forms, and the QK increment against dense SVDs of E x E products."""

import math

import numpy as np
import pytest
import torch

from foreshock.monitors.spectra import qk_increment, singular_values, spectral_entropy, stable_rank
from tests.rounding_bounds import FP64, gamma

pytestmark = pytest.mark.numeric

ORDERS = ("delta1", "delta2", "delta3")
SHAPES = {"2D<E": (32, 4, 8), "2D=E": (32, 2, 16), "2D>E": (16, 1, 16), "rows!=E": (40, 3, 4), "D=1": (8, 2, 1)}
"""E, H, D."""


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(E, H, D, step=1.0, lead=()):
    """W_Q and W_K before and after an update of relative size ``step``."""
    q0, k0, dq, dk = (randn(*lead, H * D, E, seed=seed) for seed in range(4))
    return q0, k0, q0 + step * dq, k0 + step * dk


def dense(q0, k0, q1, k1, H):
    """Singular values of the formed E x E products, the largest min(2D, E) or D; no cancellation in delta1."""
    q0, k0, q1, k1 = (w.unflatten(-2, (H, -1)).mT for w in (q0, k0, q1, k1))  # (..., H, E, D)
    dq, dk = q1 - q0, k1 - k0
    E, D = q0.shape[-2:]
    products = {"delta1": dq @ k1.mT + q0 @ dk.mT, "delta2": dq @ k0.mT + q0 @ dk.mT, "delta3": dq @ dk.mT}
    ranks = {"delta1": min(2 * D, E), "delta2": min(2 * D, E), "delta3": D}
    return {name: torch.linalg.svdvals(product)[..., : ranks[name]] for name, product in products.items()}


def norm(spectrum):
    return torch.linalg.vector_norm(spectrum, dim=-1)


def assert_same_spectra(got, expected, rtol=1e-10):
    """Entropy, norm and largest values to ``rtol``; every value to 1e-7 of the largest (a Gram matrix's reach)."""
    assert set(got) == set(expected) == set(ORDERS)
    for name in ORDERS:
        a, b = got[name], expected[name]
        assert a.shape == b.shape and a.dtype is torch.float64, name
        for statistic, atol in ((spectral_entropy, rtol), (stable_rank, 0), (norm, 0)):  # NaN for a zero spectrum
            torch.testing.assert_close(statistic(a), statistic(b), rtol=rtol, atol=atol, equal_nan=True, msg=name)
        assert ((a - b).abs() <= 1e-7 * b[..., :1]).all(), name
        assert (a.diff(dim=-1) <= 0).all(), name


class TestEntropy:
    @pytest.mark.parametrize("alpha", [1.0, 2.0])
    @pytest.mark.parametrize("r", [1, 2, 7, 64])
    def test_of_equal_values_is_ln_r(self, r, alpha):
        assert spectral_entropy(torch.full((r,), 3.0).double(), alpha).item() == pytest.approx(math.log(r), abs=1e-14)

    @pytest.mark.parametrize("alpha", [1.0, 2.0])
    def test_of_rank_one_is_zero(self, alpha):
        assert spectral_entropy(torch.tensor([0.0, 5.0, 0.0]), alpha).item() == 0

    @pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
    def test_of_two_levels(self, alpha):
        """m values x and n values 1: weights x^alpha and 1."""
        m, n, x = 3, 5, 1.7
        total = m * x**alpha + n
        p, r = x**alpha / total, 1 / total
        expected = -m * p * math.log(p) - n * r * math.log(r)
        spectrum = torch.tensor([1.0] * n + [x] * m, dtype=torch.float64)
        assert spectral_entropy(spectrum, alpha).item() == pytest.approx(expected, rel=1e-14)

    def test_takes_squares_by_default(self):
        spectrum = randn(6).abs()
        assert torch.equal(spectral_entropy(spectrum), spectral_entropy(spectrum, 2.0))
        assert not torch.isclose(spectral_entropy(spectrum), spectral_entropy(spectrum, 1.0))

    @pytest.mark.parametrize("scale", [1e150, 1e-150, 2.0**1000, 2.0**-1000])
    def test_ignores_the_scale(self, scale):
        spectrum = randn(9).abs()
        assert spectral_entropy(spectrum * scale).item() == pytest.approx(spectral_entropy(spectrum).item(), rel=1e-14)

    def test_ignores_the_order(self):
        spectrum = randn(9).abs()
        torch.testing.assert_close(spectral_entropy(spectrum.flip(-1)), spectral_entropy(spectrum), rtol=1e-15, atol=0)

    @pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
    def test_refuses_an_alpha_that_is_not_positive(self, alpha):
        with pytest.raises(ValueError, match=f"alpha={alpha} "):
            spectral_entropy(torch.ones(3), alpha)


def test_stable_rank_by_hand():
    spectra = torch.tensor([[2.0, 1.0, 1.0], [0.0, 3.0, 0.0], [5.0, 5.0, 5.0]])
    assert stable_rank(spectra).tolist() == [1.5, 1.0, 3.0]
    assert stable_rank(torch.tensor([2e150, 1e150], dtype=torch.float64)).item() == pytest.approx(1.25, rel=1e-15)


@pytest.mark.parametrize("statistic", [spectral_entropy, stable_rank])
def test_statistics_take_the_last_axis(statistic):
    spectra = randn(2, 3, 5).abs()
    got = statistic(spectra)
    assert got.shape == (2, 3)
    expected = torch.stack([torch.stack([statistic(spectrum) for spectrum in row]) for row in spectra])
    torch.testing.assert_close(got, expected, rtol=2 * gamma(20, FP64), atol=0)  # two sums of 5 squares, logarithms


@pytest.mark.parametrize("broken", [[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0], [math.inf, math.inf]])
@pytest.mark.parametrize("statistic", [spectral_entropy, stable_rank])
def test_a_spectrum_without_a_statistic_gives_nan_alone(statistic, broken):
    got = statistic(torch.tensor([[1.0, 1.0], broken, [1.0, 0.0]]))
    assert got.isnan().tolist() == [False, True, False]


class TestSingularValues:
    @pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (1, 6), (6, 1), (2, 3, 4, 7), (2, 7, 4)])
    def test_equal_those_of_a_dense_svd(self, shape):
        got, expected = singular_values(randn(*shape)), torch.linalg.svdvals(randn(*shape))
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)

    def test_are_within_1e8_of_the_largest_when_ill_conditioned(self):
        u, _, v = torch.linalg.svd(randn(8, 8))
        sigma = torch.logspace(0, -12, 8, dtype=torch.float64)
        got = singular_values(u * sigma @ v)
        assert ((got - sigma).abs() <= 3e-8).all()
        torch.testing.assert_close(got[:3], sigma[:3], rtol=1e-8, atol=0)
        torch.testing.assert_close(spectral_entropy(got), spectral_entropy(sigma), rtol=1e-12, atol=0)

    def test_are_fp64_of_fp32_weights(self):
        got = singular_values(randn(4, 6).float())
        assert got.dtype is torch.float64
        torch.testing.assert_close(got, torch.linalg.svdvals(randn(4, 6).float().double()), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_of_a_broken_matrix_are_nan_alone(self, value):
        matrices = randn(3, 4, 6)
        healthy = singular_values(matrices)
        matrices[1, 2, 3] = value
        got = singular_values(matrices)
        assert got[1].isnan().all() and torch.equal(got[[0, 2]], healthy[[0, 2]])

    def test_of_zeros_are_zeros(self):
        assert torch.equal(singular_values(torch.zeros(3, 5)), torch.zeros(3).double())


@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize(("E", "H", "D"), SHAPES.values(), ids=SHAPES)
class TestQKIncrement:
    def test_equals_the_dense_svd(self, E, H, D, step):
        w = weights(E, H, D, step)
        assert_same_spectra(qk_increment(*w, H), dense(*w, H))

    def test_of_one_direction(self, E, H, D, step):
        """Rank-1 updates, as from the paper's fault: Delta2 has rank 2, Delta3 rank 1."""
        q0, k0, _, _ = weights(E, H, D)
        one = step * randn(H * D, 1, seed=5) * randn(1, E, seed=6)
        two = step * randn(H * D, 1, seed=7) * randn(1, E, seed=8)
        w = (q0, k0, q0 + one, k0 + two)
        got = qk_increment(*w, H)
        assert_same_spectra(got, dense(*w, H))
        assert (spectral_entropy(got["delta2"]) <= math.log(2) + 1e-9).all()
        assert (spectral_entropy(got["delta3"]).abs() <= 1e-9).all()

    @pytest.mark.parametrize("still", ["q", "k"])
    def test_of_one_weight_that_stands_still(self, E, H, D, step, still):
        q0, k0, q1, k1 = weights(E, H, D, step)
        w = (q0, k0, q0, k1) if still == "q" else (q0, k0, q1, k0)
        got, expected = qk_increment(*w, H), dense(*w, H)
        assert torch.equal(got["delta3"], torch.zeros(H, D).double())
        for name in ("delta1", "delta2"):
            for statistic in (spectral_entropy, norm):
                a, b = statistic(got[name]), statistic(expected[name])
                torch.testing.assert_close(a, b, rtol=1e-10, atol=0 if statistic is norm else 1e-12)

    def test_where_a_base_weight_is_rank_deficient(self, E, H, D, step):
        """The Cholesky factorisation of its Gram matrix stops; one such head sends the batch to QR."""
        q0, k0, q1, k1 = weights(E, H, D, step)
        dq, q0 = q1 - q0, q0.clone()
        q0[0] = 0.0  # head 0
        if D > 1:
            q0[D - 1] = q0[D // 2]
        w = (q0, k0, q0 + dq, k1)
        assert_same_spectra(qk_increment(*w, H), dense(*w, H))

    def test_where_the_update_is_rank_deficient(self, E, H, D, step):
        q0, k0, q1, k1 = weights(E, H, D, step)
        q1[0], k1[-1] = q0[0], k0[-1]
        assert_same_spectra(qk_increment(q0, k0, q1, k1, H), dense(q0, k0, q1, k1, H))

    def test_splits_into_first_and_second_order(self, E, H, D, step):
        """||Delta2 + Delta3|| = ||Delta1|| is expanded by its inner product, taken from D x D matrices."""
        q0, k0, q1, k1 = weights(E, H, D, step)
        got = {name: s.square().sum(-1) for name, s in qk_increment(q0, k0, q1, k1, H).items()}
        a, b, c, d = ((w.unflatten(-2, (H, -1))) for w in (q0, k0, q1 - q0, k1 - k0))
        # <dQ K0^T + Q0 dK^T, dQ dK^T> = <dQ dQ^T, K0 dK^T> + <Q0 dQ^T, dK dK^T>, heads as (D, E) rows
        inner = ((c @ c.mT) * (b @ d.mT)).sum((-1, -2)) + ((a @ c.mT) * (d @ d.mT)).sum((-1, -2))
        torch.testing.assert_close(got["delta1"], got["delta2"] + 2 * inner + got["delta3"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [1e-9, 1e-12])
@pytest.mark.parametrize(("E", "H", "D"), SHAPES.values(), ids=SHAPES)
def test_delta1_does_not_cancel(E, H, D, step):
    """Against W_Q1 W_K1^T - W_Q0 W_K0^T in extended precision; in FP64 that difference is visibly wrong."""
    q0, k0, q1, k1 = w = weights(E, H, D, step)
    got = qk_increment(*w, H)["delta1"]
    for head in range(H):
        rows = slice(head * D, (head + 1) * D)
        long = [x[rows].numpy().astype(np.longdouble) for x in w]
        right = torch.from_numpy((long[2].T @ long[3] - long[0].T @ long[1]).astype(np.float64))
        naive = torch.linalg.matrix_norm(q1[rows].T @ k1[rows] - q0[rows].T @ k0[rows] - right) / right.norm()
        eps = 2.0**-64 / step  # what is left of extended precision
        expected = torch.linalg.svdvals(right)[: got.shape[-1]]
        torch.testing.assert_close(got[head], expected, rtol=0, atol=(1e-7 * expected[0]).item())
        torch.testing.assert_close(got[head].norm(), right.norm(), rtol=20 * eps + 1e-13, atol=0)
        torch.testing.assert_close(got[head, 0], expected[0], rtol=20 * eps + 1e-12, atol=0)
        assert naive > 1e-17 / step


@pytest.mark.parametrize(("E", "H", "D"), SHAPES.values(), ids=SHAPES)
class TestQKIncrementEdges:
    def test_nothing_changed_gives_zeros(self, E, H, D):
        q0, k0, _, _ = weights(E, H, D)
        got = qk_increment(q0, k0, q0, k0, H)
        for name, width in (("delta1", min(2 * D, E)), ("delta2", min(2 * D, E)), ("delta3", D)):
            assert torch.equal(got[name], torch.zeros(H, width).double()), name

    def test_all_zero_weights_give_zeros(self, E, H, D):
        zero = torch.zeros(H * D, E)
        assert all((s == 0).all() for s in qk_increment(zero, zero, zero, zero, H).values())

    def test_growth_from_zero_is_second_order_alone(self, E, H, D):
        zero, (_, _, q1, k1) = torch.zeros(H * D, E).double(), weights(E, H, D)
        got = qk_increment(zero, zero, q1, k1, H)
        assert (got["delta2"] == 0).all()
        torch.testing.assert_close(got["delta1"][:, :D], got["delta3"], rtol=1e-9, atol=0)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("which", range(4))
    def test_a_broken_head_gives_nan_alone(self, E, H, D, which, value):
        w = [x.clone() for x in weights(E, H, D, 1e-3)]
        healthy = qk_increment(*w, H)
        w[which][0, 0] = value
        got = qk_increment(*w, H)
        for name in ORDERS:
            assert got[name][0].isnan().all(), name
        assert_same_spectra({name: got[name][1:] for name in ORDERS}, {name: healthy[name][1:] for name in ORDERS})

    def test_leading_dimensions_are_a_loop(self, E, H, D):
        w = weights(E, H, D, 1e-2, lead=(2, 3))
        w[0][1, 2, 0] = w[2][1, 2, 0] = 0.0  # one rank-deficient entry
        got = qk_increment(*w, H)
        for i in range(2):
            for j in range(3):
                one = qk_increment(*(x[i, j] for x in w), H)
                assert_same_spectra({name: got[name][i, j] for name in ORDERS}, one, rtol=1e-11)


def test_a_rank_deficient_update_changes_no_bit_of_its_neighbours():
    """One factorisation serves a batch, in which the matrices of several runs may stand."""
    E, H, D = SHAPES["2D<E"]
    healthy = weights(E, H, D, lead=(2,))
    deficient = [w.clone() for w in healthy]
    deficient[2][1] = deficient[0][1]  # no update of W_Q at all
    expected, got = qk_increment(*healthy, H), qk_increment(*deficient, H)
    for name in ORDERS:
        assert torch.equal(got[name][0], expected[name][0]), name
    assert (got["delta3"][1] == 0).all() and (got["delta2"][1] > 0).any()


def test_fp32_weights_are_subtracted_in_fp64():
    q0, k0, q1, k1 = (w.float() for w in weights(32, 4, 8, 1e-6))
    assert_same_spectra(qk_increment(q0, k0, q1, k1, 4), dense(*(w.double() for w in (q0, k0, q1, k1)), 4))


def test_the_weights_are_not_written():
    w = weights(32, 4, 8)
    before = [x.clone() for x in w]
    qk_increment(*w, 4)
    assert all(torch.equal(x, y) for x, y in zip(w, before, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    w = torch.zeros(8, 16)
    with pytest.raises(ValueError, match=r"\(8, 15\), \(8, 16\)"):
        qk_increment(w, w, w, torch.zeros(8, 15), 2)
    for n_heads in (3, 0, -1):
        with pytest.raises(ValueError, match=f"n_heads={n_heads} .*8 rows"):
            qk_increment(w, w, w, w, n_heads)
