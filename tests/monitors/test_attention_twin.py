"""The twin computes what a kernel computes, and its terms add up to what each law leaves."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foreshock.models.anatomies.attention_call import AttentionCall
from foreshock.models.attention import flash_attention
from foreshock.models.flash import flash_attention_triton
from foreshock.models.numerics import HEALTHY_LAYER, LayerNumerics, SiteFault, to_bf16_grid
from foreshock.models.taps import Tap
from foreshock.models.tiles import Tile, Tiles
from foreshock.models.visibility import visible_keys
from foreshock.monitors import attention_laws
from foreshock.monitors.attention_laws import LAWS
from foreshock.monitors.attention_twin import repeats, twin_of
from foreshock.monitors.conservation import over_group
from foreshock.monitors.dot_product import DotProductStep
from foreshock.monitors.fast_exp import fast_exp
from foreshock.monitors.kernel_rounding import (
    REFERENCE,
    UNROUNDED,
    KernelRounding,
    kernel_rounding,
    pytorch_cpu_exp_is_fast,
    pytorch_cpu_rounding,
    triton_rounding,
)
from foreshock.monitors.rounding import ALIKE

pytestmark = pytest.mark.numeric

B, H, D = 6, 4, 16
PARTS = ("o", "dq", "dk", "dv")


def drawn(tokens: int, groups: int = H, spread: float | None = None, sharpness: float = 1.0) -> tuple:
    """q, k, v and dO on the BF16 grid; spread: of the tokens of a head around one vector; None: no centre."""
    generator = torch.Generator().manual_seed(11)

    def vectors(heads: int, alike: bool) -> torch.Tensor:
        x = torch.randn(B, heads, tokens, D, generator=generator)
        return x if not alike else torch.randn(B, heads, 1, D, generator=generator) + spread * x

    q, k, v, do = (vectors(heads, spread is not None) for heads in (H, groups, groups, H))
    return tuple(to_bf16_grid(x) for x in (sharpness * q, k, v, do))


def returned_by(attend, q, k, v, do, window=None) -> DotProductStep:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = attend(*leaves)
    o.backward(do)
    tensors = (q, k, v, o.detach(), *(x.grad for x in leaves), do)
    return DotProductStep(*(x.float() if x.dtype is torch.bfloat16 else x for x in tensors), window)


def reference(q, k, v, do, fault: SiteFault | None = None, window: int | None = None) -> DotProductStep:
    numerics = LayerNumerics({(fault.site, "backward"): (fault,)}) if fault else HEALTHY_LAYER
    return returned_by(lambda *x: flash_attention(*x, numerics, window=window), q, k, v, do, window)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of a from b, in units of BF16's root-mean-square error of b."""
    return float((a - b).norm() / (b.norm() * math.sqrt(2.0**-14 / 24)))


