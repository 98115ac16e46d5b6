"""Random-matrix scores: exact on known laws, silent on noise, loud on one planted direction."""

from __future__ import annotations

import math

import pytest
import torch

from foreshock.monitors.base import StepView
from foreshock.monitors.random_matrix import (
    TRACY_WIDOM_95,
    RandomMatrix,
    bbp_edge_ratio,
    flip_edge_ratio,
    flip_entropy_deficit,
    marchenko_pastur_median,
    noise_variance,
    random_signs,
    tracy_widom_score,
)
from foreshock.monitors.spectra import increment_singular_values, singular_values

pytestmark = pytest.mark.numeric

M, N = 32, 64


def noise(count: int, seed: int = 1, m: int = M, n: int = N) -> torch.Tensor:
    return torch.randn(count, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flipped_spectra(matrix: torch.Tensor, flips: int) -> torch.Tensor:
    return singular_values(random_signs((flips, *matrix.shape)) * matrix)


def test_signs_are_fair_fixed_and_leave_the_runs_generator_alone():
    state = torch.get_rng_state()
    signs = random_signs((4, 100, 100))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / 200
    assert torch.equal(signs, random_signs.__wrapped__((4, 100, 100)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("flips", [1, 4])
def test_without_structure_the_edge_is_passed_once_in_flips_plus_one(flips):
    """The flipped copies of symmetric noise are exchangeable with it, whatever the entries' variances."""
    variances = torch.linspace(0.1, 3.0, M, dtype=torch.float64)[:, None]
    matrices = noise(1500) * variances
    passed = (flip_edge_ratio(singular_values(matrices), flipped_spectra(matrices, flips)) > 1).double().mean()
    expected = 1 / (flips + 1)
    assert abs(passed - expected) < 4 * math.sqrt(expected * (1 - expected) / 1500)


def test_one_planted_direction_passes_every_edge():
    left, right = noise(1, 2, 200, M)[0], noise(1, 3, 200, N)[0]
    spikes = left[:, :, None] * right[:, None, :] / math.sqrt(M * N) * 2 * (math.sqrt(M) + math.sqrt(N))
    spectrum, flipped = singular_values(noise(200) + spikes), flipped_spectra(noise(200) + spikes, 4)
    assert (flip_edge_ratio(spectrum, flipped) > 1).all()
    assert (flip_entropy_deficit(spectrum, flipped) > 0.05).all()
    assert (bbp_edge_ratio(spectrum, M, N) > 1).all()
    assert (tracy_widom_score(spectrum, M, N) > TRACY_WIDOM_95).all()


def test_one_rank_one_matrix_has_the_deficit_of_a_single_component():
    flat = torch.ones(1, M, N, dtype=torch.float64)
    spectrum, flipped = singular_values(flat), flipped_spectra(flat, 8)
    assert flip_entropy_deficit(spectrum, flipped).item() == pytest.approx(
        -(flipped**2 / (M * N)).mul((flipped**2 / (M * N)).log()).sum(-1).mean().item(), rel=1e-9
    )
    assert flip_edge_ratio(spectrum, flipped).item() == pytest.approx(math.sqrt(M * N) / flipped.max().item())


@pytest.mark.parametrize(("ratio", "median"), [(1.0, 0.6528), (0.5, 0.8304), (0.1, 0.9669)])
def test_marchenko_pastur_median(ratio, median):
    """Against the empirical law of a large matrix, and within 0.5 % of it."""
    n = 2000
    m = int(n * ratio)
    values = singular_values(noise(1, 5, m, n)[0]) ** 2 / n
    assert marchenko_pastur_median(ratio) == pytest.approx(values.median().item(), rel=5e-3)
    assert marchenko_pastur_median(ratio) == pytest.approx(median, abs=2e-3)


def test_noise_variance_ignores_a_spike():
    matrices = noise(400) * 0.3
    matrices[:, 0] += 50.0
    assert noise_variance(singular_values(matrices), M, N).mean().item() == pytest.approx(0.09, rel=0.05)


def test_tracy_widom_quantile_of_noise():
    """5 % lie above for the true variance; its estimate from one matrix widens the score a little."""
    m, n = 100, 400
    spectrum = singular_values(noise(1000, 7, m, n))
    above = (tracy_widom_score(spectrum, m, n) > TRACY_WIDOM_95).double().mean().item()
    assert 0.03 < above < 0.12


def test_flipping_reaches_delta2_through_the_updates_alone():
    """A zero key update leaves Delta2 = dW_Q^T W_K, whose flipped copies are those of dW_Q."""
    old, dq = noise(1, 8, 4, 16), noise(1, 9, 4, 16)
    delta2 = increment_singular_values(old, dq, old, torch.zeros_like(dq))
    direct = torch.linalg.svdvals(dq.mT @ old)[..., : delta2.shape[-1]]
    torch.testing.assert_close(delta2, direct, atol=1e-7, rtol=1e-7)


class _History:
    def __init__(self, weights):
        self.weights = weights

    def at(self, step):
        return self.weights


def _readings(make_run, change, *model):
    run = make_run(*model)
    model = run.new_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    view = StepView(
        step=10, tokens=640, loss=torch.ones(()), grad_norm=torch.ones(()), model=model, history=_History(before)
    )
    return RandomMatrix(every_steps=5, window=10, flips=3).observe(view)


def test_an_update_of_low_rank_has_no_noise_every_time():
    """Its median singular value is zero, and what rounding leaves of it is no noise."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        low = torch.randn(8, 2, generator=generator).double() @ torch.randn(2, 30, generator=generator).double()
        assert noise_variance(singular_values(low), 8, 30) == 0
        full = torch.randn(8, 30, generator=generator).double()
        assert noise_variance(singular_values(full), 8, 30).item() == pytest.approx(1.0, abs=0.7)


def test_a_zero_update_is_missing_and_a_broken_one_is_not(make_run):
    readings = _readings(make_run, lambda name, p: None)
    assert len(readings) == 8 and all(r.undefined.all() for r in readings.values())

    def break_it(name, parameter):
        parameter.add_(torch.randn_like(parameter) * 1e-3)
        if name == "blocks.1.attention.q.weight":
            parameter[0, 0] = torch.nan

    broken = _readings(make_run, break_it)
    for name, reading in broken.items():
        assert reading.value.shape == (2, 2) and not reading.undefined.any(), name
        assert torch.isfinite(reading.value[0]).all()
        assert torch.isfinite(reading.value[1, 0]).item() == (".k" in name), name


def test_key_heads_are_scored_once_and_reach_the_delta2_of_their_query_heads(make_run):
    """Where key head 1 alone moved, the query heads 2 and 3 that read it have a Delta2."""

    def change(name, parameter):
        if name == "blocks.0.attention.k.weight":
            parameter[4:] += torch.randn(4, 16, generator=torch.Generator().manual_seed(0))

    readings = _readings(make_run, change, "model=gqa_nano", "model.n_heads=4", "model.window=8")
    for score in ("flip_edge", "bbp_edge", "tracy_widom"):
        undefined = readings[f"delta_w_{score}.k.w10"].undefined
        assert undefined.tolist() == [[True, False], [True, True]]
        assert readings[f"delta_w_{score}.q.w10"].undefined.all()
    assert readings["qk_delta2_flip_edge.w10"].undefined.tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("bad", [{"flips": 0}, {"window": 0}, {"every_steps": 0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"not allowed|at least 1"):
        RandomMatrix(**{"every_steps": 5, "window": 10, "flips": 3} | bad)
