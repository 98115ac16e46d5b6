"""The laws outside attention through their monitors: exact in FP64, at their prediction in FP32, broken where wrong."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from foreshock.models.moe import MoEConfig
from foreshock.models.taps import PLACES, Tap
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors.base import StepView
from foreshock.monitors.batch_rows import every
from foreshock.monitors.linear_laws import LinearLaws
from foreshock.monitors.norm_laws import NormLaws
from foreshock.monitors.softmax_laws import LogitLaws, RouterLaws
from tests.views import view_of_gradients

pytestmark = pytest.mark.numeric

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "context_length": 32, "vocab_size": 40}
EXPERTS = MoEConfig(4, 2, aux_coef=0.01, z_coef=0.01, capacity_factor=1.0, shared_d_ff=16)
VARIANTS = {
    "dense": {"tie_embeddings": False},
    "tied": {},
    "swiglu": {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "tie_embeddings": False, "qk_norm": True},
    "experts": {"moe": EXPERTS, "mlp": "swiglu", "tie_embeddings": False, "qk_norm": True},
    "sparse": {"moe": MoEConfig(6, 1, renormalise=False, aux_coef=0.1), "norm": "rmsnorm"},
}
MONITORS = {
    "linear": LinearLaws(every_steps=1, token_stride=1),
    "logit": LogitLaws(every_steps=1, token_stride=1),
    "norm": NormLaws(every_steps=1, rows=0),
    "router": RouterLaws(every_steps=1),
}


def watched(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> StepView:
    """One step's taps of a model with large weights, so that no layer is near its linear regime."""
    model = Transformer(TransformerConfig(**SHAPE, backend="sdpa", init_std=0.2, **VARIANTS[name]))
    model = model.initialise(torch.Generator().manual_seed(1)).to(dtype)
    batch = torch.randint(40, (8, 33), generator=torch.Generator().manual_seed(seed))
    return view_of_gradients(model, batch, PLACES)


def read(view: StepView) -> dict[str, torch.Tensor]:
    found = {}
    for name, monitor in MONITORS.items():
        if name != "router" or view.routings:
            found |= monitor.observe(view)
    return found


def ratios(view: StepView) -> dict[str, torch.Tensor]:
    return {name.removesuffix(".over_noise"): v for name, v in read(view).items() if name.endswith("over_noise")}


def grouped_in_fp64(x, weight, offs):
    """torch's grouped product has no FP64."""
    return torch.cat([part @ w for part, w in zip(x.tensor_split(offs[:-1].tolist()), weight, strict=True)])


@pytest.mark.parametrize("name", VARIANTS)
def test_in_fp64_every_law_holds(name, monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", grouped_in_fp64)
    found = read(watched(name, dtype=torch.float64))
    for signal, residual in found.items():
        if not signal.endswith("over_noise"):
            assert (residual < 1e-12).all(), signal


@pytest.mark.parametrize("name", VARIANTS)
def test_in_fp32_every_law_is_broken_by_what_is_predicted(name):
    """Over 12 batches; a law that is one number a batch scatters by a fifth."""
    runs = [ratios(watched(name, seed)) for seed in range(12)]
    for law in runs[0]:
        overall = torch.stack([run[law] for run in runs]).square().mean().sqrt()
        assert 0.6 < overall < 2.2, (law, float(overall))


def truncated(x: torch.Tensor) -> torch.Tensor:
    """To BF16, toward zero."""
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32)


def flipped(x: torch.Tensor) -> torch.Tensor:
    """Bit 20 of one number, an eighth of its power of two; the largest, which no sum hides."""
    bits = x.clone().contiguous().view(torch.int32).flatten()
    bits[x.abs().argmax()] ^= 1 << 20
    return bits.view(torch.float32).view(x.shape)


BLOCK = "blocks.1."
WRONG = {  # which tensor of which tap: the laws that it enters, of layer 1 or of the model
    ("dense", "linear", BLOCK + "attention.q", "output"): {"linear_euler_residual.q", "linear_input_residual.qkv"},
    ("dense", "linear", BLOCK + "attention.v", "weight_grad"): {"linear_euler_residual.v"},
    ("dense", "linear", BLOCK + "mlp.output", "output_grad"): {"linear_euler_residual.output"},
    ("dense", "linear", BLOCK + "mlp.input", "weight_grad"): {"linear_euler_residual.input"},
    ("dense", "norm", BLOCK + "attention_norm", "output_grad"): {"linear_input_residual.qkv"},
    ("dense", "norm", BLOCK + "mlp_norm", "output_grad"): {"linear_input_residual.mlp"},
    ("dense", "dot_product", BLOCK + "attention.dot_product", "output_grad"): {"linear_input_residual.o"},
    ("dense", "norm", BLOCK + "mlp_norm", "input_grads"): {
        "norm_orthogonality_residual.mlp",
        "norm_orthogonality_residual.shift.mlp",
    },
    ("dense", "norm", "final_norm", "input_grads"): {
        "norm_orthogonality_residual.final",
        "norm_orthogonality_residual.shift.final",
    },
    ("swiglu", "norm", BLOCK + "attention.q_norm", "input_grads"): {"norm_orthogonality_residual.q"},
    ("dense", "linear", "head", "output_grad"): {
        "logit_shift_residual",
        "linear_euler_residual.head",
        "linear_input_residual.head",
    },
    ("dense", "linear", "head", "weight_grad"): {"logit_shift_residual.head", "linear_euler_residual.head"},
    ("experts", "linear", BLOCK + "mlp.router", "weight_grad"): {
        "router_shift_residual",
        "linear_euler_residual.router",
    },
    ("experts", "linear", BLOCK + "mlp.gate", "weight_grad"): {"linear_euler_residual.experts_gate"},
    ("experts", "linear", BLOCK + "mlp.output", "output"): {"linear_euler_residual.experts_output"},
    ("experts", "linear", BLOCK + "mlp.shared.output", "weight_grad"): {"linear_euler_residual.shared_output"},
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: "-".join(wrong))
def test_a_tensor_stored_in_bf16_breaks_exactly_its_laws(wrong):
    corrupt(wrong, truncated, above=20)


