"""Attention computed again agrees with a healthy kernel up to its rounding, and with a broken one where it is right."""

import pytest
import torch

from foreshock.models.attention import attention, flash_attention
from foreshock.models.numerics import AttentionNumerics, SiteFault, to_bf16_grid
from foreshock.models.wiring import Wiring
from foreshock.monitors import attention_laws, attention_recomputed
from foreshock.monitors.attention_recomputed import PARTS, AttentionRecomputed, computed_again
from foreshock.monitors.attention_twin import twin_of
from foreshock.monitors.dot_product import DotProductStep
from foreshock.monitors.kernel_rounding import REFERENCE

pytestmark = pytest.mark.numeric


def step(sharpness: float, *faults: SiteFault, shared: int = 1, window: int | None = None) -> DotProductStep:
    """Forward and backward of the reference kernel on random tensors; sharpness: spread of the scores, 0: all tie.

    shared: query heads of one key-value head.
    """
    generator = torch.Generator().manual_seed(3)
    q, k, v, do = (torch.randn(12, h, 40, 16, generator=generator) for h in (4, 4 // shared, 4 // shared, 4))
    q, k, v, do = (to_bf16_grid(x) for x in (sharpness * q, k, v, do))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = flash_attention(q, k, v, AttentionNumerics(faults).layer(0), window=window)
    o.backward(do)
    return DotProductStep(*(x.detach() for x in (q, k, v, o, *(x.grad for x in leaves), do)), window)


def over_noise(t: DotProductStep) -> dict[str, torch.Tensor]:
    """By part and head, the root mean square over rows."""
    ratios = attention_recomputed.over_noise(t, computed_again(t), REFERENCE)
    return {part: ratio.square().mean(0).sqrt() for part, ratio in ratios.items()}


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("shared", "window"), [(1, None), (2, None), (4, 7)])
def test_a_healthy_kernel_differs_by_what_is_predicted(sharpness, shared, window):
    for part, ratio in over_noise(step(sharpness, shared=shared, window=window)).items():
        assert ratio.shape == (4 // shared,)
        assert ratio.min() > 0.9 and ratio.max() < 1.1, (part, ratio)


def test_every_key_that_ties_at_the_largest_of_its_row_is_exact():
    assert 0.9 < float(over_noise(step(0.0))["o"].square().mean().sqrt()) < 1.1


BACKWARD = {
    **dict.fromkeys(("o", "delta", "dp", "ds", "v"), frozenset({"dq", "dk"})),
    **dict.fromkeys(("do", "lse", "p", "s", "q", "k"), frozenset({"dq", "dk", "dv"})),
    **{site: {site} for site in ("dq", "dk", "dv")},
}


@pytest.mark.parametrize(("site", "wrong"), BACKWARD.items())
def test_one_truncated_bit_of_a_site_shows_in_the_gradients_that_it_reaches(site, wrong):
    t = step(1.0, SiteFault(site, "backward", "truncate", 1, heads=(2,)))
    for part, ratio in over_noise(t).items():
        assert (ratio[2] > 1.25) == (part in wrong), (part, ratio)
        assert ratio[[0, 1, 3]].max() < 1.1, part


def test_a_wrong_output_is_seen_and_not_blamed_on_the_gradients_of_a_kernel_that_uses_it():
    """S corrupted in both passes alike keeps every law: a different softmax, with its own right gradient."""
    t = step(1.0, SiteFault("s", "both", "truncate", 3))
    laws = {
        name: ratio.square().mean().sqrt()
        for name, ratio in attention_laws.over_noise(t, twin_of(t, REFERENCE)).items()
    }
    assert max(laws.values()) < 1.3, laws
    assert min(ratio.min() for ratio in over_noise(t).values()) > 5


@pytest.mark.parametrize("wiring", [Wiring(mask_shift=1), Wiring(scalings=0), Wiring(scalings=2), Wiring(kv_offset=1)])
def test_attention_of_the_wrong_things_is_seen_for_it_is_computed_again_as_it_ought_to_be(wiring):
    generator = torch.Generator().manual_seed(3)
    q, k, v, do = (to_bf16_grid(torch.randn(12, h, 40, 16, generator=generator)) for h in (4, 2, 2, 4))
    leaves, none = [x.requires_grad_() for x in (q, k, v)], torch.zeros((), dtype=torch.int64)
    numerics = AttentionNumerics(wirings=(wiring,)).layer(0)
    o = attention(q, k, v, backend="reference", numerics=numerics, nonfinite=none)
    o.backward(do)
    t = DotProductStep(*(x.detach() for x in (q, k, v, o, *(x.grad for x in leaves), do)), None)
    for part, ratio in over_noise(t).items():
        assert ratio.min() > 10, part


def test_an_exact_network_agrees_to_the_last_digits(trained_steps):
    monitor = AttentionRecomputed(every_steps=1, rows=0)
    readings = monitor.observe(trained_steps(monitor, dtype=torch.float64, backend="sdpa").next())
    assert set(readings) == {f"attention_recomputed.{part}" for part in PARTS}  # no prediction for such a kernel
    assert max(reading.max() for reading in readings.values()) < 1e-13


def test_chosen_rows_are_taken_in_turn(trained_steps):
    monitor = AttentionRecomputed(every_steps=1, rows=1)
    steps = trained_steps(monitor, qk_norm=True, positions="rope")
    for row in (1, 2, 0):
        view = steps.next()
        found = monitor.observe(view)
        for layer, tap in enumerate(view.taps.at("dot_product").values()):
            ratios = over_noise(DotProductStep.of([tap], slice(row, row + 1)))
            for part, ratio in ratios.items():
                torch.testing.assert_close(found[f"attention_recomputed.{part}.over_noise"][layer], ratio)


def test_rows_must_be_a_number_of_rows():
    with pytest.raises(ValueError, match=r"monitor\.rows=-1 is not allowed"):
        AttentionRecomputed(every_steps=10, rows=-1)
