"""The Triton attention against FP64 and the reference, its interface, and what ``torch.compile`` makes of it."""

import sys

import pytest
import torch

from foreshock.models import flash_bits
from foreshock.models.arithmetic import Arithmetic
from foreshock.models.flash import _backward, _forward, flash_attention_triton
from foreshock.models.flash_arithmetic import encode_arithmetic
from foreshock.models.flash_faults import encode
from foreshock.models.numerics import HEALTHY_LAYER, AttentionNumerics, LayerNumerics, SiteFault
from foreshock.models.tiles import Tile, Tiles, pinned_tiles
from tests.models.attention_in_fp64 import NAMES, distance, emulate, exact, inputs, layer, run
from tests.models.attention_in_triton import (
    ADDING_TILES,
    DEVICE,
    ONE_TILE,
    PLAIN,
    SMALL_TILES,
    output_in_tiles,
    run_triton,
)

pytestmark = [pytest.mark.numeric, pytest.mark.triton]

SHAPES = [  # query heads, key-value heads, window, tokens, d_head
    (2, 2, None, 33, 16),
    (2, 1, 7, 33, 24),
    (3, 1, 1, 1, 32),
    (4, 2, None, 1, 256),
    (4, 4, 17, 64, 16),
    (2, 1, 64, 64, 80),
    (2, 2, 1, 50, 96),
    (3, 3, 100, 17, 64),
    (1, 1, 5, 63, 128),
    (4, 1, None, 47, 200),
]
SCORE_TILES = [("s", "both"), ("p", "both"), ("dp", "backward"), ("ds", "backward")]
DYNAMIC = LayerNumerics({}, Arithmetic("bf16", 64, "fp32", row_max="dynamic", beta=2.0))
EVENTS = torch.zeros((), dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(("H", "G", "window", "T", "D"), SHAPES)
def test_output_and_gradients_are_those_of_masked_softmax(H, G, window, T, D):
    x = inputs(B=1, H=H, G=G, T=T, D=D)
    got, rounded, right = run_triton(*x, window=window), emulate(*x, window=window), exact(*x, window=window)
    single = min(window or T, T) == 1  # one key a query: P = 1, dS = 0 up to FP32 noise
    for name in ("o", "dv") if single else NAMES:
        assert distance(got[name], right[name]) < 2.0**-7, name
        same = got[name] == rounded[name]
        assert (same[:, :, 1:] if name == "dq" else same).double().mean() > 0.98, name


@pytest.mark.parametrize(("H", "G", "window", "T", "D"), SHAPES)
def test_the_output_of_several_tiles_is_their_online_softmax(H, G, window, T, D):
    x = inputs(B=1, H=H, G=G, T=T, D=D)
    got, right = run_triton(*x, window=window, tiles=SMALL_TILES), exact(*x, window=window)
    in_tiles = output_in_tiles(*x[:3], window, SMALL_TILES.forward.keys)
    assert (got["o"] == in_tiles).double().mean() > 0.98
    if min(window or T, T) > 1:
        for name in NAMES:
            assert distance(got[name], right[name]) < 2.0**-7, name


@pytest.mark.parametrize(
    "tiles", [SMALL_TILES, Tiles(Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)), ADDING_TILES]
)
@pytest.mark.parametrize("window", [None, 1, 16, 17])
def test_tiles_change_the_backward_only_by_the_order_of_sums(window, tiles):
    """From the same saved O and L, which are those of the reference."""
    q, k, v, do = (x.to(DEVICE, torch.bfloat16) for x in inputs(B=1, H=2, G=1, T=53))
    o, _, lse, _ = _forward(q, k, v, EVENTS, [], [], window or 0, 0.25, [64, 64, 4, 1] * 3, PLAIN)
    got = _backward(q, k, v, o, lse, do, [], [], window or 0, 0.25, tiles.flat(), PLAIN)[:3]
    expected = run(*(x.float().cpu() for x in (q, k, v, do)), window=window)
    for name, gradient in zip(NAMES[1:], got, strict=True):
        if window == 1 and name != "dv":
            continue  # one key a query: dS = 0 up to FP32 noise
        same = gradient.float().cpu() == expected[name]
        assert (same[:, :, 1:] if name == "dq" else same).double().mean() > 0.98, name


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_long_sequence_in_the_pinned_tiles(deterministic):
    x, tiles = inputs(B=1, H=1, T=300), pinned_tiles(16, deterministic)
    got, right = run_triton(*x, window=150, tiles=tiles), exact(*x, window=150)
    for name in NAMES:
        assert distance(got[name], right[name]) < 2.0**-7, name