def root_mean_square(t: DotProductStep, rounding: KernelRounding) -> dict[str, float]:
    ratios = attention_laws.over_noise(t, twin_of(t, rounding))
    return {name: float(ratio.square().mean().sqrt()) for name, ratio in ratios.items()}


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("window", [None, 9, 100])
@pytest.mark.parametrize("keys", [None, 16])
def test_unrounded_it_is_attention_in_fp64(groups, window, keys):
    q, k, v, do = (x.double() for x in drawn(70, groups))
    seen = visible_keys(70, window)
    t = returned_by(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True), q, k, v, do, window
    )
    twin = twin_of(t, UNROUNDED).step
    for part in PARTS:
        torch.testing.assert_close(getattr(twin, part), getattr(t, part), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("window", [None, 9])
def test_it_rounds_as_the_reference_kernel_does(groups, window):
    """What is left are numbers near the middle of two BF16 ones, which another order of FP32 sums tips over.

    An FP32 error of some 2^-22 of a number tips a share of 2^-22 / 2^-8 = 2^-14 of them, each by a BF16 step, 2^-8: a
    mean square of 2^-30 beside BF16's 2^-14 / 24, so a distance of 0.02. A rounding point missed makes it 0.7 or more.
    """
    t = reference(*drawn(100, groups), window=window)
    twin, unrounded = twin_of(t, REFERENCE).step, twin_of(t, UNROUNDED).step
    for part in PARTS:
        assert distance(getattr(t, part), getattr(twin, part)) < 0.2, part
        assert distance(getattr(t, part), getattr(unrounded, part)) > 0.7, part


@pytest.mark.parametrize("site", ["p", "ds", "o", "dq"])
def test_one_bit_less_at_one_site_is_no_twin(site):
    t = reference(*drawn(64), SiteFault(site, "backward", "truncate", 1))
    twin = twin_of(t, REFERENCE).step
    assert max(distance(getattr(t, part), getattr(twin, part)) for part in PARTS) > 0.4


TILES = Tiles(*[Tile(16, 16, 4, 1)] * 3)


def triton(*tensors, window=None) -> DotProductStep:
    def attend(q, k, v):
        counter = torch.zeros((), dtype=torch.int64)
        return flash_attention_triton(q, k, v, HEALTHY_LAYER, counter, window, TILES)

    return returned_by(attend, *(x.bfloat16() for x in tensors), window)


@pytest.mark.triton
@pytest.mark.parametrize("window", [None, 9])
def test_it_rounds_as_triton_kernels_do_tile_by_tile(window):
    tensors = [x[:2] for x in drawn(48, 2, sharpness=3.0)]
    t = triton(*tensors, window=window)
    tiled, whole = (twin_of(t, triton_rounding(keys, deterministic=True)).step for keys in (16, 1024))
    for part in PARTS:
        assert distance(getattr(t, part), getattr(tiled, part)) < 0.1, part
    assert distance(t.o, whole.o) > 0.15  # P relative to the maximum of the whole row is rounded elsewhere
    for name, ratio in root_mean_square(t, triton_rounding(16, deterministic=True)).items():
        assert 0.6 < ratio < 1.4, name


@pytest.fixture
def fast() -> bool | None:
    """Whether PyTorch's flash kernel has the fast exponential on this CPU; under AVX2 that has to be found."""
    found, capability = pytorch_cpu_exp_is_fast(), torch.backends.cpu.get_cpu_capability()
    if found is None and capability != "AVX2":
        pytest.skip(f"its exponential under {capability} is not known: it has no prediction")
    return found


@pytest.mark.parametrize("tokens", [96, 208, 800])
@pytest.mark.parametrize("spread", [None, 0.01, 0.001, 0.0])
def test_pytorchs_flash_kernel_on_a_cpu_has_rounded_running_sums(tokens, spread, fast):
    """0.0: two thirds of the tokens are one padding token. What is alike is rounded alike, by the twin as well.

    Of 48 independent ratios one is above 4.5 in 3e-4 of cases; the other exponential makes 5.7 of 800 alike tokens.
    """
    tensors = [x[:2].clone() for x in drawn(tokens, spread=spread or None)]
    if spread == 0.0:
        for x in tensors:
            x[..., tokens // 3 :, :] = x[..., -1:, :]
    t = returned_by(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), *(x.bfloat16() for x in tensors))
    points = pytorch_cpu_rounding(tokens, fast)
    ratios = attention_laws.over_noise(t, twin_of(t, points))
    assert max(float(ratio.max()) for ratio in ratios.values()) < 4.5, ratios
    for name in SHARP if spread is None else ():
        assert 0.8 < float(ratios[name].square().mean().sqrt()) < 1.25, ratios
    running, once = (distance(t.dv, twin_of(t, one).step.dv) for one in (points, REFERENCE))
    assert running < once / 2 or spread == 0.0


def test_the_exponential_of_pytorchs_flash_kernel_is_known_to_the_bit(fast):
    """With the other one equal scores err alike, and O differs in 4 % of its numbers."""
    tensors = [x[:2].bfloat16() for x in drawn(256)]
    t = returned_by(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), *tensors)
    twins = (twin_of(t, pytorch_cpu_rounding(256, one)).step.o for one in (fast, not fast))
    same, other = ((o == t.o).double().mean() for o in twins)
    assert same > 0.99 > other


