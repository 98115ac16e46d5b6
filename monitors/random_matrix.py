"""Random-matrix scores of weight updates: how far above pure noise a spectrum stands, with no healthy run to compare.

A window's update is one matrix; what it would look like without any direction of its own can be made from itself.
Flipping the sign of every entry at random keeps the entries' sizes, row by row and column by column, and destroys
whatever they had in common (FlipPA: Hong, Sheng & Dobriban, arXiv:2012.02985). For comparison, the edge of the
Marchenko-Pastur law of equal-variance noise, above which a spike shows (Baik, Ben Arous & Peche 2005), and the
Tracy-Widom score of the largest eigenvalue (Johnstone 2001). Each has a threshold of its own, 1 or a quantile;
healthy updates are far from noise, so scores are calibrated all the same.

Shapes: H heads, D d_head, E d_model, F sign matrices. Everything is FP64.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor

from foreshock.monitors.attention_update import (
    PER_HEAD,
    check_windows,
    head_blocks,
    keys_per_query_head,
    lookbacks,
    stack_matrix,
)
from foreshock.monitors.base import Masked, Needs, Reading, Signal, StepView
from foreshock.monitors.spectra import increment_singular_values, singular_values, spectral_entropy
from foreshock.monitors.trailing import on_trailing_axes

TRACY_WIDOM_95 = 0.9793
"""95 % quantile of the Tracy-Widom law of real matrices (beta = 1)."""


@lru_cache(maxsize=8)
def random_signs(shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """The same +1 and -1 at every call, from a generator of its own: a monitor must not draw from the run's.

    They stay on the device: as many numbers as several copies of the weights take long to move there.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1).to(device)


def flip_edge_ratio(spectrum: Tensor, flipped: Tensor) -> Tensor:
    """sigma_1 over the largest sigma_1 of its sign-flipped copies; above 1: a component that noise does not have.

    spectrum: (..., r) singular values, descending; flipped: (F, ..., r) those of the copies. Returns (...), above
    0. With F copies and no structure it exceeds 1 with probability 1/(F + 1). NaN where both are zero.
    """
    return spectrum[..., 0] / flipped[..., 0].amax(0)


def flip_entropy_deficit(spectrum: Tensor, flipped: Tensor) -> Tensor:
    """Mean spectral entropy of the sign-flipped copies minus the spectrum's own, in nats; 0 for noise, up to ln r.

    Shapes as ``flip_edge_ratio``. NaN for zeros, or where anything is not finite.
    """
    return spectral_entropy(flipped).mean(0) - spectral_entropy(spectrum)