def test_atomics_are_refused_where_pytorch_is_told_to_be_deterministic():
    x = inputs(B=1, H=1, T=3)
    torch.use_deterministic_algorithms(True)
    try:
        run_triton(*x)
        with pytest.raises(RuntimeError, match=r"model\.deterministic=False is not allowed after torch\.use_determ"):
            run_triton(*x, tiles=ADDING_TILES)
    finally:
        torch.use_deterministic_algorithms(False)


def test_runs_are_bit_identical():
    x = inputs(B=1, H=4, G=1, T=40)
    first, second = run_triton(*x, tiles=SMALL_TILES), run_triton(*x, tiles=SMALL_TILES)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize(("rounding", "window"), [(None, None), (None, 6), ("flip", 6), ("round_half_up", None)])
def test_what_a_query_does_not_see_does_not_reach_it(rounding, window):
    """Even with a bit changed in every visible element of the score tiles: masked ones and padding keep their zeros."""
    T, t = 37, 20
    q, k, v, do = inputs(B=1, H=2, G=1, T=T)
    faults = [SiteFault(s, p, rounding, 7) for s, p in SCORE_TILES] if rounding else []
    numerics = AttentionNumerics(tuple(faults)).layer(0)
    tokens = torch.arange(T)
    seen = (tokens <= t) & (tokens > t - (window or T))
    elsewhere = [torch.where(seen[:, None], x, x.roll(1, -1)) for x in (k, v)]
    got = run_triton(q, k, v, torch.where(tokens[:, None] == t, do, 0.0), numerics, window, SMALL_TILES)
    other = run_triton(q, *elsewhere, do, numerics, window, SMALL_TILES)
    assert torch.equal(got["o"][:, :, t], other["o"][:, :, t])
    for name in ("dk", "dv"):
        assert (got[name][:, :, seen] != 0).any(-1).all(), name
        if not rounding:  # a fault makes something of the zeros of the other queries' dO
            assert (got[name][:, :, ~seen] == 0).all(), name


def test_non_finite_rows_propagate_within_a_tile_as_in_the_reference():
    """Masked zeros times NaN or Inf included."""
    q, k, v, do = inputs(B=1, H=2, T=20)
    q[0, 0, 7, 3], do[0, 1, 4, 2] = torch.nan, torch.inf
    got, expected = run_triton(q, k, v, do), run(q, k, v, do)
    for name in NAMES:
        assert torch.equal(got[name].isfinite(), expected[name].isfinite()), name


def test_inputs_need_not_be_contiguous():
    x = inputs(B=1, H=2, T=9)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    expected = run_triton(*x)
    assert all(torch.equal(y, expected[name]) for name, y in run_triton(*strided).items())


