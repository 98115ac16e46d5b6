"""A fault on a module, through its hooks and the taps, breaks exactly the laws that its tensor enters."""

import pytest
import torch

from foreshock.models.corruption import ModuleFault
from foreshock.models.moe import MoEConfig
from foreshock.models.taps import PLACES
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors.linear_laws import LinearLaws
from foreshock.monitors.norm_laws import NormLaws
from foreshock.monitors.softmax_laws import LogitLaws, RouterLaws
from tests.views import view_of_gradients

pytestmark = pytest.mark.numeric

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "context_length": 32, "vocab_size": 40}
MODELS = {
    "dense": {"tie_embeddings": False, "mlp": "swiglu"},
    "experts": {"tie_embeddings": False, "moe": MoEConfig(4, 2, aux_coef=0.01, z_coef=0.01, shared_d_ff=16)},
}
EULER, INPUT, NORM = "linear_euler_residual.", "linear_input_residual.", "norm_orthogonality_residual."
LOGIT, ROUTER = "logit_shift_residual", "router_shift_residual"

LINEAR = {  # module: its part, and what reads its input's gradient, or None where no law does
    "dense": {
        **{f"attention.{part}": (part, "qkv") for part in "qkv"},
        "attention.o": ("o", "o"),
        "mlp.input": ("input", "mlp"),
        "mlp.gate": ("gate", "mlp"),
        "mlp.output": ("output", None),
        "head": ("head", "head"),
    },
    "experts": {
        "attention.v": ("v", "qkv"),
        "mlp.input": ("experts_input", None),
        "mlp.output": ("experts_output", None),
        "mlp.shared.input": ("shared_input", None),
        "mlp.router": ("router", None),
    },
}
SHIFT_OF_WEIGHT = {"head": {LOGIT + ".head"}, "mlp.router": {ROUTER}}
SHIFT_OF_GRADIENT = {"head": {LOGIT, LOGIT + ".head"}, "mlp.router": {ROUTER}}
NORMS = {"attention_norm": ("attention", "qkv"), "mlp_norm": ("mlp", "mlp"), "final_norm": ("final", "head")}

BROKEN: dict[tuple[str, str, str], set[str]] = {}
for name, modules in LINEAR.items():
    for module, (part, reader) in modules.items():
        of_input = set() if reader is None else {INPUT + reader}
        BROKEN[name, module, "y"] = {EULER + part} | of_input
        BROKEN[name, module, "dx"] = of_input
        BROKEN[name, module, "dw"] = {EULER + part} | SHIFT_OF_WEIGHT.get(module, set())
        BROKEN[name, module, "dy"] = SHIFT_OF_GRADIENT.get(module, set())
for module, (part, reader) in NORMS.items():
    BROKEN["dense", module, "y"] = {NORM + part}
    BROKEN["dense", module, "dy"] = {INPUT + reader}
    BROKEN["dense", module, "dx"] = {NORM + part, f"{NORM}shift.{part}"}
    BROKEN["dense", module, "dw"] = set()


def ratios(name: str, *faults: ModuleFault) -> dict[str, torch.Tensor]:
    """What is broken over what rounding predicts, of each law in one step, by layer."""
    model = Transformer(TransformerConfig(**SHAPE, backend="sdpa", **MODELS[name]))
    model = model.initialise(torch.Generator().manual_seed(1))
    batch = torch.randint(40, (8, 33), generator=torch.Generator().manual_seed(0))
    view = view_of_gradients(model, batch, PLACES, faults)
    monitors = [LinearLaws(1, 1), LogitLaws(1, 1), NormLaws(1, 0), *([RouterLaws(1)] if view.routings else [])]
    found = {signal: value for monitor in monitors for signal, value in monitor.observe(view).items()}
    return {law.removesuffix(".over_noise"): v for law, v in found.items() if law.endswith(".over_noise")}


def block(module: str) -> str:
    return module if module in ("head", "final_norm") else f"blocks.1.{module}"


@pytest.mark.parametrize(("name", "module", "site"), BROKEN, ids="-".join)
def test_a_fault_breaks_exactly_its_laws(name, module, site):
    found = ratios(name, ModuleFault(block(module), site, "truncate", 5))
    assert {law for law, ratio in found.items() if ratio.reshape(-1)[-1] > 5} == BROKEN[name, module, site]
    assert all((ratio.reshape(-1)[:-1] < 5).all() for ratio in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_without_a_fault_every_law_holds(name):
    assert all((ratio < 5).all() for ratio in ratios(name).values())