@lru_cache(maxsize=8)
def marchenko_pastur_median(ratio: float) -> float:
    """Median of the Marchenko-Pastur law with unit variance and aspect ratio m/n in (0, 1]."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} is not allowed: above 0, at most 1")
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max((high - x) * (x - low), 0.0)) / (2 * math.pi * ratio * x)

    return brentq(lambda x: quad(density, low, x)[0] - 0.5, low + 1e-9, high)


@on_trailing_axes
def noise_variance(spectrum: Tensor, m: int, n: int) -> Tensor:
    """Variance of an m x n matrix's noise entries from its median singular value (Gavish & Donoho 2014), m <= n.

    Robust to a few large components. spectrum: (..., m), descending, right to sqrt(n eps) of its largest as
    ``monitors.spectra.singular_values`` gives it. Returns (...), 0 where no more than that is left of more than half.
    """
    median = spectrum.quantile(0.5, dim=-1)
    resolution = math.sqrt(n * torch.finfo(spectrum.dtype).eps) * spectrum[..., 0]
    return torch.where(median <= resolution, 0.0, median) ** 2 / (n * marchenko_pastur_median(m / n))


def bbp_edge_ratio(spectrum: Tensor, m: int, n: int) -> Tensor:
    """sigma_1 over the noise edge s (sqrt m + sqrt n), s^2 by ``noise_variance``; above 1: a spike stands out.

    spectrum: (..., m) descending, of m x n matrices with m <= n. Returns (...). Inf or NaN without noise.
    """
    return spectrum[..., 0] / (noise_variance(spectrum, m, n).sqrt() * (math.sqrt(m) + math.sqrt(n)))


def tracy_widom_score(spectrum: Tensor, m: int, n: int) -> Tensor:
    """(sigma_1^2 / s^2 - mu) / tau with mu = (sqrt(n - 1) + sqrt m)^2, tau = sqrt(mu) (1/sqrt(n-1) + 1/sqrt m)^(1/3).

    Johnstone (2001); about Tracy-Widom of order 1 for pure noise: 95 % lie below 0.98. Shapes as ``bbp_edge_ratio``.
    """
    root = math.sqrt(n - 1) + math.sqrt(m)
    tau = root * (1 / math.sqrt(n - 1) + 1 / math.sqrt(m)) ** (1 / 3)
    return (spectrum[..., 0] ** 2 / noise_variance(spectrum, m, n) - root**2) / tau


class RandomMatrix:
    """Scores per layer and head, for the updates of W_Q and W_K over a window and for their Delta2; bad: up.

    Heads are query heads, but key heads for ``.k``; a query head's Delta2 takes the W_K of its group.
    ``delta_w_flip_edge.q`` and ``.k``, ``qk_delta2_flip_edge``: ``flip_edge_ratio``;
    ``qk_delta2_flip_deficit``: ``flip_entropy_deficit`` (nats);
    ``delta_w_bbp_edge.q``, ``.k`` and ``delta_w_tracy_widom.q``, ``.k``: the comparison.
    Delta2 = dW_Q W_K^T + W_Q dW_K^T (arXiv:2606.28116 eq. 4) is flipped in dW_Q and dW_K: W_Q and W_K stay what
    they are. A zero update, or one without noise, has no score: masked.

    window: steps; flips: sign-flipped copies. Raises ValueError on impossible ones.
    """

    def __init__(self, every_steps: int, window: int, flips: int) -> None:
        if window < 1:
            raise ValueError(f"monitor.random_matrix.window={window} is not allowed: at least 1 step")
        check_windows(every_steps, [window])
        if flips < 1:
            raise ValueError(f"monitor.random_matrix.flips={flips} is not allowed: at least 1")
        self.window, self.flips = window, flips
        self.needs = Needs(history=lookbacks([window], every_steps), stackable=True)
        limits = {"flip_edge": 1.0, "bbp_edge": 1.0, "tracy_widom": TRACY_WIDOM_95}
        scores: list[tuple[str, str, float | None]] = [
            (f"delta_w_{score}.{matrix}", "1", limit) for matrix in "qk" for score, limit in limits.items()
        ]
        scores += [("qk_delta2_flip_edge", "1", 1.0), ("qk_delta2_flip_deficit", "nats", None)]
        self.signals = tuple(
            Signal(f"{name}.w{window}", unit, "up", PER_HEAD, every_steps, family="random_matrix", above=limit)
            for name, unit, limit in scores
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        before = view.weights_before(self.window)
        if before is None:
            return {}
        anatomy = view.anatomy
        old, new = (
            torch.stack(
                (
                    stack_matrix(weights, anatomy, "q"),
                    keys_per_query_head(stack_matrix(weights, anatomy, "k"), anatomy.heads),
                )
            ).double()
            for weights in (before, anatomy.weights())
        )
        old, new = (head_blocks(w, anatomy.heads) for w in (old, new))  # (q and k, layers, H, D, E)
        shared = anatomy.heads.query // anatomy.heads.key_value
        return {f"{name}.w{self.window}": reading for name, reading in self._scores(old, new - old, shared).items()}

    def _scores(self, old: Tensor, delta: Tensor, shared: int) -> dict[str, Reading]:
        """shared: how many neighbouring query heads read one key head, whose own scores are given once."""
        flipped = random_signs((self.flips, *delta.shape), delta.device) * delta
        spectra = singular_values(torch.cat((delta[None], flipped)))
        m, n = sorted(delta.shape[-2:])
        zero = delta.eq(0).flatten(-2).all(-1)
        readings: dict[str, Reading] = {}
        for index, matrix in enumerate("qk"):
            heads = slice(None, None, shared if matrix == "k" else 1)
            of_matrix = spectra[:, index, :, heads]
            spectrum, copies = of_matrix[0], of_matrix[1:]
            nothing = zero[index, :, heads]
            noiseless = nothing | (noise_variance(spectrum, m, n) == 0)
            readings[f"delta_w_flip_edge.{matrix}"] = Masked(flip_edge_ratio(spectrum, copies), nothing)
            readings[f"delta_w_bbp_edge.{matrix}"] = Masked(bbp_edge_ratio(spectrum, m, n), noiseless)
            readings[f"delta_w_tracy_widom.{matrix}"] = Masked(tracy_widom_score(spectrum, m, n), noiseless)
        updates = torch.cat((delta[None], flipped))
        q0, k0 = (w.expand_as(updates[:, 0]) for w in old)
        delta2 = increment_singular_values(q0, updates[:, 0], k0, updates[:, 1])
        nothing = zero.all(0)
        readings["qk_delta2_flip_edge"] = Masked(flip_edge_ratio(delta2[0], delta2[1:]), nothing)
        readings["qk_delta2_flip_deficit"] = Masked(flip_entropy_deficit(delta2[0], delta2[1:]), nothing)
        return readings