def test_the_operators_keep_their_contract_with_torch_library():
    q, k, v, do = (x.to(DEVICE, torch.bfloat16) for x in inputs(B=1, H=2, G=1, T=5))
    settings = (
        *encode(layer("o", "both", 3)),
        3,
        0.25,
        [16, 16, 4, 1] * 3,
        encode_arithmetic(Arithmetic(stored_o="fp32"), 16),
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(_forward, (*leaves, EVENTS, *settings))
    o, _, lse, _ = _forward(*(x.detach() for x in leaves), EVENTS, *settings)
    torch.library.opcheck(_backward, (*(x.detach() for x in leaves), o, lse, do, *settings))


@pytest.mark.parametrize("numerics", [HEALTHY_LAYER, layer("q", "both", 7, share=0.5), DYNAMIC])
def test_torch_compile_captures_it_in_one_graph(numerics):
    def attend(q, k, v, events):
        return flash_attention_triton(q, k, v, numerics, events, None, ONE_TILE)

    results = []
    q, k, v, do = (x.to(DEVICE, torch.bfloat16) for x in inputs(B=1, H=2, G=1, T=9))
    q[0, 0, 1, 2] = torch.nan  # a place below one half
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves, events = (
            [x.clone().requires_grad_() for x in (q, k, v)],
            torch.zeros((), dtype=torch.int64, device=DEVICE),
        )
        o = function(*leaves, events)
        results.append((o, *torch.autograd.grad(o, leaves, do), events))
    assert results[0][-1] == (2 if numerics.touches("q", "forward") else 0)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))


def test_runs_that_share_a_batch_are_counted_apart():
    q, k, v, do = (x.to(DEVICE, torch.bfloat16) for x in inputs(B=4, H=2, G=1, T=5))
    q[1, 0, 1, 2], v[3, 0, 4, :2], do[2, 1, 0, 0] = torch.nan, torch.inf, torch.nan
    faults = tuple(SiteFault(site, "backward", "truncate", 7) for site in ("q", "v", "do"))
    events = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = flash_attention_triton(*leaves, AttentionNumerics(faults).layer(0), events, None, SMALL_TILES)
    o.backward(do)
    assert events.tolist() == [1, 3]


def test_it_is_differentiable_only_once():
    q, k, v, do = (x.to(DEVICE, torch.bfloat16).requires_grad_() for x in inputs(B=1, H=1, T=2))
    o = flash_attention_triton(q, k, v, HEALTHY_LAYER, EVENTS, None, ONE_TILE)
    (dq,) = torch.autograd.grad(o, q, do, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_backward"):
        dq.sum().backward()


def call(q, k, v, events=EVENTS, window=None, tiles=ONE_TILE):
    return flash_attention_triton(q, k, v, HEALTHY_LAYER, events, window, tiles)


def test_what_it_cannot_do_is_an_error_of_one_line():
    q, k, v, _ = (x.to(DEVICE, torch.bfloat16) for x in inputs(B=1, H=2, T=2))
    with pytest.raises(TypeError, match=r"k is torch.float32: attention backend 'triton' takes torch.bfloat16"):
        call(q, k.float(), v)
    for D in (8, 20, 264):
        x = torch.zeros(1, 1, 2, D, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=f"d_head={D} is not allowed.*multiple of 8 from 16 to 256"):
            call(x, x, x)
    with pytest.raises(ValueError, match="do not fit q"):
        call(q, k, v[:, :, :1])
    with pytest.raises(ValueError, match="2 query heads cannot share 3"):
        call(q, *(torch.cat([x, x[:, :1]], 1) for x in (k, v)))
    with pytest.raises(ValueError, match="window=0 is not allowed"):
        call(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"needs one device, got .*'nonfinite': 'meta'"):
        call(q, k, v, EVENTS.to("meta"))


@pytest.mark.parametrize(
    ("sizes", "field"), [((24, 16, 4, 1), "queries"), ((16, 8, 4, 1), "keys"), ((16, 16, 0, 1), "warps")]
)
def test_a_tile_that_no_kernel_can_hold_is_an_error(sizes, field):
    with pytest.raises(ValueError, match=f"{field}="):
        Tile(*sizes)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(flash_bits, "INTERPRETED", False)
    with pytest.raises(ValueError, match="got cpu tensors: set TRITON_INTERPRET=1"):
        call(*(x.bfloat16() for x in inputs(B=1, H=1, T=2)[:3]), EVENTS.cpu())


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [
        name
        for name in sys.modules
        if name.removeprefix("foreshock.").startswith("models.flash_") and not name.endswith(".flash_faults")
    ]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package triton: install foreshock\[gpu\]"):
        call(*(x.to(DEVICE, torch.bfloat16) for x in inputs(B=1, H=1, T=2)[:3]))
