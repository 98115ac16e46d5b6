"""The attention_update family: what a window of training did to each head's W_Q, W_K, W_V and W_O.

Source: arXiv:2606.28116 sections 3.2 and 3.3, and its authors' design notes. A numeric fault in
attention's backward pushes the weights along one direction, so the spectrum of the update collapses
long before the weights themselves show it. Readings are FP64, (layers, heads) or (layers,); the heads of W_Q and W_O
are query heads, those of W_K and W_V key-value heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foreshock.models.anatomy import Anatomy, Heads
from foreshock.monitors.base import Lookback, Masked, Needs, Reading, Signal, StepView
from foreshock.monitors.spectra import qk_increment, singular_values, spectral_entropy, stable_rank

MATRICES = ("q", "k", "v", "o")
PER_HEAD = ("layer", "head")
PER_LAYER = ("layer",)
FAMILY = "attention_update"


def stack_matrix(weights: Mapping[str, Tensor], anatomy: Anatomy, matrix: str) -> Tensor:
    """One projection of every layer: (layers, heads x D, E), rows grouped by head (W_O is transposed for that)."""
    stacked = anatomy.stacked(matrix, weights)
    return stacked.mT if matrix == "o" else stacked


def head_blocks(stacked: Tensor, heads: Heads) -> Tensor:
    """Each head's rows of stacked projections: (..., heads x D, E) -> (..., heads, D, E)."""
    return stacked.unflatten(-2, (-1, heads.width))


