"""Layers that multiply FP8 or INT8 numbers keep the laws of what they multiplied; a wrong product breaks them."""

import pytest
import torch

from foreshock.models.corruption import ModuleFault
from foreshock.models.taps import PLACES
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors.linear_laws import LinearLaws
from foreshock.monitors.norm_laws import NormLaws
from foreshock.monitors.softmax_laws import LogitLaws
from tests.models.quantised_linear import FP8InBF16, FP8Linear, INT8Linear, OwnLinear, replaced
from tests.monitors.ratio_bounds import legal
from tests.views import view_of_gradients

pytestmark = pytest.mark.numeric

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "context_length": 32, "vocab_size": 40}
FORMATS = {
    "FP32": (None, "fp32"),
    "BF16 autocast": (None, "bf16"),
    "FP8 in FP32": (FP8Linear, "fp32"),
    "FP8 in BF16": (FP8InBF16, "fp32"),
    "FP8 in autocast": (FP8Linear, "bf16"),
    "INT8 in autocast": (INT8Linear, "bf16"),
}
EULER, INPUT = "linear_euler_residual.", "linear_input_residual."
NORM, LOGIT = "norm_orthogonality_residual", "logit_shift_residual"
PART = "blocks.1.mlp.input"


def watched(format_, seed=0, faults=(), dtype=torch.float32, **shape):
    kind, precision = FORMATS[format_]
    config = TransformerConfig(**SHAPE | shape, init_std=0.2, tie_embeddings=False)
    model = Transformer(config, precision).initialise(torch.Generator().manual_seed(1)).to(dtype)
    if kind is not None:
        replaced(model, kind)
    batch = torch.randint(40, (8, 33), generator=torch.Generator().manual_seed(seed))
    return view_of_gradients(model, batch, PLACES, faults)


def read(view):
    found = {}
    for monitor in (LinearLaws(1, 1), LogitLaws(1, 1), NormLaws(1, 0)):
        found |= monitor.observe(view)
    return found


def ratios(view):
    return {name.removesuffix(".over_noise"): v for name, v in read(view).items() if name.endswith(".over_noise")}


def overall(values):
    return float(torch.stack([value.double() for value in values]).square().mean().sqrt())


@pytest.mark.parametrize("format_", FORMATS)
def test_every_law_stands_at_what_rounding_predicts(format_):
    """Over 16 batches. Sums of products of short numbers round less often in FP32 than of full ones: no lower end."""
    runs = [ratios(watched(format_, seed)) for seed in range(16)]
    for law in runs[0]:
        found = overall([run[law] for run in runs])
        low, high = legal(law, 16 * runs[0][law].numel(), in_fp32=format_ in ("FP32", "FP8 in FP32"))
        assert (0.0 if format_ == "FP8 in FP32" else low) < found < high, (law, found)


@pytest.mark.parametrize("format_", ["FP8 in FP32", "FP8 in BF16"])
def test_the_master_weight_in_its_place_breaks_the_laws_thousandfold(format_):
    """What a monitor reads that takes the FP32 weight for the multiplied one."""
    view = watched(format_)
    for tap in view.taps.at("linear").values():
        tap.product.w, tap.product.dw = None, tap.weight_grad
    above = 1e4 if format_ == "FP8 in FP32" else 3
    found = ratios(view)
    assert sum(float(found[f"{EULER}{part}"].max()) > above for part in ("q", "k", "v", "o", "input", "output")) >= 4


def test_in_fp64_the_laws_hold_exactly_for_what_was_multiplied():
    for name, residual in read(watched("FP8 in FP32", dtype=torch.float64, backend="sdpa")).items():
        if not name.endswith("over_noise"):
            assert (residual < 1e-12).all(), name


