"""What FP32 rounding alone does to the laws outside attention, from the tensors at hand.

As in ``monitors.rounding``: every rounding of a number x is an independent error of mean 0 and mean square u^2 x^2,
u^2 = 2^-46 / 24 for FP32's 24 bits, and a law's broken part is linear in them, so its mean square is a sum over
roundings. No constant is fitted to residuals; two describe the library that multiplies and sums (``BLOCK``, ``LANES``).

A matrix product rounds its running sum after every term. With S_k the sum of the first k of n terms t, the error of
S_n is u^2 sum_k S_k^2. Given S_n, the path to it is a Brownian bridge: E S_k^2 = (k/n)^2 S_n^2 + k/n (1 - k/n) T with
T = sum t^2, so the error is u^2 [(n/3 + 1/2) S_n^2 + n/6 T]: ``accumulation`` gives the two factors. It counts terms
of one sign right (S_n^2 = n T) as well as terms of random signs (S_n^2 = T, n/2 T in all). A library sums long
products in blocks, and then the blocks; ``BLOCK`` is that of MKL's sgemm on AVX-512, whose measured errors for
n = 64 ... 2048 are within 9 % (root mean square) of it. With another library the prediction is off by the
square root of the ratio of block lengths, at most.

Sums over tokens, as in dW, drift further than that, for neighbouring tokens are alike: for Euler's law in W and for the
head's shift a healthy ratio is 0.9 to 1.8 at first and up to 2.7 at a learning rate ten times too high, with single
readings above 5. A band or a conformal threshold takes that in; a number from the prediction alone would not, so
that these two are left out of the universal track (``analysis.detect.tracks``). The other laws stay within 0.9 to 1.5.

Sums of squared terms, T summed over a product's outputs with weights, would cost another matrix product. They are taken
mean-field: sum_j W_ij^2 x_j^2 = |W_i|^2 |x|^2 / n_in.

They are predictions for FP32. Under autocast (``LinearStep.stored``) a linear layer stores y, dy and dW in BF16,
which breaks its laws far more; ``monitors.autocast_rounding`` has the predictions there. Norms and routers compute and
store in FP32 under autocast too, and keep these.

x, W and dW are those that were multiplied (``models.products``). Where they are short numbers, as of FP8, a product of
two has at most 8 bits, and FP32 adds many of them without rounding: the prediction is then too large, and a healthy
ratio below 1.

Shapes: L layers, N tokens (or slots at experts), V vocabulary, M width, E experts. All predictions are mean squares,
FP64, in the squared unit of what is broken, of each layer or token as that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foreshock.models.numerics import at_least_fp32
from foreshock.models.taps import Tap, known
from foreshock.monitors.conservation import squared_norm, squared_norm_fp64

FP32_U2 = 2.0**-46 / 24
"""Mean square of the relative error of one rounding to FP32."""

BLOCK = 192
"""Terms that a matrix product sums one after another."""

LANES = 16
"""Terms that a row sum of softmax keeps apart until the end: AVX-512's."""

NORM_LANES = 8
"""Terms that a row sum of a norm keeps apart until the end: AVX2's, which these kernels are built for."""


