"""Products with FP8 and block operands: what they multiply, their state, and what they leave alone."""

import pytest
import torch

from foreshock.faults.amax_history import AmaxHistory
from foreshock.faults.combined import Combined
from foreshock.faults.fit import check_fits
from foreshock.faults.fp8_linear import FP8Linear, FP8Products
from foreshock.faults.log import InjectionLog
from foreshock.faults.mx_linear import BlockProducts, MXLinear
from foreshock.faults.product_format import Formatted
from foreshock.faults.quantised import BLOCK_FORMATS, in_blocks, in_tensor, scale_of
from foreshock.models.moe import GroupedLinear, MoEConfig
from foreshock.models.taps import PLACES
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors.linear_laws import LinearLaws
from tests.faults.engine_steps import differing, points_logged, stepped, whole_and_resumed
from tests.monitors.ratio_bounds import legal
from tests.views import view_of_gradients

FP8 = FP8Products(("layer",), "fp8_e4m3", "fp8_e5m2", "current", 16)
SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "context_length": 32, "vocab_size": 40}
TOKENS = torch.randint(40, (8, 33), generator=torch.Generator().manual_seed(0))


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(width: int = 40, outputs: int = 24) -> torch.nn.ModuleDict:
    layer = torch.nn.Linear(width, outputs, bias=False)
    layer.weight.data = 0.1 * gaussian(outputs, width, seed=1)
    return torch.nn.ModuleDict({"layer": layer})


