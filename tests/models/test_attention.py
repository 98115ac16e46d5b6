"""Attention against FP64: healthy error bounds, causality, and the size and reach of a fault at every site.

``attention_in_fp64`` writes the equations down a second time; ``bounds`` follows their roundings through them,
|error| <= u |value| at each, with the unit roundoff u = 2^-8 of BF16's 8 significant bits.
"""

import math

import pytest
import torch

from foreshock.models.attention import flash_attention
from foreshock.models.bits import ROUNDINGS, round_half_up, truncate
from foreshock.models.numerics import FORWARD_SITES, HEALTHY_LAYER, SITES, AttentionNumerics, SiteFault
from tests.models.attention_in_fp64 import NAMES, REACH, distance, emulate, exact, inputs, layer, run

pytestmark = pytest.mark.numeric

U = 2.0**-8

DIRECT = {("o", "forward"): "o", ("dq", "backward"): "dq", ("dk", "backward"): "dk", ("dv", "backward"): "dv"}


def bounds(q, k, v, do):
    """Largest possible |error| of each element of {o, dq, dk, dv}: BF16 storage, plus FP32 accumulation."""
    q, k, v, do = (x.double() for x in (q, k, v, do))
    T, D = q.shape[-2:]
    past = torch.ones(T, T, dtype=torch.bool).tril()
    s = (q @ k.mT / math.sqrt(D)).masked_fill(~past, -math.inf)
    p = s.softmax(-1)
    o, dp = p @ v, do @ v.mT
    delta = (do * o).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    fp32 = (T + D) * 2.0**-24  # of the sum of absolute values, as in every dot product
    magnitude = p * (do.abs() @ v.abs().mT + (do.abs() * (p @ v.abs())).sum(-1, keepdim=True))

    def stored(value, error):
        return error + U * (value.abs() + error)

    o_error = stored(o, (U + 4 * fp32) * (p @ v.abs()))
    delta_error = (do.abs() * o_error).sum(-1, keepdim=True)
    ds_error = stored(ds, p * delta_error + 8 * fp32 * magnitude)
    scale = 1 / math.sqrt(D)
    return {
        "o": o_error,
        "dq": stored(scale * ds @ k, scale * (ds_error + fp32 * ds.abs()) @ k.abs()),
        "dk": stored(scale * ds.mT @ q, scale * (ds_error + fp32 * ds.abs()).mT @ q.abs()),
        "dv": stored(p.mT @ do, (U + 8 * fp32) * p.mT @ do.abs()),
    }


def slope(error, predicted):
    """Least-squares factor: 1 where the error is the predicted one plus independent noise."""
    return ((error * predicted).sum() / (predicted * predicted).sum()).item()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("D", [16, 32])
@pytest.mark.parametrize("T", [1, 2, 33, 64])
def test_healthy_attention_stays_within_the_bf16_bounds_of_fp64(T, D, backend):
    x = inputs(T=T, D=D)
    got, right, bound = run(*x, backend=backend), exact(*x), bounds(*x)
    for name in NAMES:
        assert ((got[name] - right[name]).abs() <= bound[name]).all(), name


@pytest.mark.parametrize("D", [16, 32])
@pytest.mark.parametrize("T", [2, 33, 64])
def test_healthy_attention_does_store_bf16(T, D):
    """Rounding to 8 significant bits leaves an error of about 2^-8/sqrt(6) at least: FP32 would have 2^-24."""
    x = inputs(T=T, D=D)
    got, right = run(*x), exact(*x)
    for name in NAMES:
        assert distance(got[name], right[name]) > 2.0**-11, name
        assert torch.equal(got[name], got[name].bfloat16().float()), name


def test_one_token_attends_to_itself_alone():
    q, k, v, do = inputs(T=1)
    got = run(q, k, v, do)
    assert torch.equal(got["o"], v) and torch.equal(got["dv"], do)


@pytest.mark.parametrize(("T", "D"), [(2, 16), (33, 16), (64, 32)])
def test_healthy_attention_rounds_where_the_emulation_does(T, D):
    """FP32 accumulation tips a value over a rounding boundary seldom; a missing rounding changes a third of them."""
    x = inputs(T=T, D=D)
    got, expected = run(*x), emulate(*x)
    for name in NAMES:
        same = got[name] == expected[name]
        if name == "dq":
            same = same[:, :, 1:]  # the first query has one key: its dS cancels to FP32 noise
        assert same.double().mean() > 0.98, name
        assert distance(got[name], expected[name]) < 2.0**-11, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_are_rounded_to_bf16_on_entry(dtype):
    raw = [x.to(dtype) for x in (torch.randn(3, 2, 3, 8, 16, generator=torch.Generator().manual_seed(1)))]
    leaves = [x.clone().requires_grad_() for x in raw]
    o = flash_attention(*leaves)
    do = inputs(T=8)[3]
    expected = run(*(x.bfloat16().float() for x in raw), do)
    assert o.dtype is torch.float32 and torch.equal(o, expected["o"])
    for name, gradient in zip(NAMES[1:], torch.autograd.grad(o, leaves, do), strict=True):
        assert gradient.dtype is dtype and torch.equal(gradient.float(), expected[name])