def test_the_fast_exponential_is_right_to_a_bound_above_and_below():
    x = torch.linspace(-80, 0, 100_001)
    error = fast_exp(x).double() / x.double().exp() - 1
    assert (error.abs() <= 1.11e-4 + x.double().abs() * 2**-23).all()
    assert error.max() > 5e-5 and error.min() < -5e-5
    assert fast_exp(torch.tensor([-torch.inf, -100.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("backend", "dtype", "window", "groups", "tokens", "flash", "expected"),
    [
        ("reference", torch.float32, 5, 2, 30, True, "reference"),
        ("triton", torch.bfloat16, 5, 2, 30, True, "triton"),
        ("sdpa", torch.bfloat16, None, 4, 32, True, "PyTorch's CPU flash"),
        ("sdpa", torch.float32, None, 4, 32, True, None),
        ("sdpa", torch.bfloat16, 5, 4, 32, True, None),
        ("sdpa", torch.bfloat16, None, 2, 32, True, None),
        ("sdpa", torch.bfloat16, None, 4, 32, False, None),
    ],
)
def test_a_kernel_has_a_prediction_only_where_its_rounding_is_known(
    backend, dtype, window, groups, tokens, flash, expected, monkeypatch
):
    monkeypatch.setattr("monitors.kernel_rounding.pytorch_cpu_exp_is_fast", lambda: True)
    module = SimpleNamespace(backend=backend, window=window, tiles=TILES)
    q, kv = torch.zeros(1, 4, tokens, D, dtype=dtype), torch.zeros(1, groups, tokens, D, dtype=dtype)
    allowed = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(flash)
    try:
        found = kernel_rounding(Tap(module, (q, kv, kv), call=AttentionCall.of_module(module)))
    finally:
        torch.backends.cuda.enable_flash_sdp(allowed)
    assert (found and found.name) == expected
    if backend == "triton":
        assert (found.forward_keys, found.two_score_gradients) == (TILES.forward.keys, TILES.deterministic)


def test_keys_that_a_fast_exponential_leaves_over_are_not_predicted(monkeypatch):
    q = torch.zeros(1, 4, 40, D, dtype=torch.bfloat16)
    tap = Tap(nn.Identity(), (q, q, q), call=AttentionCall("sdpa"))
    for fast, known in ((True, False), (False, True), (None, False)):
        monkeypatch.setattr("monitors.kernel_rounding.pytorch_cpu_exp_is_fast", lambda fast=fast: fast)
        assert (kernel_rounding(tap) is not None) == known


SHARP = ("key_shift_residual", "value_shift_residual", "qk_gauge_residual.matrix", "vo_gauge_residual.matrix")


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("rounding", [REFERENCE, KernelRounding("tiles", 16, 32, 16)])
def test_its_terms_add_up_to_what_each_law_leaves(groups, rounding):
    """In FP64 products, so that only the roundings to BF16 are left: sums of the terms that the predictions square."""
    q, k, v, do = (x.double() for x in drawn(70, groups))
    t = DotProductStep(q, k, v, *[torch.zeros_like(x) for x in (q, q, k, v)], do)
    twin = twin_of(t, rounding)
    scale = D**-0.5
    rows = twin.ds_row[..., None] * q * scale
    terms = {
        "key_shift_residual": over_group(rows.sum(-2), groups) + twin.dk_error.sum(-2),
        "value_shift_residual": over_group((twin.p_row[..., None] * do).sum(-2), groups) + twin.dv_error.sum(-2),
        "qk_gauge_residual.matrix": over_group(q.mT @ twin.dq_error, groups) - twin.dk_error.mT @ k,
        "vo_gauge_residual.matrix": over_group(twin.pv_row.mT @ do, groups) + v.mT @ twin.dv_error,
    }
    for name, expected in terms.items():
        torch.testing.assert_close(LAWS[name][0](twin.step)[0], expected, rtol=1e-9, atol=1e-9, msg=name)
    for law in ("qk_gauge_residual", "vo_gauge_residual"):
        trace = terms[f"{law}.matrix"].diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(LAWS[law][0](twin.step)[0], trace, rtol=1e-9, atol=1e-9, msg=law)


@pytest.mark.parametrize("tokens", [16, 64, 256, 1024])
def test_uniform_attention_is_predicted_though_a_row_rounds_every_key_alike(tokens):
    """q = 0: every P of row i is 1/(i + 1), so its rounding errors add up. Independent ones would be 2 to 9 times less.

    sum_i p_i dO_i over its predicted root mean square is 1, and the square of independent ones, u^2 sum_ij P_ij^2, is
    less by kappa^2 = [sum_i (n e_n)^2 + u^2 H] / [u^2 (2 H - 1)] with n = i + 1, e_n = bf16(1/n) - 1/n, H = sum 1/n.
    """
    q, k, v, do = drawn(tokens)
    t = reference(torch.zeros_like(q), k, v, do)
    ratios = root_mean_square(t, REFERENCE)
    assert 0.8 < ratios["value_shift_residual"] < 1.25

    n = torch.arange(1, tokens + 1, dtype=torch.float64)
    e, harmonic, u2 = (1 / n).bfloat16().double() - 1 / n, float((1 / n).sum()), 2.0**-14 / 24
    kappa = math.sqrt((float((n * e).square().sum()) + u2 * harmonic) / (u2 * (2 * harmonic - 1)))
    assert kappa == pytest.approx({16: 1.931, 64: 2.970, 256: 5.087, 1024: 9.188}[tokens], abs=2e-3)
    twin = twin_of(t, REFERENCE)
    predicted = twin.p_row.square().mean((0, 1)).sum() + u2 * harmonic
    assert math.sqrt(float(predicted) / (u2 * (2 * harmonic - 1))) == pytest.approx(kappa, rel=1e-3)


@pytest.mark.parametrize("tokens", [64, 256])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1])
def test_alike_tokens_stand_at_one_where_independent_errors_would_not(tokens, spread):
    t = reference(*drawn(tokens, spread=spread))
    twin = twin_of(t, REFERENCE)
    ratios = attention_laws.over_noise(t, twin)
    for name, ratio in ratios.items():
        assert float(ratio.max()) < ALIKE**0.5 + 0.3, name
    if spread == 0.01 and tokens == 256:
        law, noise = LAWS["key_shift_residual"]
        alone = law(t)[0].norm(dim=-1) / noise(twin).sqrt()
        assert float(alone.square().mean().sqrt()) > 3