def products(model, form, x, dy, amaxes=None, log=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, dx and dW of one layer."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    with Formatted(model, [form], amaxes or AmaxHistory(), log):
        y = model["layer"](x)
        y.backward(dy)
    return y.detach(), x.grad, model["layer"].weight.grad


def close(product: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """A product of FP32 matrices: n terms, each product exact, and n roundings at most of sums of no more than |l| |r|.

    The exact products of two narrow numbers are scaled numbers, whose own two roundings are counted too.
    """
    n, left, right = left.shape[-1], left.double(), right.double()
    assert ((product.double() - left @ right).abs() <= (n + 2) * 2.0**-24 * (left.abs() @ right.abs())).all()


def fp8(x: torch.Tensor, form: str) -> torch.Tensor:
    return in_tensor(x, form, scale_of(x.abs().amax(), form))


def test_fp8_products_are_those_of_the_rounded_operands():
    model, x, dy = one_layer(), gaussian(3, 5, 40), 1e-3 * gaussian(3, 5, 24, seed=2)
    w = model["layer"].weight.detach()
    y, dx, dw = products(model, FP8, x, dy)
    xq, wq, dyq = fp8(x, "fp8_e4m3"), fp8(w, "fp8_e4m3"), fp8(dy, "fp8_e5m2")
    close(y, xq, wq.T)
    close(dx, dyq, wq)
    close(dw, dyq.flatten(0, 1).T, xq.flatten(0, 1))
    assert not torch.equal(xq, x) and not torch.equal(dyq, dy)
    assert "forward" not in vars(model["layer"])


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_block_products_have_blocks_along_what_they_sum_over(name):
    model, x, dy = one_layer(), gaussian(3, 25, 40), 1e-3 * gaussian(3, 25, 24, seed=2)
    w, rows, dy_rows = model["layer"].weight.detach(), x.flatten(0, 1), dy.flatten(0, 1)
    y, dx, dw = products(model, BlockProducts(("layer",), name, name, None), x, dy)
    close(y.flatten(0, 1), in_blocks(rows, name), in_blocks(w, name).T)
    close(dx.flatten(0, 1), in_blocks(dy_rows, name), in_blocks(w, name, axis=0))
    close(dw, in_blocks(dy_rows, name, axis=0).T, in_blocks(rows, name, axis=0))


@pytest.mark.parametrize("gradient", ["mxfp8_e5m2", "fp32"])
def test_the_gradient_s_format_and_the_block_are_its_own(gradient):
    model, x, dy = one_layer(), gaussian(50, 40), gaussian(50, 24, seed=2)
    y, dx, _ = products(model, BlockProducts(("layer",), "mxfp4_e2m1", gradient, 8), x, dy)
    w = model["layer"].weight.detach()
    close(y, in_blocks(x, "mxfp4_e2m1", 8), in_blocks(w, "mxfp4_e2m1", 8).T)
    dyq = dy if gradient == "fp32" else in_blocks(dy, gradient, 8)
    n, wq = 24, in_blocks(w, "mxfp4_e2m1", 8, 0)
    assert ((dx - dyq @ wq).abs() <= 2 * n * 2.0**-24 * (dyq.abs() @ wq.abs())).all()


def test_experts_multiply_their_own_slots():
    layer = GroupedLinear(3, 16, 8)
    layer.weight.data = gaussian(3, 16, 8)
    model, x, dy = torch.nn.ModuleDict({"layer": layer}), gaussian(37, 16, seed=1), gaussian(37, 8, seed=2)
    ends = torch.tensor([30, 30, 37], dtype=torch.int32)  # the second has none
    for form in (BlockProducts(("layer",), "mxfp8_e4m3", "mxfp8_e4m3", None), FP8):
        model.zero_grad(set_to_none=True)
        with Formatted(model, [form], AmaxHistory()):
            y = layer(x, ends)
            y.backward(dy)
        of_blocks = isinstance(form, BlockProducts)
        for expert, slots in enumerate((slice(0, 30), slice(30, 30), slice(30, 37))):
            w = layer.weight.detach()
            xq = in_blocks(x[slots], "mxfp8_e4m3") if of_blocks else fp8(x, "fp8_e4m3")[slots]
            wq = in_blocks(w[expert], "mxfp8_e4m3", axis=0) if of_blocks else fp8(w, "fp8_e4m3")[expert]
            close(y.detach()[slots], xq, wq)
        assert not layer.weight.grad[1].any() and layer.weight.grad[2].any()


def test_delayed_scales_follow_the_largest_of_earlier_updates_by_hand():
    model, recipe, amaxes = one_layer(), FP8Products(("layer",), "fp8_e4m3", "fp32", "delayed", 2), AmaxHistory()
    w, weight_amax = model["layer"].weight.detach(), model["layer"].weight.detach().abs().amax()
    known = [0.0, 8.0, 8.0, 2.0]  # the largest of the two updates before, none of the first
    for update, amax in enumerate((8.0, 2.0, 1.0, 1.0)):
        x = gaussian(4, 40, seed=update).clamp(-1, 1) * amax
        x[0, 0] = amax
        before = amaxes.state_dict()
        with torch.no_grad(), Formatted(model, [recipe], amaxes):
            model["layer"](1000 * x)  # an evaluation uses the scales and leaves no trace
        assert amaxes.state_dict() == before
        y, _, _ = products(model, recipe, x, torch.ones(4, 24), amaxes)
        of_x = scale_of(torch.tensor(known[update]), "fp8_e4m3")
        of_w = scale_of(weight_amax if update else torch.zeros(()), "fp8_e4m3")
        close(y, in_tensor(x, "fp8_e4m3", of_x), in_tensor(w, "fp8_e4m3", of_w).T)
    assert amaxes.state_dict()["layer x"].tolist() == [1.0, 1.0]
    assert set(amaxes.state_dict()) == {"layer x", "layer w"}


def test_the_largest_of_the_micro_batches_counts_and_lags_look_further_back():
    amaxes = AmaxHistory()
    assert amaxes.largest("x", 4) is None
    for update, parts in enumerate(([1.0, 5.0, 2.0], [3.0], [9.0], [4.0])):
        for part in parts:
            amaxes.note("x", torch.tensor(part), 3)
        assert update == 0 or float(amaxes.largest("x", 1)) != max(parts)
        amaxes.end_update()
    assert amaxes.state_dict()["x"].tolist() == [3.0, 9.0, 4.0]
    assert [float(amaxes.largest("x", 1, lag)) for lag in range(5)] == [4.0, 9.0, 3.0, 3.0, 3.0]
    assert [float(amaxes.largest("x", 2, lag)) for lag in range(3)] == [9.0, 9.0, 3.0]


def test_a_stale_current_scale_is_of_the_update_so_many_before():
    model, stale = one_layer(), FP8Products(("layer",), "fp8_e4m3", "fp8_e5m2", "current", 16, lag=2)
    amaxes, w = AmaxHistory(), model["layer"].weight.detach()
    inputs = [factor * gaussian(4, 40, seed=seed) for seed, factor in enumerate((1.0, 4.0, 16.0, 64.0))]
    for update, x in enumerate(inputs):
        y, _, _ = products(model, stale, x, gaussian(4, 24), amaxes)
        scale = scale_of(inputs[max(0, update - 2)].abs().amax(), "fp8_e4m3")
        close(y, in_tensor(x, "fp8_e4m3", scale), fp8(w, "fp8_e4m3").T)
    assert in_tensor(inputs[3], "fp8_e4m3", scale).abs().amax() < 0.2 * inputs[3].abs().amax()  # saturated


def transformer(precision="fp32", **shape) -> Transformer:
    config = TransformerConfig(**SHAPE | shape, init_std=0.2, tie_embeddings=False)
    return Transformer(config, precision).initialise(torch.Generator().manual_seed(1))


def view_in(form, model, seed=0):
    batch = torch.randint(40, (8, 33), generator=torch.Generator().manual_seed(seed))
    with Formatted(model, [form], AmaxHistory()):
        return view_of_gradients(model, batch, PLACES)


RECIPES = {
    "current": FP8Products(None, "fp8_e4m3", "fp8_e5m2", "current", 16),
    "wrong": FP8Products(None, "fp8_e4m3", "fp8_e5m2", "current", 16, factor=16.0),
}


@pytest.mark.numeric
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_laws_of_linear_layers_see_what_was_multiplied(recipe, precision):
    """In FP32 the ratio to predicted rounding has no lower end, as sums of short numbers round less."""
    ratios = [LinearLaws(1, 1).observe(view_in(RECIPES[recipe], transformer(precision), seed)) for seed in range(8)]
    laws = [name for name in ratios[0] if name.endswith(".over_noise")]
    assert len(laws) == 11
    for law in laws:
        values = torch.stack([reading[law].double() for reading in ratios])
        _, high = legal(law.removesuffix(".over_noise"), values.numel(), in_fp32=precision == "fp32")
        assert float(values.square().mean().sqrt()) < high, law


def test_laws_leave_out_block_products_by_name():
    model = transformer()
    with pytest.warns(UserWarning, match="leave out q: its product is inside an autograd function of its own"):
        readings = LinearLaws(1, 1).observe(view_in(MXLinear().corrupt.operation[0], model))
    assert {name for name in readings if "over_noise" not in name} == {
        "linear_euler_residual.head",
        "linear_input_residual.head",
    }


def test_laws_leave_out_experts_in_fp8_by_name():
    model = transformer(moe=MoEConfig(4, 2))
    with pytest.warns(UserWarning, match="leave out experts_input: it makes no matrix products that can be seen"):
        readings = LinearLaws(1, 1).observe(view_in(RECIPES["current"], model))
    assert "linear_euler_residual.q" in readings and "linear_euler_residual.experts_input" not in readings


@pytest.mark.parametrize("form", [FP8, BlockProducts(("layer",), "nvfp4", "nvfp4", None)])
def test_under_autocast_operands_and_results_are_bf16_and_the_product_is_not(form):
    model, x, dy = one_layer(), gaussian(6, 40), gaussian(6, 24, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, dx, dw = products(model, form, x, dy)
    quantise = (lambda t: in_blocks(t, "nvfp4")) if form is not FP8 else lambda t: fp8(t, "fp8_e4m3")
    exact = (
        quantise(x.bfloat16().float()).double() @ quantise(model["layer"].weight.detach().bfloat16().float()).T.double()
    )
    assert y.dtype == torch.bfloat16 and (dx.dtype, dw.dtype) == (torch.float32, torch.float32)
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-5).all()
    assert torch.equal(dx, dx.bfloat16().float())


NAMED = ["blocks.1.mlp.input", "blocks.1.mlp.output"]
FAULTS = {
    "fp8_linear": [],
    "fp8_stale_scale": ["fault.lag=1"],
    "mx_linear": ["fault.format=mxfp4_e2m1"],
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_reaches_the_named_layers_alone_from_its_onset(make_run, name):
    faulty = [f"fault={name}", *FAULTS[name], "fault.modules=[blocks.1.mlp.*]", "fault.onset=2"]
    engine, weights, _ = stepped(make_run(*faulty), 3)
    _, clean, _ = stepped(make_run(), 3)
    assert differing(weights[1], clean[1]) == set() != differing(weights[2], clean[2])
    assert set(points_logged(engine)) == {"formats"}
    assert {entry["tensor"].split(" ")[0] for entry in engine.logs[0].entries()} == set(NAMED)
    assert {entry["tensor"].split(" ")[1] for entry in engine.logs[0].entries()} == {"x", "w", "dy"}


def test_what_comes_before_the_named_layer_is_healthy_bit_for_bit():
    form = FP8Products(("blocks.1.mlp.output",), "fp8_e4m3", "fp8_e5m2", "current", 16)
    taps = view_in(form, transformer()).taps.at("linear")
    clean = view_in(FP8Products(None, "fp32", "fp32", "current", 16), transformer()).taps.at("linear")
    changed = {name for name in taps if not torch.equal(taps[name].out, clean[name].out)}
    assert changed == {"blocks.1.mlp.output", "head"}
    assert torch.equal(taps["blocks.1.mlp.output"].inputs[0], clean["blocks.1.mlp.output"].inputs[0])


@pytest.mark.parametrize("name", FAULTS)
def test_fp32_is_healthy_bit_for_bit(make_run, name):
    run = make_run(f"fault={name}", "fault.format=fp32")
    healthy = stepped(make_run(), 4)[1][-1]
    engine, weights, _ = stepped(run, 4)
    assert differing(weights[-1], healthy) == set() and run.fault.describe().control
    assert engine.logs[0].entries() == [] and engine.state_of(0)["amaxes"] == {}


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_without_lag_and_factor_the_stale_scale_is_the_recipe(make_run, scaling):
    keys = [f"fault.scaling={scaling}", "train.micro_batch=4"]
    stale = make_run("fault=fp8_stale_scale", "fault.lag=0", "fault.factor=1", *keys)
    recipe = stepped(make_run("fault=fp8_linear", *keys), 5)[1][-1]
    assert differing(stepped(stale, 5)[1][-1], recipe) == set()
    assert stale.fault.describe().control
    for dose in (["fault.lag=2", "fault.factor=1"], ["fault.lag=0", "fault.factor=2"]):
        faulty = make_run("fault=fp8_stale_scale", *dose, *keys)
        assert not faulty.fault.describe().control
        assert differing(stepped(faulty, 5)[1][-1], recipe) != set()


@pytest.mark.parametrize("name", ["fp8_linear", "fp8_stale_scale"])
def test_a_resumed_run_has_its_amaxes(make_run, name):
    lag = ["fault.lag=3"] if name == "fp8_stale_scale" else []
    run = make_run(f"fault={name}", "fault.scaling=delayed", "fault.history=3", *lag, "train.micro_batch=4")
    whole, resumed = whole_and_resumed(run, 4, 7, needs="amaxes")
    weights = [dict(engine.model.named_parameters()) for engine in (whole, resumed)]
    assert differing(*weights) == set()
    assert whole.logs[0].entries() == resumed.logs[0].entries()
    amaxes = [engine.state_of(0)["amaxes"] for engine in (whole, resumed)]
    assert all(torch.equal(amaxes[0][name], amaxes[1][name]) for name in amaxes[0])
    assert {len(known) for known in amaxes[0].values()} == {3 if not lag else 6}


def test_an_evaluation_between_two_updates_changes_nothing(make_run):
    run = make_run("fault=fp8_linear", "fault.scaling=delayed")
    engine, sites = run.new_engine(), run.fault.sites(0, run.healthy_sites())
    for step in range(4):
        engine.step(step, [sites])
        assert engine.held_out_loss([sites]) != engine.held_out_loss([run.healthy_sites()])
    assert differing(dict(engine.model.named_parameters()), stepped(run, 4)[1][-1]) == set()


def test_the_log_counts_what_the_format_changed():
    log, model, x = InjectionLog(), one_layer(), gaussian(4, 40)
    products(model, FP8, x, gaussian(4, 24), log=log)
    entries = {entry["tensor"]: entry for entry in log.entries()}
    assert set(entries) == {"layer x", "layer w", "layer dy"}
    change = fp8(x, "fp8_e4m3").double() - x.double()
    assert entries["layer x"]["elements"] == int((change != 0).sum())
    assert entries["layer x"]["norm"] == pytest.approx(float(change.norm()), rel=1e-12)


def test_two_formats_of_one_layer_meet(make_run):
    run = make_run("train.steps=20")

    def check(*faults):
        check_fits(Combined({f"f{i}": fault for i, fault in enumerate(faults)}), run.model_config, run.train)

    mlp = MXLinear(modules=("blocks.*.mlp.*",))
    check(mlp, FP8Linear(modules=("blocks.0.attention.q",)))
    check(mlp, FP8Linear(format="fp32"))
    for other in (FP8Linear(), FP8Linear(modules=("blocks.0.mlp.input",)), FP8Linear(modules=("*.input",))):
        with pytest.raises(ValueError, match="meet: only one of them may set a value"):
            check(mlp, other)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["fault=fp8_linear", "fault.format=fp8"],
            "fault.format='fp8' is not allowed: one of fp8_e4m3, fp8_e5m2, fp32",
        ),
        (["fault=fp8_linear", "fault.gradient_format=bf16"], "fault.gradient_format='bf16' is not allowed"),
        (["fault=fp8_linear", "fault.scaling=block"], "fault.scaling='block' is not allowed: one of current, delayed"),
        (["fault=fp8_linear", "fault.history=0"], "fault.history=0 is not allowed: 1 to"),
        (["fault=fp8_linear", "fault.modules=[]"], r"fault.modules=\[\] is not allowed"),
        (["fault=fp8_linear", "fault.modules=[final_norm]"], "the model has no linear layer 'final_norm'; the nearest"),
        (["fault=fp8_stale_scale", "fault.lag=-1"], "fault.lag=-1 is not allowed: 0"),
        (["fault=fp8_stale_scale", "fault.factor=0"], "fault.factor=0.* is not allowed"),
        (["fault=mx_linear", "fault.format=mxfp4"], "fault.format='mxfp4' is not allowed: one of mxfp8_e4m3"),
        (["fault=mx_linear", "fault.gradient_format=fp8"], "fault.gradient_format='fp8' is not allowed"),
        (["fault=mx_linear", "fault.block=0"], "fault.block=0 is not allowed: 1 to"),
        (
            ["fault=mx_linear", "train.micro_batch=4", "train.watched_sequences=1", "train.compile=true"],
            "train.compile",
        ),
    ],
)
def test_an_impossible_fault_is_refused_before_training(make_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_run(*overrides)
