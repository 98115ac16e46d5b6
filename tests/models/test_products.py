"""What a linear layer multiplied is what was multiplied: whoever casts, quantises or transposes it first."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from foreshock.models.moe import GroupedLinear
from foreshock.models.stacked import StackedLinear
from foreshock.models.taps import Taps
from tests.models.quantised_linear import FP8InBF16, FP8Linear, INT8Linear, OwnLinear, StraightThrough

pytestmark = pytest.mark.numeric

IN, OUT = 24, 16


class ByMatmul(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class ByAddmm(nn.Linear):
    def forward(self, x):
        flat = x.flatten(0, -2)
        return torch.addmm(torch.zeros(()), flat, self.weight.mT).view(*x.shape[:-1], -1)


class Rescaled(nn.Linear):
    """Multiplies whole numbers and scales the result."""

    def forward(self, x):
        return F.linear(x, StraightThrough.apply(self.weight * 8)) / 8


class Twice(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(x, self.weight)


class Padded(nn.Linear):
    """Inner sums in whole blocks of 32, as FP8 kernels take them."""

    def forward(self, x):
        wide = (0, -IN % 32)
        return F.linear(F.pad(x, wide), F.pad(self.weight, wide))


class PaddedTokens(nn.Linear):
    def forward(self, x):
        return F.linear(F.pad(x, (0, 0, 0, 6)), self.weight)[:, : x.shape[1]]


class PartOfTheTokens(nn.Linear):
    def forward(self, x):
        return F.pad(F.linear(x[:, 1:], self.weight), (0, 0, 1, 0))


class WeightOnTheLeft(nn.Linear):
    def forward(self, x):
        return torch.mm(self.weight, x.flatten(0, -2).T).T.view(*x.shape[:-1], -1)


class NoProduct(nn.Linear):
    def forward(self, x):
        return (x[..., None, :] * self.weight).sum(-1)


OTHERWISE_SHAPED = (Padded, PaddedTokens, PartOfTheTokens, WeightOnTheLeft)


def tapped(kind, autocast=False, dtype=torch.float32):
    """The tap of one layer after a backward pass of a random gradient."""
    generator = torch.Generator().manual_seed(0)
    layer = kind(IN, OUT, bias=False) if isinstance(kind, type) else kind
    layer = layer.to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(3, 10, IN, generator=generator, dtype=dtype).requires_grad_()
    model = nn.Sequential(layer)
    with Taps(model, ["linear"]) as taps:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return taps.at("linear")["0"]


def weight_normed():
    return parametrizations.weight_norm(nn.Linear(IN, OUT, bias=False))


KINDS = {
    "plain": (nn.Linear, False, 1.0),
    "matmul": (ByMatmul, False, 1.0),
    "addmm": (ByAddmm, False, 1.0),
    "autocast": (nn.Linear, True, 1.0),
    "matmul in autocast": (ByMatmul, True, 1.0),
    "parametrized": (weight_normed(), False, 1.0),
    "fp8": (FP8Linear, False, 1.0),
    "fp8 in bf16": (FP8InBF16, False, 1.0),
    "fp8 in autocast": (FP8Linear, True, 1.0),
    "int8 in autocast": (INT8Linear, True, 1.0),
    "rescaled": (Rescaled, False, 1 / 8),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_operands_give_the_output_and_the_gradients_are_theirs(name):
    """In FP64: n additions and the result's own rounding, each below half a unit of its format."""
    kind, autocast, scale = KINDS[name]
    tap = tapped(kind, autocast)
    x, w, dw, y, dy = (part.double() for part in (tap.x, tap.w, tap.dw, tap.output, tap.output_grad))
    unit = 2.0**-8 if tap.output.dtype == torch.bfloat16 else 0.0
    size = x.abs() @ w.abs().T * scale
    assert ((y - scale * x @ w.T).abs() <= IN * 2.0**-24 * size + unit * y.abs()).all()
    x, dy = x.flatten(0, 1), dy.flatten(0, 1)
    of_products = scale * (dy.abs().T @ x.abs())
    assert ((dw - scale * dy.T @ x).abs() <= len(x) * 2.0**-24 * of_products + unit * dw.abs()).all()


@pytest.mark.parametrize("name", ["fp8", "fp8 in bf16", "rescaled", "parametrized"])
def test_it_is_not_the_master_weight(name):
    kind, autocast, _ = KINDS[name]
    tap = tapped(kind, autocast)
    master = getattr(tap.module, "parametrizations", None) or tap.weight
    if isinstance(master, torch.Tensor):
        assert not torch.equal(tap.w.float(), master)
    assert tap.product.w is not None and tap.product.dw is not None


@pytest.mark.parametrize("name", ["plain", "matmul", "addmm", "autocast", "matmul in autocast"])
def test_an_untouched_weight_is_kept_once(name):
    kind, autocast, _ = KINDS[name]
    product = tapped(kind, autocast).product
    assert product.w is product.x is product.dw is product.dx is None
    assert product.dtype == (torch.bfloat16 if autocast else torch.float32)


def test_fp64_stays_fp64_under_autocast():
    tap = tapped(nn.Linear, autocast=True, dtype=torch.float64)
    assert tap.x.dtype == tap.w.dtype == tap.output.dtype == torch.float64


def test_a_stack_multiplies_its_own_weights():
    layer = StackedLinear(IN, OUT, bias=False)
    layer.weight = nn.Parameter(torch.randn(3, OUT, IN))
    tap = tapped(layer)
    assert tap.product.w is None and torch.equal(tap.w, tap.weight)
    torch.testing.assert_close(torch.einsum("noi,nbi->nbo", tap.w, tap.x), tap.output)


def test_experts_multiply_what_they_cast_by_hand():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = GroupedLinear(2, IN, OUT)

        def forward(self, x):
            return self.inner(x.flatten(0, 1), torch.tensor([12, 30], dtype=torch.int32))

    model, x = Experts(), torch.randn(3, 10, IN, requires_grad=True)
    nn.init.normal_(model.inner.weight)
    with Taps(model, ["linear"]) as taps:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
    tap = taps.at("linear")["inner"]
    assert torch.equal(tap.w, tap.weight.bfloat16()) and torch.equal(tap.x, x.detach().flatten(0, 1).bfloat16())
    assert torch.equal(tap.dw, model.inner.weight.grad)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, "makes 2 matrix products"),
        (NoProduct, "makes no matrix products"),
        (OwnLinear, "inside an autograd function of its own"),
        *((kind, "not shaped as its input and weight") for kind in OTHERWISE_SHAPED),
    ],
)
def test_a_product_that_cannot_be_seen_says_why(kind, reason):
    assert reason in tapped(kind).product.unseen


def test_nothing_keeps_watching_after_a_forward_that_raises():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), Taps(model := nn.Sequential(Broken(2, 2)), ["linear"]):
        model(torch.ones(1, 2))
    assert torch.overrides._len_torch_function_stack() == 0