@pytest.mark.parametrize("spread", [None, 0.01])
@pytest.mark.parametrize(("bits", "random"), [(1, 1.89), (2, 4.49)])
def test_a_fault_keeps_its_size_over_the_noise(bits, random, spread):
    """Key shift of an O that lost its lowest bits, among alike tokens as well, where the twin takes off the excess."""
    fault = SiteFault("o", "backward", "truncate", bits)
    healthy, faulty = (reference(*drawn(64, spread=spread), fault=x) for x in (None, fault))
    ratio = root_mean_square(faulty, REFERENCE)["key_shift_residual"]
    if spread is None:
        assert ratio == pytest.approx(random, rel=0.1)
    law, noise = LAWS["key_shift_residual"]
    added = law(faulty)[0] - law(healthy)[0]
    size = float((added.norm(dim=-1).square() / noise(twin_of(healthy, REFERENCE))).mean().sqrt())
    assert ratio > 0.8 * size


def tipped(t: DotProductStep, draws: int) -> tuple[float, float]:
    """Mean squares of what two score gradients leave of the QK law, matrix and trace, where they differ by FP32 errors.

    The second dS differs by P_ij a_i times a Gaussian number, with a_i as ``Flips`` has it, before both are rounded;
    each draw moves dS by a percent, as whether a number lies near the middle of two BF16 ones is luck.
    """
    generator, scale, tokens = torch.Generator().manual_seed(0), D**-0.5, t.q.shape[-2]
    s = (t.q @ t.k.mT * scale).masked_fill(~visible_keys(tokens, None), -math.inf)
    p, delta = s.softmax(-1), (t.do * t.o).sum(-1, keepdim=True)
    ds = p * (t.do @ t.v.mT - delta)
    v2 = t.v.square().sum(-1).amax(-1)[..., None, None]
    a2 = t.do.square().sum(-1, keepdim=True) * v2 * (math.log2(D) + 1) / D + 2 * delta.square()
    h = (4 / 3 * 2.0**-48 * a2).sqrt() * p
    of_draws = []
    for _ in range(draws):
        one = ds * (1 + 0.01 * torch.rand(ds.shape, generator=generator, dtype=ds.dtype))
        other = one + h * torch.randn(ds.shape, generator=generator, dtype=ds.dtype)
        apart = (one.bfloat16().double() - other.bfloat16().double()) * scale
        law = t.q.mT @ (apart @ t.k)
        of_draws.append((law.square().sum((-2, -1)).mean(), law.diagonal(dim1=-2, dim2=-1).sum(-1).square().mean()))
    return tuple(float(torch.stack(part).mean()) for part in zip(*of_draws, strict=True))