def test_incoming_gradient_is_rounded_to_bf16():
    q, k, v, do = inputs()
    noisy = do * (1 + 2.0**-10)
    assert not torch.equal(noisy, do) and torch.equal(noisy.bfloat16().float(), do)
    expected = run(q, k, v, do)
    for name, tensor in run(q, k, v, noisy).items():
        assert torch.equal(tensor, expected[name]), name


def test_strided_inputs_give_the_same_bits():
    x = inputs()
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    assert not strided[0].is_contiguous()
    expected = run(*x)
    for name, tensor in run(*strided).items():
        assert torch.equal(tensor, expected[name]), name


def test_it_is_differentiable_only_once():
    q, k, v, do = (x.requires_grad_() for x in inputs(T=2))
    (dq,) = torch.autograd.grad(flash_attention(q, k, v), q, do, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


CAUSALITY = [HEALTHY_LAYER, *(layer(site, "both", bits) for site in FORWARD_SITES for bits in (7, 8))]


@pytest.mark.parametrize("numerics", CAUSALITY)
def test_an_output_never_looks_at_later_tokens(numerics):
    q, k, v, do = inputs(T=12)
    t = 5
    later = torch.arange(12)[:, None] > t
    changed = [torch.where(later, 40 * x.roll(1, -1), x) for x in (q, k, v)]
    first = run(q, k, v, do, numerics)
    second = run(*changed, do, numerics)
    assert torch.equal(first["o"][:, :, : t + 1], second["o"][:, :, : t + 1])
    assert not torch.equal(first["o"][:, :, t + 1 :], second["o"][:, :, t + 1 :])

    of_t = run(q, k, v, torch.where(torch.arange(12)[:, None] == t, do, 0.0), numerics)
    for name in ("dq", "dk", "dv"):
        assert (of_t[name][:, :, t + 1 :] == 0).all(), name
        assert (of_t[name][:, :, t] != 0).any(), name


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("site", "phase"), [*REACH, *((site, "both") for site in FORWARD_SITES)])
def test_zero_bits_are_healthy_bit_for_bit(site, phase, rounding):
    x = inputs(T=9)
    healthy = run(*x)
    for name, tensor in run(*x, layer(site, phase, 0, rounding)).items():
        assert torch.equal(tensor, healthy[name]), name


def test_the_table_names_every_site_and_phase():
    forward, backward = ({site for site, phase in REACH if phase == p} for p in ("forward", "backward"))
    assert forward == set(FORWARD_SITES) and backward == set(SITES)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_reaches_the_outputs_that_the_equations_say(site, phase, rounding):
    x = inputs()
    healthy, faulty = run(*x), run(*x, layer(site, phase, 7, rounding))
    changed = {name for name in NAMES if not torch.equal(faulty[name], healthy[name])}
    assert changed == set(REACH[site, phase].split())


def test_a_share_of_p_leaves_the_other_elements_of_the_tile_as_they_are():
    """P is rounded to BF16 for dV but not for dS: only what is hit is the same number in both."""
    x = inputs()
    healthy, one = run(*x), run(*x, layer("p", "backward", 7, share=0.0))
    changed = (one["dv"] != healthy["dv"]).any(-1)
    assert (changed.sum(-1) == 1).all()  # one key's row, in each batch row and head
    rows = (one["dq"] != healthy["dq"]).any(-1)
    assert (rows.sum(-1) <= 1).all() and rows.any()


@pytest.mark.parametrize("site", FORWARD_SITES)
def test_a_fault_in_both_passes_reaches_what_either_reaches(site):
    x = inputs()
    healthy, faulty = run(*x), run(*x, layer(site, "both", 7))
    changed = {name for name in NAMES if not torch.equal(faulty[name], healthy[name])}
    assert changed == {*REACH[site, "forward"].split(), *REACH[site, "backward"].split()}


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
@pytest.mark.parametrize(("rounding", "operation"), [("truncate", truncate), ("round_half_up", round_half_up)])
@pytest.mark.parametrize(("site", "phase"), DIRECT)
def test_a_fault_on_an_output_is_the_bit_operation_on_it(site, phase, rounding, operation, bits):
    x = inputs()
    healthy, faulty = run(*x), run(*x, layer(site, phase, bits, rounding, heads=(0, 2)))
    name = DIRECT[site, phase]
    expected = healthy[name].clone()
    expected[:, [0, 2]] = operation(healthy[name].bfloat16(), bits).float()[:, [0, 2]]
    assert torch.equal(faulty[name], expected)