@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG if wrong[3] == "weight_grad"], ids=lambda w: "-".join(w))
def test_one_flipped_bit_of_a_weights_gradient_breaks_exactly_its_laws(wrong):
    corrupt(wrong, flipped, above=20)


def corrupt(wrong: tuple[str, str, str, str], change, above: float) -> None:
    name, place, tapped, field = wrong
    view = watched(name)
    tap: Tap = view.taps.at(place)[tapped]
    if field == "input_grads":
        tap.input_grads[0] = change(tap.input_grads[0])
    else:
        setattr(tap, field, change(getattr(tap, field)))
    for law, ratio in ratios(view).items():
        hit = ratio.reshape(-1)[-1]
        assert hit > above if law in WRONG[wrong] else hit < 5, (law, float(hit))
        assert (ratio.reshape(-1)[:-1] < 5).all(), (law, ratio)


def test_what_a_model_has_not_is_left_out():
    laws = {name: set(ratios(watched(name))) for name in VARIANTS}
    assert {"linear_euler_residual.head", "logit_shift_residual.head"} <= laws["dense"] - laws["tied"]
    assert "linear_input_residual.mlp" in laws["dense"] - laws["experts"]
    assert "router_shift_residual" in laws["sparse"] - laws["dense"]
    assert not any("shared" in law or "gate" in law for law in laws["sparse"] | laws["dense"])
    assert not any(".shift" in law for law in laws["swiglu"])
    assert {"norm_orthogonality_residual.q", "linear_euler_residual.gate"} <= laws["swiglu"] - laws["tied"]
    declared = {signal.name for monitor in MONITORS.values() for signal in monitor.signals}
    assert {f"{law}.over_noise" for law in set().union(*laws.values())} | set().union(*laws.values()) == declared


def test_a_sample_of_tokens_predicts_what_all_of_them_do():
    view = watched("experts")
    sampled = LinearLaws(every_steps=1, token_stride=4).observe(view) | LogitLaws(1, 4).observe(view)
    for name, all_tokens in (MONITORS["linear"].observe(view) | MONITORS["logit"].observe(view)).items():
        assert (abs((sampled[name] / all_tokens).log()) < 0.3).all(), name
    assert [every(4, reading, 100) for reading in (0, 5)] == [slice(0, None, 4), slice(1, None, 4)]
    assert every(8, 3, 2) == slice(1, None, 2)


def test_nan_is_not_hidden():
    view = watched("dense")
    view.taps.at("linear")["head"].output_grad = torch.full((8, 32, 40), torch.nan)
    found = read(view)
    assert all(torch.isnan(found[law]) for law in ("logit_shift_residual", "linear_euler_residual.head.over_noise"))


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match="token_stride=0"):
        LinearLaws(every_steps=1, token_stride=0)
    with pytest.raises(ValueError, match="rows=-1"):
        NormLaws(every_steps=1, rows=-1)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_norm_s_prediction_holds_at_gpt2_s_width(trained_steps, norm):
    """Row sums err more the longer they are: by their pairwise sum alone the ratio of a shift would be 3 here."""
    monitor = NormLaws(every_steps=1, rows=0)
    readings = monitor.observe(trained_steps(monitor, d_model=768, n_layers=1, norm=norm).next())
    ratios = {name: float(reading.max()) for name, reading in readings.items() if name.endswith("over_noise")}
    assert len(ratios) == (6 if norm == "layernorm" else 3)
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2.0), (torch.float64, 2.0 * 2**-29)])
def test_an_rmsnorm_without_a_chosen_epsilon_adds_that_of_its_precision(dtype, most):
    """most: of FP32's noise. Without an epsilon the law breaks by 1,000 times that in FP32, as in FP64 with FP32's."""
    config = TransformerConfig(**SHAPE, norm="rmsnorm", backend="sdpa")
    model = Transformer(config).initialise(torch.Generator().manual_seed(1)).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = None
    batch = torch.randint(40, (8, 33), generator=torch.Generator().manual_seed(0))
    readings = NormLaws(every_steps=1, rows=0).observe(view_of_gradients(model, batch, PLACES))
    ratios = {name: reading for name, reading in readings.items() if name.endswith("over_noise")}
    assert len(ratios) == 3 and all((ratio < most).all() for ratio in ratios.values()), ratios