@pytest.mark.parametrize("repeated", [1, 4])
def test_flips_are_what_fp32_errors_tip_over(repeated):
    """Of 6 million entries some 1,000 are tipped, a few large ones count: 20 % of a mean square at two deviations.

    Equal tokens see other keys before them, so that few flip together and the prediction is a bound.
    """
    tokens = (x[..., : 24 // repeated, :].repeat(1, 1, repeated, 1) for x in drawn(24))
    t = reference(*tokens)
    t = DotProductStep(*(getattr(t, x).double() for x in ("q", "k", "v", "o", "dq", "dk", "dv", "do")))
    flips = twin_of(t, KernelRounding("both", two_score_gradients=True)).flips
    matrix, trace = tipped(t, draws=800)
    for measured, predicted in ((matrix, flips.matrix), (trace, flips.trace)):
        if repeated == 1:
            assert 0.7 < measured / float(predicted.mean()) < 1.4
        else:
            assert measured < 1.4 * float(predicted.mean())


def test_flips_do_not_hide_a_bit():
    t = reference(*drawn(64), SiteFault("dq", "backward", "truncate", 2))
    rounding = KernelRounding("both", two_score_gradients=True)
    assert root_mean_square(t, rounding)["qk_gauge_residual.matrix"] > 2


def test_repeats_are_counted_where_all_vectors_are_equal():
    x = torch.randn(1, 2, 5, D)
    x[0, 0, 3] = x[0, 0, 1]
    y = torch.ones(1, 2, 5, D)
    assert repeats(x, y).tolist() == [[[1, 2, 1, 2, 1], [1, 1, 1, 1, 1]]]
    y[0, 0, 3] = 2
    assert repeats(x, y).tolist() == [[[1] * 5] * 2]


def test_identical_tokens_leave_only_fp32_and_raise_nothing():
    """Every dS is an FP32 error of 0, whose roundings are no BF16 kernel's fault."""
    q, k, v, do = (x[:, :, :1].expand(-1, -1, 48, -1).contiguous() for x in drawn(1))
    for name, ratio in root_mean_square(reference(q, k, v, do), REFERENCE).items():
        assert ratio < ALIKE**0.5, name


@pytest.mark.parametrize("tensor", ["q", "k", "v", "do", "dq", "dk", "dv"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_never_a_healthy_ratio(tensor, value):
    t = reference(*drawn(20))
    getattr(t, tensor)[0, 0, 3, 5] = value
    ratios = attention_laws.over_noise(t, twin_of(t, REFERENCE))
    assert any(not ratio[0].isfinite().all() for ratio in ratios.values())
    assert all(ratio[1:].isfinite().all() for ratio in ratios.values())