@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_stays_in_its_heads(site, phase):
    """The other heads are healthy, and the faulty one is as faulty as if all were, bit for bit."""
    x = inputs()
    healthy, everywhere, here = (
        run(*x, n) for n in (HEALTHY_LAYER, layer(site, phase, 6), layer(site, phase, 6, heads=(1,)))
    )
    for name in NAMES:
        assert torch.equal(here[name][:, [0, 2]], healthy[name][:, [0, 2]]), name
        assert torch.equal(here[name][:, 1], everywhere[name][:, 1]), name


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_fault_is_the_emulated_one_to_the_bit(site, phase, bits):
    """At every site: five times closer to the emulation with this many bits than to one bit more or less."""
    x = inputs()
    faulty = run(*x, layer(site, phase, bits))
    right, fewer, more = (emulate(*x, (site, phase, n)) for n in (bits, bits - 1, bits + 1))
    for name in REACH[site, phase].split():
        away = min(distance(faulty[name], fewer[name]), distance(faulty[name], more[name]))
        assert 5 * distance(faulty[name], right[name]) < away, name


def predicted_error(site, bits, q, k, v, do, stored_o):
    """First-order change of the gradients in FP64, from the equations and nothing of the module but O.

    O enters delta alone: delta_error = rowsum(dO * O_error), dQ_error = -diag(delta_error) P K / sqrt(D),
    dK_error = -(diag(delta_error) P)^T Q / sqrt(D) (arXiv:2510.04212). dO enters dP, delta and dV linearly.
    """
    q, k, v, do, o = (x.double() for x in (q, k, v, do, stored_o))
    T, D = q.shape[-2:]
    s = (q @ k.mT / math.sqrt(D)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    p = s.softmax(-1)
    clean = o if site == "o" else do
    # Toward zero, to multiples of 2^bits of BF16's unit in the last place: arithmetic on values, not on bits.
    unit = torch.ldexp(torch.ones_like(clean), torch.frexp(clean).exponent - 8 + bits)
    error = (clean / unit).trunc() * unit - clean
    if site == "o":
        ds, dv = -p * (do * error).sum(-1, keepdim=True), None
    else:
        ds, dv = p * (error @ v.mT - (error * o).sum(-1, keepdim=True)), p.mT @ error
    predicted = {"dq": ds @ k / math.sqrt(D), "dk": ds.mT @ q / math.sqrt(D), "dv": dv}
    return {name: value for name, value in predicted.items() if value is not None}


@pytest.mark.parametrize("bits", range(3, 8))
@pytest.mark.parametrize("site", ["o", "do"])
def test_the_paper_s_faults_change_the_gradient_by_the_predicted_amount(site, bits):
    """Error = prediction within 2 %, above healthy rounding; the prediction one bit off leaves a third of it."""
    x = inputs(T=64, D=32)
    healthy, right = run(*x), exact(*x)
    faulty = run(*x, layer(site, "backward", bits))
    right_bits, fewer, more = (predicted_error(site, n, *x, healthy["o"]) for n in (bits, bits - 1, bits + 1))
    for name, predicted in right_bits.items():
        error = faulty[name].double() - healthy[name].double()
        noise = healthy[name].double() - right[name]
        assert predicted.norm() > 3 * noise.norm(), name
        assert slope(error, predicted) == pytest.approx(1, abs=0.02), name
        assert (error - predicted).norm() < 0.25 * predicted.norm(), name
        for wrong in (fewer[name], more[name]):
            assert (error - wrong).norm() > 0.35 * wrong.norm(), name


def test_non_finite_values_at_a_fault_are_counted_in_both_passes():
    q, k, v, do = inputs(B=1, H=2, T=4)
    do[0, 1, 2, 3] = math.inf
    q[0, 0, 1, 1] = math.nan
    events = torch.zeros((), dtype=torch.int64)
    numerics = AttentionNumerics(
        (SiteFault("q", "both", "truncate", 7), SiteFault("do", "backward", "truncate", 8, heads=(1,)))
    ).layer(0)
    leaf = q.requires_grad_()
    o = flash_attention(leaf, k, v, numerics, events)
    assert events.item() == 1
    o.backward(do)
    assert events.item() == 3


@pytest.mark.parametrize(("site", "phase"), REACH)
def test_a_finite_run_counts_nothing_at_any_site(site, phase):
    """Not even the -inf of masked scores: the fault on S acts before the mask."""
    q, k, v, do = inputs(T=4)
    events = torch.zeros((), dtype=torch.int64)
    flash_attention(q.requires_grad_(), k, v, layer(site, phase, 8), events).backward(do)
    assert events.item() == 0


def test_non_finite_values_propagate():
    q, k, v, do = inputs(T=4)
    do[0, 0, 3, 0] = math.nan
    got = run(q, k, v, do)
    assert got["o"].isfinite().all()
    for name in NAMES[1:]:
        assert got[name][0, 0].isnan().any() and got[name][1:].isfinite().all(), name


@pytest.mark.parametrize(("site", "phase"), REACH)
def test_the_fast_backend_refuses_a_fault(site, phase):
    with pytest.raises(ValueError, match="'sdpa' has no fault sites: use 'reference'"):
        run(*inputs(T=2), layer(site, phase, 1), backend="sdpa")


def test_the_fast_backend_takes_zero_bits_as_healthy():
    x = inputs(T=9)
    healthy = run(*x, backend="sdpa")
    for name, tensor in run(*x, layer("o", "backward", 0), backend="sdpa").items():
        assert torch.equal(tensor, healthy[name]), name
