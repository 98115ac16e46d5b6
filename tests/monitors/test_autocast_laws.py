"""Under autocast every law is broken by what is predicted for its products, and by more where one is wrong."""

import pytest
import torch

from foreshock.experiments.training.gradients import micro_batches
from foreshock.models.corruption import ModuleFault
from foreshock.models.moe import MoEConfig
from foreshock.models.numerics import to_bf16_grid
from foreshock.models.taps import PLACES
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors import autocast_rounding, conservation
from foreshock.monitors.base import Monitor, StepView
from foreshock.monitors.fp32_rounding import LinearStep
from foreshock.monitors.linear_laws import LinearLaws
from foreshock.monitors.norm_laws import NormLaws
from foreshock.monitors.softmax_laws import LogitLaws, RouterLaws
from tests.monitors.ratio_bounds import legal
from tests.rounding_bounds import FP32, gamma
from tests.views import view_of_gradients

pytestmark = pytest.mark.numeric

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "context_length": 32, "vocab_size": 40}
EXPERTS = MoEConfig(4, 2, aux_coef=0.01, z_coef=0.01, capacity_factor=1.0, shared_d_ff=16)
VARIANTS = {
    "dense": {"tie_embeddings": False},
    "tied": {"n_kv_heads": 1},
    "swiglu": {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "tie_embeddings": False, "qk_norm": True},
    "experts": {"moe": EXPERTS, "mlp": "swiglu", "tie_embeddings": False},
}
EULER, INPUT = "linear_euler_residual.", "linear_input_residual."
LOGIT = "logit_shift_residual"
BLOCK = "blocks.1."


def model_of(name: str, precision: str = "bf16") -> Transformer:
    config = TransformerConfig(**SHAPE, init_std=0.2, **VARIANTS[name])
    return Transformer(config, precision).initialise(torch.Generator().manual_seed(1))


def watched(name: str, seed: int = 0, faults: tuple[ModuleFault, ...] = (), precision: str = "bf16") -> StepView:
    """One step's taps of a model with large weights, so that no layer is near its linear regime."""
    model = model_of(name, precision)
    batch = torch.randint(40, (8, 33), generator=torch.Generator().manual_seed(seed))
    return view_of_gradients(model, batch, PLACES, faults, loss_scale=2.0**14 if precision == "fp16" else None)


def read(view: StepView, stride: int = 1) -> dict[str, torch.Tensor]:
    monitors: list[Monitor] = [LinearLaws(1, stride), LogitLaws(1, stride), NormLaws(1, 0)]
    if view.routings:
        monitors.append(RouterLaws(1))
    return {name: value for monitor in monitors for name, value in monitor.observe(view).items()}


def ratios(view: StepView) -> dict[str, torch.Tensor]:
    return {name.removesuffix(".over_noise"): v for name, v in read(view).items() if name.endswith(".over_noise")}


def overall(values: list[torch.Tensor]) -> float:
    return float(torch.cat([value.reshape(-1) for value in values]).square().mean().sqrt())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_law_is_broken_by_what_is_predicted(name, precision):
    """Over 40 batches."""
    runs = [ratios(watched(name, seed, precision=precision)) for seed in range(40)]
    for law in runs[0]:
        found, (low, high) = overall([run[law] for run in runs]), legal(law, 40 * runs[0][law].numel())
        assert low < found < high, (law, found)


def test_one_bit_less_is_outside_of_what_is_legal():
    """Of dW, in a law that is one number a batch, where least is told apart."""
    fault = ModuleFault(BLOCK + "attention.v", "dw", "truncate", 1)
    runs = [ratios(watched("dense", seed, (fault,))) for seed in range(40)]
    assert overall([run[EULER + "v"][-1] for run in runs]) > legal(EULER + "v", 40)[1]


def test_the_laws_are_those_of_fp32():
    for name in VARIANTS:
        assert ratios(watched(name)).keys() == ratios(watched(name, precision="fp32")).keys()


@pytest.mark.slow
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_it_holds_at_gpt2_s_width(trained_steps, mlp):
    monitor = LinearLaws(every_steps=1, token_stride=1)
    shape = {"d_model": 768, "d_ff": 1536, "n_layers": 1, "vocab_size": 40, "tie_embeddings": False, "mlp": mlp}
    run = trained_steps(monitor, precision="bf16", **shape)
    run.optimizer.param_groups[0]["lr"] = 1e-4
    runs = [monitor.observe(run.next()) for _ in range(8)]
    over_noise = [name for name in runs[0] if name.endswith(".over_noise")]
    for name in over_noise:
        if name.startswith(INPUT):  # of each of 48 tokens
            low, high = legal(name, 8 * 48)
            assert low < overall([run[name] for run in runs]) < high, name
    laws = [name for name in over_noise if name.startswith(EULER)]
    low, high = legal(EULER, 8 * len(laws))
    assert low < overall([run[name] for run in runs for name in laws]) < high