def accumulation(n: int | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """(c, r) such that a sum S of n >= 1 terms whose squares add up to T has the error u^2 (c S^2 + r T).

    b blocks of n/b terms, whose sums s have sum s^2 = S^2 / b + (1 - 1/b) T, are followed by b - 1 additions.
    """
    blocks = 1 + (n - 1) // BLOCK
    coherent = (n / blocks**2 + blocks - 1) / 3 + 0.5
    return coherent, n / blocks * (1 / 2 - 1 / (3 * blocks)) + (blocks - 1) / 6


@dataclass(frozen=True)
class LinearStep:
    """Linear layers y = W x of one shape in one step; the experts of a layer are one with a weight each.

    x: (L, n, in); y, dy: (L, n, out), of n tokens out of ``tokens``, an even sample; w, dw: by layer, (E, out, in),
    E = 1 for an ordinary one; slots: how many of all the tokens each expert has, (L, E), and expert: whose each sampled
    one is, (L, n); None for ordinary layers. x and w are what was multiplied (``models.products``), dw the gradient
    there. dx: that of each layer's own x, (L, n, in), where a layer multiplied something else than its input; None
    where all readers of an input multiplied that. with_bias: y as it was stored, where a bias had been added to it, y
    itself is then without; None without a bias. stored: what the product returned, BF16 or FP16 under
    autocast.
    """

    x: Tensor
    y: Tensor
    dy: Tensor
    w: Sequence[Tensor]
    dw: Sequence[Tensor]
    tokens: int
    stored: torch.dtype = torch.float32
    dx: Tensor | None = None
    slots: Tensor | None = None
    expert: Tensor | None = None
    with_bias: Tensor | None = None

    @classmethod
    def of(cls, taps: Sequence[Tap], sample: slice = slice(None), slots: Tensor | None = None) -> LinearStep:
        """From taps on linear layers, or, with ``slots``, on the experts', whose weights lie the other way round."""

        def together(tensors: Iterable[Tensor]) -> Tensor:
            return at_least_fp32(torch.stack([tensor.flatten(0, -2)[sample] for tensor in tensors]))

        x, y = together(tap.x for tap in taps), together(tap.y for tap in taps)
        dy, tokens = together(tap.dout for tap in taps), taps[0].out.shape[:-1].numel()
        w, dw = [tap.w for tap in taps], [tap.dw for tap in taps]
        dxs = [dx for tap in taps if (dx := known(tap.product, "the product of a tapped layer").dx) is not None]
        dx = together(dxs) if len(dxs) == len(taps) else None
        stored = taps[0].out.dtype
        if slots is None:
            biased = None if taps[0].bias is None else together(tap.out for tap in taps)
            ones = ([one[None] for one in w], [one[None] for one in dw])
            return cls(x, y, dy, *ones, tokens, stored, dx, with_bias=biased)
        numbers = torch.arange(slots.shape[-1], device=x.device)
        expert = torch.stack([numbers.repeat_interleave(own, output_size=tokens)[sample] for own in slots])
        return cls(x, y, dy, [one.mT for one in w], [one.mT for one in dw], tokens, stored, dx, slots, expert)

    @property
    def weight_of_sample(self) -> float:
        """How many tokens a sampled one stands for."""
        return self.tokens / self.x.shape[1]

    @cached_property
    def y_dy(self) -> Tensor:
        """In FP32: one rounding more, where y has had n_in."""
        return self.y * self.dy

    @cached_property
    def y_dy2(self) -> Tensor:
        """sum_i (y_i dy_i)^2 of each token, of the y that was rounded, (L, n), FP64."""
        return squared_norm_fp64(self.y_dy if self.with_bias is None else self.with_bias * self.dy)

    @cached_property
    def terms2(self) -> Tensor:
        """sum_ij (dy_i W_ij x_j)^2 of each token, mean-field, (L, n), FP64."""
        norms = torch.stack([torch.linalg.vector_norm(w, dim=-1) for w in self.w])  # (L, E, out)
        if self.expert is not None:
            norms = norms.gather(1, self.expert[..., None].expand(-1, -1, norms.shape[-1]))
        return squared_norm_fp64(self.dy * norms) * squared_norm(self.x) / self.x.shape[-1]

    def total(self, per_token: Tensor) -> Tensor:
        """Sum over all tokens of each weight, (L, n) -> (L, E), FP64, from the sampled ones."""
        if self.expert is None or self.slots is None:
            return per_token.sum(-1, keepdim=True) * self.weight_of_sample
        summed = per_token.new_zeros(self.slots.shape).scatter_add_(-1, self.expert, per_token)
        return summed * self.weight_of_sample


def linear_euler_noise(t: LinearStep) -> Tensor:
    """E|<W, dW> - <y, dy>|^2, (L,): y accumulates over the inputs, dW over the tokens, their errors are independent.

    u^2 [c sum (y dy)^2 + r A + c' sum (W dW)^2 + r' A], A = sum over tokens and weights of (dy_i W_ij x_j)^2;
    c, r of ``accumulation(n_in)``, c', r' of ``accumulation(tokens)``, which for experts are each one's own.
    """
    c_in, r_in = accumulation(t.x.shape[-1])
    c_tokens, r_tokens = accumulation(t.tokens if t.slots is None else t.slots.clamp(min=1))
    terms2 = t.total(t.terms2)
    outputs = c_in * t.total(t.y_dy2) + r_in * terms2
    products2 = torch.stack([squared_norm((w * dw).flatten(1)) for w, dw in zip(t.w, t.dw, strict=True)])
    weights = c_tokens * products2 + r_tokens * terms2
    return FP32_U2 * (outputs + weights).sum(-1)


def linear_input_noise(x_dx: Tensor, readers: Sequence[LinearStep]) -> Tensor:
    """E|<x, dx> - sum over layers of <y, dy>|^2 per token, (L, n), for layers that read x.

    u^2 [sum over layers (c sum (y dy)^2 + (r + r') A) + c' sum (x dx)^2], A as in ``linear_euler_noise`` of one token;
    c, r of ``accumulation(n_in)``, r' of each layer's ``accumulation(n_out)``, c' of the widest.
    """
    c_in, r_in = accumulation(x_dx.shape[-1])
    widths = [t.y.shape[-1] for t in readers]
    outputs = sum(
        c_in * t.y_dy2 + (r_in + accumulation(width)[1]) * t.terms2 for t, width in zip(readers, widths, strict=True)
    )
    return FP32_U2 * (outputs + accumulation(max(widths))[0] * squared_norm_fp64(x_dx))


def weight_sum_noise(t: LinearStep, shift_noise: Tensor) -> Tensor:
    """E||sum_i dW_i||^2, (L,), where sum_i dy_i of each token is an error of mean square ``shift_noise``, (L, n).

    sum_i dW_i = sum over tokens of (sum_i dy_i) x, and every entry of dW accumulates over the tokens by itself:
    sum_t shift_noise_t |x_t|^2 + u^2 [c ||dW||^2 + r sum_t |dy_t|^2 |x_t|^2], c, r of ``accumulation(tokens)``.
    """
    c, r = accumulation(t.tokens)
    per_token = (shift_noise + FP32_U2 * r * squared_norm(t.dy).double()) * squared_norm(t.x)
    own = torch.stack([squared_norm(dw.flatten()) for dw in t.dw]).double()
    return t.weight_of_sample * per_token.sum(-1) + FP32_U2 * c * own


def logit_shift_noise(logits: Tensor, dlogits: Tensor, tokens: float) -> Tensor:
    """E|sum_v dlogits_v|^2 per token, (n,), of a mean over N = ``tokens``.

    With m the largest logit and S = sum exp(z - m), log-softmax stores l = (z - m) - log S, and its backward is
    (exp(l) - onehot) / N. Rounded are log S and S, which move all l of the token alike; each l, by |l| u; the exp of
    each term, in S and in the backward; and p_y - 1. A rounded z - m enters S and l alike and cancels:

        u^2 / N^2 [sum_v p_v^2 (log^2 p_v + 2) + e(log S) + a e(S) / S^2 + (1 - p_y)^2]

    e(x): x^2 with x's own mantissa in place of an average one, as S is often just above 1. a: S adds V / LANES
    terms in each lane, then the lanes pairwise. With q = sum p^2, the squares of the lanes' sums add up to
    q + (1 - q) / LANES on average, and the partial sums of the ``levels`` = log2 LANES additions to
    levels q + (2 - 2 / LANES) (1 - q): so a = c (q + (1 - q) / LANES) + r q + the latter, c, r of
    ``accumulation(V / LANES)``.

    The mean over N tokens is taken as exact, as it is for a power of 2. p is that of the logits, p_y - 1 the least
    dlogit of the token times N.
    """
    N, V = tokens, dlogits.shape[-1]
    log_p = logits.double().log_softmax(-1)
    p2 = log_p.exp().square()
    own, q = (p2 * (log_p.square() + 2)).sum(-1), p2.sum(-1)
    log_s = -log_p.amax(-1)
    s = log_s.exp()
    c, r = accumulation(max(1, V // LANES))
    additions = c * (q + (1 - q) / LANES) + r * q + math.log2(LANES) * q + (2 - 2 / LANES) * (1 - q)
    common = _own_rounding(log_s) + _own_rounding(s) / s.square() * additions
    return FP32_U2 / N**2 * (own + common + (N * dlogits.amin(-1).double()).square())


def _own_rounding(x: Tensor) -> Tensor:
    """Mean square of the error of rounding x, over u^2: 2^(2e + 1) for x in [2^e, 2^(e+1)); x^2 on average."""
    return torch.ldexp(torch.ones_like(x), 2 * torch.frexp(x).exponent - 1)


def router_logit_noise(logits: Tensor, dlogits: Tensor, aux_LNE: Tensor | float, z_coef: float) -> Tensor:
    """E|sum_e dz_e - z-loss part|^2 per token, (L, N), of the gradient dz of the routers' logits, (L, N, E).

    Softmax backward is dz = p (g - s), s = sum p g, plus w p' from the z-loss with p' = exp(z - L), w = 2 z_coef L / N,
    L = logsumexp z. Rounded are the product, the difference and the sum of both parts, each dz_e u; p g and s; p, whose
    sum misses 1 by u^2 (sum p^2 + 1); in the z-loss L, and z - L, exp and product of each p':

        u^2 [3 |dz|^2 + sum (p g)^2 + s^2 (sum p^2 + 2) + w^2 (L^2 + sum p^2 (log^2 p + 2))]

    s is read where g is known: the least probable expert is not chosen, so that its g is the balance loss's alone.
    aux_LNE: that loss's gradient with respect to p, or 0.
    """
    logits, dlogits = logits.double(), dlogits.double()
    lse = logits.logsumexp(-1, keepdim=True)
    log_p = logits - lse
    p = log_p.exp()
    w = 2 * z_coef / logits.shape[-2] * lse
    by_softmax = dlogits - w * p
    least, where = p.min(-1, keepdim=True)
    aux = aux_LNE * torch.ones_like(p)
    s = aux.gather(-1, where) - by_softmax.gather(-1, where) / least
    p2 = p.square()
    p2_sum = p2.sum(-1)
    softmax = 3 * squared_norm(dlogits) + squared_norm(by_softmax + p * s) + s[..., 0].square() * (p2_sum + 2)
    z_loss = w[..., 0].square() * (lse[..., 0].square() + (p2 * (log_p.square() + 2)).sum(-1))
    return FP32_U2 * (softmax + z_loss)


@dataclass(frozen=True)
class NormStep:
    """Norms of one width in one step. FP64, (..., M), but bias and gain, which broadcast to it; eps.

    gain: gamma, of any nearby step, as only predictions take it; bias: beta, of this step, or None; centred: LayerNorm.
    """

    x: Tensor
    dx: Tensor
    y: Tensor
    dy: Tensor
    gain: Tensor
    bias: Tensor | None
    eps: float
    centred: bool

    @cached_property
    def parts(self) -> NormParts:
        M = self.x.shape[-1]
        mean = self.x.mean(-1) if self.centred else self.x.new_zeros(self.x.shape[:-1])
        x = self.x - mean[..., None]
        r = (x.square().mean(-1) + self.eps).rsqrt()
        g, unit, raw = self.dy * self.gain, x * r[..., None], self.x * r[..., None]
        h = (g * unit).sum(-1)
        products = (h / M).square() * (unit * raw).square().sum(-1)
        return NormParts(x, g, unit, raw, r, mean * r, h, products)


@dataclass(frozen=True)
class NormParts:
    """Of dx = r (g - mean g - h unit / M), g = gamma dy, unit = (x - mu) r, raw = x r, h = <g, unit>; offset = mu r.

    products: sum (b x x')^2 with b x = h raw r / M and x' r = unit.
    """

    x: Tensor
    g: Tensor
    unit: Tensor
    raw: Tensor
    r: Tensor
    offset: Tensor
    h: Tensor
    products: Tensor


def _additions(width: int) -> float:
    """Roundings that a term of a norm's row sum goes through: half of its lane's, then those that join the lanes."""
    return width / NORM_LANES / 2 + math.log2(NORM_LANES)


def norm_orthogonality_noise(t: NormStep) -> Tensor:
    """E|<dx, x - mu> - eps/(var + eps) <dy, y - beta>|^2 per token, x' = x - mu.

    PyTorch computes dx = r g + b x + c from the sums h' = sum g x and sum g, b = -h r^2 / M. Into <dx, x'> enter the
    two additions of each dx_c, dx_c^2 x'_c^2 each; the products r g_c and b x_c; the products of h' and its sum, s
    additions a term (``_additions``), whose error b multiplies by |x'|^2 r^2 / M = 1; r, of mean square 2.5 by two
    roundings in var + eps, the root and the reciprocal, which enters twice over, and four more factors of b and h
    itself, 15 in all; mu, by two, times sum g:

        u^2 [2 sum (x' dx)^2 + sum (g unit)^2 + sum (b x x')^2
             + (1 + s) sum (g raw)^2 + 15 h^2 + 2 (offset sum g)^2]

    The error of y in the eps term, smaller by eps / (var + eps), is left out. RMSNorm: mu = 0, the same operations.
    """
    p = t.parts
    own = 2 * squared_norm(p.x * t.dx) + squared_norm(p.g * p.unit) + p.products
    sums = (1 + _additions(t.x.shape[-1])) * squared_norm(p.g * p.raw) + 15 * p.h.square()
    return FP32_U2 * (own + sums + 2 * (p.g.sum(-1) * p.offset).square())


def norm_shift_noise(t: NormStep) -> Tensor:
    """E|sum_c dx_c|^2 per token; LayerNorm, its operations as in ``norm_orthogonality_noise``.

    The additions of each dx_c; the products r g_c and b x_c; sum g, s additions a term (``_additions``), which
    c = -b mu - r sum g / M gives to all M components; the rounding of c and of its product,
    M c = -r (sum g - h offset); b mu and mu itself:

        u^2 [2 sum dx^2 + r^2 ((1 + s) sum g^2 + sum (h raw / M)^2 + 2 (sum g)^2 + 3 (h offset)^2)]
    """
    p, M = t.parts, t.x.shape[-1]
    inner = (1 + _additions(M)) * squared_norm(p.g) + (p.h / M).square() * squared_norm(p.raw)
    common = 2 * p.g.sum(-1).square() + 3 * (p.h * p.offset).square()
    return FP32_U2 * (2 * squared_norm(t.dx) + p.r.square() * (inner + common))
