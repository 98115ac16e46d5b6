import numpy as np
import pytest

from foreshock.analysis.detect.bands import (
    UNHEARD_OF,
    DeclinedSignal,
    Exact,
    Floor,
    ReferenceBand,
    SelfBand,
    left_out_z,
)
from foreshock.analysis.detect.published import PublishedRule, published_rule
from foreshock.analysis.detect.tracks.by_name import TRACKS
from foreshock.analysis.runs.align import Aligned
from foreshock.analysis.runs.catalogue import catalogue
from foreshock.monitors.signal import Signal
from tests.described import DECLARED


def aligned(values, undefined=None) -> Aligned:
    values = np.asarray(values, float).reshape(-1, 1, 1)
    mask = np.zeros(values.shape, bool) if undefined is None else np.asarray(undefined).reshape(-1, 1, 1)
    return Aligned(10 * np.arange(1, len(values) + 1), values, mask)


def z_of(values, undefined=None, window: int = 3) -> np.ndarray:
    return SelfBand(window).z(aligned(values, undefined)).ravel()


def test_self_z_is_against_the_window_from_two_w_to_one_w_ago():
    x = np.random.default_rng(0).normal(size=20)
    z = z_of(x)
    assert np.isnan(z[:6]).all()
    for t in range(6, 20):
        past = x[t - 6 : t - 2]  # t - 2W ... t - W, both included
        assert z[t] == pytest.approx((x[t] - past.mean()) / past.std(ddof=1), rel=1e-12)


def test_self_z_is_causal():
    x = np.random.default_rng(1).normal(size=30)
    whole = z_of(x)
    for t in (5, 7, 15, 29):
        assert np.array_equal(z_of(x[:t]), whole[:t], equal_nan=True)


def test_a_signal_that_never_varied_is_silent_until_it_moves():
    x = np.full(20, 0.1)
    x[12] = 0.3
    z = z_of(x)
    assert (z[6:12] == 0).all() and z[12] == UNHEARD_OF
    assert z_of(-x)[12] == -UNHEARD_OF


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 5.545, 0.7e-30, 1e30])
@pytest.mark.parametrize("window", [3, 7, 10, 50])
def test_a_constant_has_no_spread_whatever_its_last_bits(value, window):
    x = np.full(3 * window, value)
    assert (z_of(x, window=window)[2 * window :] == 0).all()
    x[-1] *= 1 + 1e-9
    assert z_of(x, window=window)[-1] == UNHEARD_OF


def test_a_spread_that_a_mean_resolves_is_a_spread():
    x = 1 + 1e-12 * np.random.default_rng(0).normal(size=20)
    assert 0 < np.abs(z_of(x)[6:]).max() < 100


def test_missing_samples_are_missing_and_do_not_spoil_the_window():
    x, undefined = np.random.default_rng(2).normal(size=20), np.zeros(20, bool)
    x[10], undefined[10] = np.nan, True
    z = z_of(x, undefined)
    assert np.isnan(z[10]) and np.isfinite(np.delete(z, 10)[6:]).all()
    undefined[8:11] = True
    assert np.isnan(z_of(x, undefined)[13])  # three of its four window samples are missing


def test_short_input_has_no_z():
    assert np.isnan(z_of(np.ones(6))).all()
    assert z_of(np.ones(0)).shape == (0,)


def test_the_floor_track_takes_ratios_only():
    values = aligned([0.5, 2.0, np.inf, 1.0])
    assert Floor().z(values).ravel().tolist() == [0.5, 2.0, np.inf, np.inf]
    TRACKS["floor"].check_applies(DECLARED["delta_w_flip_edge.q.w50"])
    assert TRACKS["floor"].band(DECLARED["delta_w_flip_edge.q.w50"], []) == Floor()
    with pytest.raises(DeclinedSignal, match="no ratio to predicted noise"):
        TRACKS["floor"].check_applies(DECLARED["grad_global_norm"])


def test_a_residual_over_its_noise_is_measured_from_one_and_the_residual_itself_declined():
    band = TRACKS["floor"].band(DECLARED["key_shift_residual.over_noise"], [])
    assert band.z(aligned([1.0, 3.0])).ravel().tolist() == [0.0, 2.0]
    with pytest.raises(DeclinedSignal, match="no ratio to predicted noise"):
        TRACKS["floor"].check_applies(DECLARED["key_shift_residual"])


def test_an_exact_signal_is_judged_by_itself():
    band = Exact()
    z = band.z(aligned([0.0, 1.0, -1e-9, 5.0, np.nan], [False, False, False, True, True])).ravel()
    assert z[:3].tolist() == [0.0, UNHEARD_OF, UNHEARD_OF] and np.isnan(z[3:]).all()
    assert band.z(aligned([0.0, np.nan])).ravel().tolist() == [0.0, np.inf]


def test_a_published_rule_is_strict_and_reads_raw_values():
    rule = published_rule(DECLARED["update_to_weight"])
    assert (rule.above, rule.below) == (1e-2, 1e-4)
    series = aligned([1e-3, 1e-2, 1.01e-2, 5e-5, np.nan])
    assert rule.broken_at(series).tolist() == [False, False, True, True, True]
    missing = aligned([np.nan, 1e-3], [True, False])
    assert rule.broken_at(missing).tolist() == [False, False]
    assert published_rule(DECLARED["moe_drop_rate"]) == PublishedRule(1.0, -np.inf)  # percent, as the signal is


@pytest.mark.parametrize("signal", [DECLARED["grad_global_norm"], Signal("mine", "1", "up")], ids=lambda one: one.name)
def test_a_rule_without_a_number_is_declined(signal):
    with pytest.raises(DeclinedSignal, match="no published threshold"):
        published_rule(signal)


def test_the_catalogue_is_whole():
    known = catalogue()
    assert known.index.is_unique
    assert len(known) >= 107 + 5 + 2  # of the paper's field, random-matrix scores, the law of inputs, attention again
    limited = {signal.reference for signal in DECLARED.values() if (signal.above, signal.below) != (None, None)}
    assert known.loc[sorted(limited), "published_rule"].notna().all()  # a number needs the words that it comes from


def test_a_left_out_run_is_judged_by_the_band_of_the_others():
    generator = np.random.default_rng(0)
    runs = [aligned(generator.normal(size=60)) for _ in range(5)]
    for i, z in enumerate(left_out_z(runs)):
        band = ReferenceBand.fit("s", runs[:i] + runs[i + 1 :])
        assert np.array_equal(z, band.z(runs[i]))


def test_a_left_out_run_has_no_score_where_the_others_have_no_spread():
    runs = [aligned(np.ones(30)), aligned(np.ones(30)), aligned(np.arange(30.0))]
    assert np.isnan(left_out_z(runs)[2]).all() and np.isfinite(left_out_z(runs)[0]).any()


def test_there_are_five_tracks():
    assert tuple(TRACKS) == ("reference", "self", "floor", "published", "universal")