@pytest.mark.parametrize("spread", [0.2, 2.0])
@pytest.mark.parametrize("tokens", [128, 600])
def test_an_unlikely_target_rounds_as_it_must(spread, tokens):
    """-(1 - p) / N near -1 / N is no random number: taken as one, the ratio would be 0.26 at spread 0.2, 600 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = to_bf16_grid(spread * torch.randn(tokens, 500, generator=generator)).requires_grad_()
    targets = torch.randint(500, (tokens,), generator=generator)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    dlogits = to_bf16_grid(logits.grad)
    noise = autocast_rounding.logit_shift_noise(logits.detach(), dlogits, tokens, torch.bfloat16)
    ratio = conservation.logit_shift(dlogits)[0] / noise.sum().sqrt()
    low, high = legal(LOGIT, tokens)
    assert low < ratio < high, float(ratio)


@pytest.mark.parametrize("watched", [None, 2])
def test_of_micro_batches_the_last_keeps_its_laws(watched):
    model = model_of("dense")
    found = []
    for seed in range(10):
        batch = torch.randint(40, (9, 33), generator=torch.Generator().manual_seed(seed))
        found.append(ratios(view_of_gradients(model, micro_batches(batch, 3, watched), PLACES)))
    for law in found[0]:
        low, high = legal(law, 10 * found[0][law].numel())
        assert low < overall([one[law] for one in found]) < high, law


WRONG = {  # module and its tensor: the laws that it enters, of layer 1 or of the model
    ("dense", BLOCK + "attention.v", "dw"): {EULER + "v"},
    ("dense", BLOCK + "attention.v", "dx"): {INPUT + "qkv"},
    ("dense", BLOCK + "attention.o", "y"): {EULER + "o", INPUT + "o"},
    ("dense", BLOCK + "mlp.input", "dw"): {EULER + "input"},
    ("dense", BLOCK + "mlp.input", "dx"): {INPUT + "mlp"},
    ("dense", BLOCK + "mlp.output", "dw"): {EULER + "output"},
    ("dense", "head", "dw"): {EULER + "head", LOGIT + ".head"},
    ("dense", "head", "dx"): {INPUT + "head"},
    ("dense", "head", "dy"): {LOGIT},
    ("tied", "head", "dw"): set(),
    ("tied", "head", "dy"): {LOGIT},
    ("swiglu", BLOCK + "mlp.gate", "dw"): {EULER + "gate"},
    ("swiglu", BLOCK + "mlp.gate", "dx"): {INPUT + "mlp"},
    ("experts", BLOCK + "mlp.gate", "dw"): {EULER + "experts_gate"},
    ("experts", BLOCK + "mlp.shared.output", "dw"): {EULER + "shared_output"},
    ("experts", BLOCK + "mlp.router", "dw"): {EULER + "router", "router_shift_residual"},
}


@pytest.mark.parametrize(("name", "module", "site"), WRONG, ids=["-".join(wrong) for wrong in WRONG])
def test_a_product_that_lacks_four_bits_breaks_exactly_its_laws(name, module, site):
    """Over 8 batches: a law that is one number a batch may be lucky in one."""
    runs = [ratios(watched(name, seed, (ModuleFault(module, site, "truncate", 4),))) for seed in range(8)]
    for law in runs[0]:
        hit = overall([run[law].reshape(-1)[-1] for run in runs])
        assert hit > 5 if law in WRONG[name, module, site] else hit < 2.5, (law, hit)
        assert not runs[0][law].ndim or overall([run[law][:-1] for run in runs]) < 2.5, law


def test_the_prediction_is_the_sum_over_roundings():
    """Against every product and its rounding written out, for two layers that read one input."""
    view = watched("swiglu")
    linear = view.taps.at("linear")
    taps = [linear[f"{BLOCK}mlp.{part}"] for part in ("input", "gate")]
    steps = [LinearStep.of([tap]) for tap in taps]
    u2, per_token, x_dx = 2.0**-14 / 24, 0.0, 0.0
    for tap, step in zip(taps, steps, strict=True):
        assert step.stored == torch.bfloat16
        x, y, dy = (part.flatten(0, 1).double() for part in (tap.inputs[0].bfloat16(), tap.output, tap.output_grad))
        w = tap.weight.bfloat16().double()
        by_weight = (w * tap.weight_grad).square().sum() + (y * dy).square().sum()
        euler = autocast_rounding.linear_euler_noise(step)[0]
        torch.testing.assert_close(
            euler, u2 * by_weight, rtol=gamma(32 * 64, FP32), atol=0
        )  # all of a weight's squares
        x_dx = x_dx + x * (dy @ w)
        per_token = per_token + (x * (dy @ w)).square().sum(-1) + (y * dy).square().sum(-1)
    noise = autocast_rounding.linear_input_noise(x_dx[None].float(), steps)[0].double()
    torch.testing.assert_close(noise, u2 * per_token, rtol=gamma(4 * 64, FP32), atol=0)  # products of 64 terms, squared


def test_a_sample_of_tokens_predicts_what_all_of_them_do():
    view = watched("experts")
    sampled = read(view, stride=4)
    for name, all_tokens in read(view).items():
        assert (abs((sampled[name] / all_tokens).log()) < 0.3).all(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # in FP16 they would be 0
def test_gradients_of_no_size_keep_their_ratio(precision):
    """Of a token that the model is sure of, whose squares are below FP32's range: 0 over 0 would be an alarm."""
    view = watched("dense", precision=precision)
    before = ratios(view)[INPUT + "qkv"]
    taps = [view.taps.at("linear")[f"{BLOCK}attention.{part}"] for part in "qkv"]
    for tap in (*taps, view.taps.at("norm")[f"{BLOCK}attention_norm"]):
        tap.output_grad = tap.output_grad * 2.0**-75
    torch.testing.assert_close(ratios(view)[INPUT + "qkv"], before, rtol=1e-4, atol=0)


def test_nan_is_not_hidden():
    view = watched("dense")
    view.taps.at("linear")["head"].output_grad = torch.full((8, 32, 40), torch.nan, dtype=torch.bfloat16)
    found = read(view)
    for law in (LOGIT, LOGIT + ".head", EULER + "head", INPUT + "head"):
        assert torch.isnan(found[f"{law}.over_noise"]), law