def keys_per_query_head(stacked_k: Tensor, heads: Heads) -> Tensor:
    """W_K with each group's rows once for every query head that reads them: (..., G x D, E) -> (..., H x D, E)."""
    if heads.key_value == heads.query:
        return stacked_k
    return head_blocks(stacked_k, heads).repeat_interleave(heads.query // heads.key_value, -3).flatten(-3, -2)


def check_windows(every_steps: int, windows: Sequence[int]) -> None:
    if every_steps < 1:
        raise ValueError(f"monitor.every_steps={every_steps} is not allowed: at least 1")
    if not windows or len(set(windows)) != len(windows) or min(windows) < 1:
        raise ValueError(f"monitor.windows={list(windows)} is not allowed: distinct, at least 1 step each")


def lookbacks(windows: Sequence[int], every_steps: int) -> tuple[Lookback, ...]:
    """The attention matrices as they were each window ago."""
    return tuple(Lookback(window, every_steps, MATRICES) for window in windows)


def _spectrum_readings(name: Sequence[str], suffix: str, spectrum: Tensor) -> dict[str, Reading]:
    """Entropy, stable rank and norm of the named spectra (..., r). A zero spectrum has only a norm."""
    norm = torch.linalg.vector_norm(spectrum, dim=-1)
    empty = norm == 0
    return {
        f"{name[0]}.{suffix}": Masked(spectral_entropy(spectrum), empty),
        f"{name[1]}.{suffix}": Masked(stable_rank(spectrum), empty),
        f"{name[2]}.{suffix}": norm,
    }


def _head_spectra(blocks: Sequence[Tensor]) -> Sequence[Tensor]:
    """Singular values of every matrix's head blocks (..., heads, D, E), in one batched call."""
    return singular_values(torch.cat(tuple(blocks), -3)).split([of_matrix.shape[-3] for of_matrix in blocks], -2)


def _whole_spectra(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Singular values of every matrix (..., rows, E), in the order of ``MATRICES``; one batched call a shape."""
    q, k, v, o = matrices
    if q.shape == k.shape:
        return tuple(singular_values(torch.stack((q, k, v, o))))
    queries, keys = singular_values(torch.stack((q, o))), singular_values(torch.stack((k, v)))
    return queries[0], keys[0], keys[1], queries[1]


class DeltaW:
    """Spectrum of Delta W = W_t - W_(t - window), for W_Q, W_K, W_V and W_O.

    Signals, each per head block (``.q`` ...) and, if ``whole``, of the whole matrix (``.q_whole`` ...):
    ``delta_w_spectral_entropy`` H = -sum p ln p with p = sigma^2 / sum sigma^2, in nats, bad: down;
    ``delta_w_stable_rank`` ||.||_F^2 / ||.||_2^2, bad: down; ``delta_w_norm`` ||.||_F, bad: both.
    A zero update has no entropy and no stable rank: those readings are masked.

    windows: steps; every_steps: cadence. Raises ValueError on impossible ones.
    """

    def __init__(self, every_steps: int, windows: Sequence[int], whole: bool) -> None:
        check_windows(every_steps, windows)
        self.windows, self.whole, self.every_steps = tuple(windows), whole, every_steps
        self.needs = Needs(history=lookbacks(windows, every_steps), stackable=True)
        blocks: list[tuple[str, tuple[str, ...]]] = [(matrix, PER_HEAD) for matrix in MATRICES]
        blocks += [(f"{matrix}_whole", PER_LAYER) for matrix in MATRICES] if whole else []
        self.signals = tuple(
            Signal(f"{name}.{block}.w{window}", unit, bad, axes, every_steps, family=FAMILY)
            for window in windows
            for block, axes in blocks
            for name, unit, bad in (
                ("delta_w_spectral_entropy", "nats", "down"),
                ("delta_w_stable_rank", "1", "down"),
                ("delta_w_norm", "1", "both"),
            )
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        anatomy = view.anatomy
        known = {w: before for w in self.windows if (before := view.weights_before(w)) is not None}
        if not known:
            return {}
        now = view.anatomy.weights()

        def stacked_delta(matrix: str) -> Tensor:
            new = stack_matrix(now, anatomy, matrix).double()
            return torch.stack([new - stack_matrix(before, anatomy, matrix) for before in known.values()])

        # Every window of every layer goes through one batched call.
        delta = [stacked_delta(matrix) for matrix in MATRICES]
        spectra = {"": _head_spectra([head_blocks(of_matrix, anatomy.heads) for of_matrix in delta])}
        if self.whole:
            spectra["_whole"] = _whole_spectra(delta)
        readings: dict[str, Reading] = {}
        for index, window in enumerate(known):
            for kind, spectrum in spectra.items():
                for matrix, of_matrix in zip(MATRICES, spectrum, strict=True):
                    names = ("delta_w_spectral_entropy", "delta_w_stable_rank", "delta_w_norm")
                    readings |= _spectrum_readings(names, f"{matrix}{kind}.w{window}", of_matrix[index])
        return readings


class QKIncrement:
    """Spectra of the increment of each query head's W_Q W_K^T over a window, and the coupling of dW_Q and dW_K.

    W_K is that of the query head's group: the paper treats no groups, but scores depend on the same product.

    Delta1 = Delta2 + Delta3 is the increment, Delta2 its first order, Delta3 = dW_Q dW_K^T its second
    (``monitors.spectra.qk_increment``). Of each: ``.entropy`` in nats (bad: down), ``.stable_rank``
    (bad: down) and Frobenius ``.norm`` (bad: both). ``qk_coupling`` is
    ||Delta3||_F^2 / (||dW_Q||_F^2 ||dW_K||_F^2), in [0, 1], about 1/d_head for independent
    updates (bad: up). Where the window changed nothing, a reading is masked.
    """

    def __init__(self, every_steps: int, windows: Sequence[int]) -> None:
        check_windows(every_steps, windows)
        self.windows, self.every_steps = tuple(windows), every_steps
        self.needs = Needs(history=lookbacks(windows, every_steps), stackable=True)
        self.signals = tuple(
            Signal(f"{name}.w{window}", unit, bad, PER_HEAD, every_steps, family=FAMILY)
            for window in windows
            for name, unit, bad in (
                *(
                    (f"qk_{order}_spectrum.{statistic}", unit, bad)
                    for order in ("delta1", "delta2", "delta3")
                    for statistic, unit, bad in (
                        ("entropy", "nats", "down"),
                        ("stable_rank", "1", "down"),
                        ("norm", "1", "both"),
                    )
                ),
                ("qk_coupling", "1", "up"),
            )
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        anatomy = view.anatomy
        known = {w: before for w in self.windows if (before := view.weights_before(w)) is not None}
        if not known:
            return {}
        now = view.anatomy.weights()
        # Every window of every layer goes through one batched call.
        q0, k0 = (torch.stack([stack_matrix(b, anatomy, m) for b in known.values()]) for m in "qk")
        q1, k1 = (stack_matrix(now, anatomy, m).expand_as(w0) for m, w0 in (("q", q0), ("k", k0)))
        k0, k1 = (keys_per_query_head(k, anatomy.heads) for k in (k0, k1))
        spectra = qk_increment(q0, k0, q1, k1, anatomy.heads.query)
        dq, dk = (
            torch.linalg.matrix_norm((w1.double() - w0).unflatten(-2, (anatomy.heads.query, -1)))
            for w0, w1 in ((q0, q1), (k0, k1))
        )
        product = dq * dk
        coupling = (torch.linalg.vector_norm(spectra["delta3"], dim=-1) / product) ** 2

        readings: dict[str, Reading] = {}
        for index, window in enumerate(known):
            for order, spectrum in spectra.items():
                names = tuple(f"qk_{order}_spectrum.{statistic}" for statistic in ("entropy", "stable_rank", "norm"))
                readings |= _spectrum_readings(names, f"w{window}", spectrum[index])
            readings[f"qk_coupling.w{window}"] = Masked(coupling[index], product[index] == 0)
        return readings


class AttentionWeight:
    """Frobenius norm (bad: both) and stable rank (bad: down) of the attention matrices themselves, per layer.

    The paper's baselines that see nothing: ``weight_norm.q`` ... and ``weight_stable_rank.q`` ...
    """

    needs = Needs(roles=MATRICES, stackable=True)

    def __init__(self, every_steps: int) -> None:
        self.signals = tuple(
            Signal(f"{name}.{matrix}", "1", bad, PER_LAYER, every_steps, family=FAMILY)
            for name, bad in (("weight_norm", "both"), ("weight_stable_rank", "down"))
            for matrix in MATRICES
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        now = view.anatomy.weights()
        spectra = _whole_spectra([stack_matrix(now, view.anatomy, m) for m in MATRICES])
        readings: dict[str, Reading] = {}
        for matrix, spectrum in zip(MATRICES, spectra, strict=True):
            norm = torch.linalg.vector_norm(spectrum, dim=-1)
            readings[f"weight_norm.{matrix}"] = norm
            readings[f"weight_stable_rank.{matrix}"] = Masked(stable_rank(spectrum), norm == 0)
        return readings