def truncated(x, bits):
    """Toward zero, so many bits off BF16's seven."""
    return (x.float().view(torch.int32) & -(1 << (16 + bits))).view(torch.float32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("format_", ["BF16 autocast", "FP8 in BF16"])
def test_a_gradient_less_some_bits_breaks_euler_by_what_those_bits_are_worth(format_, bits):
    """Against FP64, batch by batch, within the rounding that is there without the fault; one bit more would not be."""
    worth = {bits: [], bits + 1: []}
    broken, noise = [], []
    for seed in range(12):
        view = watched(format_, seed)
        tap = view.taps.at("linear")[PART]
        own = tap.product if tap.product.w is not None else tap
        field = "dw" if own is tap.product else "weight_grad"
        before, w = getattr(own, field).double(), tap.w.double()
        for k, found in worth.items():
            found.append(float((w * (truncated(before, k).double() - before)).sum()))
        healthy = read(view)
        setattr(own, field, truncated(before, bits))
        wrong = read(view)
        name = f"{EULER}input"
        noise.append(float(healthy[name][1] / healthy[f"{name}.over_noise"][1]))
        scale = float((tap.output.double() * tap.output_grad.double()).abs().sum())
        broken.append(float(wrong[name][1]) * scale)
        noise[-1] *= scale
    broken, noise = torch.tensor(broken).double(), torch.tensor(noise).double()

    def misfit(k):
        return float(((broken - torch.tensor(worth[k]).double().abs()) / noise).square().mean().sqrt())

    assert misfit(bits) < 1.7  # of 12 numbers of unit variance, 1.7 is passed once in 10,000 times
    assert misfit(bits + 1) > 2


@pytest.mark.parametrize("format_", ["FP8 in FP32", "FP8 in BF16", "FP8 in autocast"])
def test_an_output_that_lacks_four_bits_breaks_its_laws_alone(format_):
    fault, broken = ModuleFault(PART, "y", "truncate", 4), {EULER + "input", INPUT + "mlp"}
    runs = [ratios(watched(format_, seed, (fault,))) for seed in range(8)]
    for law in runs[0]:
        hit = overall([run[law].reshape(-1)[-1] for run in runs])
        assert hit > 4 if law in broken else hit < 2.5, (law, hit)


@pytest.mark.parametrize("format_", ["FP8 in FP32", "FP8 in BF16"])
def test_an_input_gradient_that_lacks_four_bits_breaks_the_law_in_x(format_):
    view = watched(format_)
    healthy = ratios(view)
    product = view.taps.at("linear")[PART].product
    product.dx = truncated(product.dx, 4)
    for law, ratio in ratios(view).items():
        if law == INPUT + "mlp":
            assert ratio[1] > 10 * healthy[law][1] and ratio[0] == healthy[law][0]
        else:
            assert torch.equal(ratio, healthy[law]), law


def test_what_cannot_be_seen_is_left_out_with_a_warning():
    model = Transformer(TransformerConfig(**SHAPE, tie_embeddings=False)).initialise(torch.Generator().manual_seed(1))
    replaced(model, OwnLinear, leave=("attention.q", "attention.k", "attention.v", "attention.o"))
    view = view_of_gradients(model, torch.randint(40, (4, 33), generator=torch.Generator().manual_seed(0)), PLACES)
    with pytest.warns(UserWarning, match="leave out input: its product is inside an autograd function of its own"):
        found = ratios(view)
    linear = {law for law in found if law.startswith("linear")}
    assert linear == {EULER + part for part in "qkvo"} | {INPUT + "qkv", INPUT + "o"}
    assert "logit_shift_residual" in found and "logit_shift_residual.head" not in found


def test_a_layer_that_takes_no_part_in_the_step_has_no_law():
    view = watched("FP32")
    laws = {name for name in LinearLaws(1, 1).observe(view) if name.endswith(".input")}
    view.taps.at("linear")[PART].product = None
    with pytest.warns(UserWarning, match="leave out input: it takes no part in the step"):
        readings = LinearLaws(1, 1).observe(view)
    assert laws and not laws & set(readings)
