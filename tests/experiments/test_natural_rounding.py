"""Conditions of the natural fault against a count, the alignment of errors against its law, and the whole command."""

import json
import math
import re

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save

from foreshock.analysis.runs.conf import conf
from foreshock.experiments import trace
from foreshock.experiments.natural_rounding import KERNELS, alignment, conditions, main, output_bias, trained
from foreshock.experiments.plain_config import CONF, construct
from foreshock.experiments.trace import TraceError
from foreshock.experiments.training.loop import train
from foreshock.models.arithmetic import ORDINARY, Arithmetic
from foreshock.models.attention import flash_attention
from foreshock.models.numerics import LayerNumerics

pytestmark = pytest.mark.numeric

SHARES = ("tied_rows", "one_sign", "exposed")


def bf16(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32).bfloat16())


def counted(q, k, v) -> list[float]:
    """The shares of one head by loops over numbers: (B, T, D)."""
    tied, one_sign, exposed, (B, T, D) = 0, 0, 0, q.shape
    for query, key, value in zip(q.double(), k.double(), v.double(), strict=True):
        for i in range(T):
            scores = [float(query[i] @ key[j]) / math.sqrt(D) for j in range(i + 1)]
            p_bar = [bf16(math.exp(score - max(scores))) for score in scores]
            ones = [j for j in range(i + 1) if p_bar[j] == 1]
            tied += len(ones) > 1
            for d in range(D if len(ones) > 1 else 0):
                values = [float(value[j, d]) for j in ones]
                rest = sum(p * float(value[j, d]) for j, p in enumerate(p_bar) if p != 1)
                unit = 2.0 ** (math.frexp(sum(values) + rest)[1] - 8)
                same = all(x > 0 for x in values) or all(x < 0 for x in values)
                one_sign += same
                exposed += same and abs(rest) < unit / 2
    return [tied / (B * T), one_sign / (B * T * D), exposed / (B * T * D)]


@pytest.mark.parametrize("sharpness", [0.0, 0.05, 20.0])
def test_the_conditions_are_those_of_a_count(sharpness):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 2, 9, 4, generator=generator)  # layers, B, heads, T, D
    k[..., 1::3, :] = k[..., :1, :]
    q, k, v = (sharpness * q).bfloat16().float(), k.bfloat16().float(), v.bfloat16().float()
    got = conditions(q, k, v, None)
    for layer in range(2):
        for head in range(2):
            expected = counted(*(x[layer, :, head] for x in (q, k, v)))
            assert [got[name][layer, head].item() for name in SHARES] == pytest.approx(expected, abs=1e-6)
    assert got["exposed"].max() > 0


def sharp(keys: int, sign: float = 1.0):
    """q, k, v of one layer: the first ``keys`` keys tie at every row's maximum, others weigh e^-10; V has one sign."""
    generator, shape = torch.Generator().manual_seed(0), (1, 4, 2, 64, 16)
    q, k = torch.zeros(shape), torch.zeros(shape)
    q[..., 0] = 10 + 4 * torch.rand(shape[:-1], generator=generator)
    k[..., :keys, 0] = 4.0
    return tuple(x.bfloat16().float() for x in (q, k, sign * (1 + torch.rand(shape, generator=generator))))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_where_all_conditions_hold_the_natural_kernel_pushes_o_off_zero(sign):
    x = sharp(2, sign)
    assert [share.tolist() for share in conditions(*x, None).values()] == [[[63 / 64] * 2]] * 3
    natural, ordinary = (
        output_bias(*x, flash_attention(*(one[0] for one in x), LayerNumerics({}, a))[None], None)
        for a in (Arithmetic("bf16"), ORDINARY)
    )
    assert natural.min() > 7e-4 and ordinary.abs().max() < 2e-4


def test_each_condition_can_be_missing():
    q, k, v = sharp(2)
    mixed = v.clone()
    mixed[..., 1, :] *= -1
    assert conditions(*sharp(1), None)["tied_rows"].max() == 0
    two_signs, spread = conditions(q, k, mixed, None), conditions(q / 10, k, v, None)
    assert two_signs["tied_rows"].min() > 0.9 and two_signs["one_sign"].max() == 0
    assert spread["one_sign"].min() > 0.9 and spread["exposed"].max() < 0.1


def test_errors_add_up_in_proportion_to_what_they_share():
    """E |mean|^2 = s^2 + 1/n and E |.|^2 = s^2 + 1 per number, of a shared part s and independent ones of size 1."""
    noise, n = torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0)), 16
    for shared in (0.0, 0.5, 2.0):
        expected = (n * shared**2 + 1) / (shared**2 + 1)
        assert alignment(noise + shared).item() == pytest.approx(expected, rel=0.02)
    assert alignment(torch.ones(n, 5)).item() == n and alignment(torch.zeros(n, 5)).isnan()


@pytest.mark.slow
def test_the_command_writes_every_kernel_of_every_trained_run(make_run, tmp_path, capsys):
    runs = [make_run("train.steps=10", f"seed={seed}") for seed in (0, 1)]
    for run in runs:
        train(run, tmp_path)
    cells = [
        {"model": "tiny", "role": "faulty", "fault": "fp32", "seed": run.seed, "run_id": run.run_id} for run in runs
    ]
    experiment = {
        "name": "made_up", "title": "Made up", "models": ["tiny"], "align": ["steps"], "faults": {"fp32": {}},
        "detectors": {"loss": ["train_loss_raw"]}, "baseline": "loss", "figure": {},
    }  # fmt: skip
    index = {
        "experiment": experiment, "scale": {"name": "tiny", "alpha": 0.1}, "label": conf("label", "drawup"),
        "rule": conf("rule", "ewma"), "runs": cells,
    }  # fmt: skip
    (tmp_path / "experiment.json").write_text(json.dumps(index))
    out = tmp_path / "rounding.csv"
    arguments = [f"report={tmp_path}", f"runs={tmp_path}", f"out={out}"]
    main([*arguments, "fault=fp32"])
    table = pd.read_csv(out)
    assert "alignment" in capsys.readouterr().out
    assert set(table["seed"]) == {0, 1} and set(table["kernel"]) == set(KERNELS)
    assert len(table) == 2 * len(KERNELS) * 2 * (
        4 * 2 + 2 * 2
    )  # seeds, kernels, layers: four of each head, two of W_Q, W_K
    mean = table.groupby(["quantity", "kernel"])["value"].mean()
    assert mean["output_bias", "truncated2"] == mean["output_bias", "fp32"]  # the O that is returned is whole
    assert mean["output_bias", "stored_o"] == mean["output_bias", "natural"] != mean["output_bias", "fp32"]
    assert mean["gradient_error", "truncated2"] > 2 * mean["gradient_error", "fp32"] > 0
    assert mean["alignment", "truncated2"] > 2 * mean["alignment", "fp32"]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "fault=each"])
    assert capsys.readouterr().err == "error: fault='each' is not allowed: one of fp32\n"


def test_weights_that_do_not_fit_are_named(make_run, tmp_path):
    run = make_run("train.steps=10")
    train(run, tmp_path)
    folder = tmp_path / run.run_id
    weights = load_file(folder / trace.WEIGHTS)
    name = next(name for name in weights if name.endswith("attention.q.weight"))
    data = save({other: weight for other, weight in weights.items() if other != name})
    manifest = trace.read_manifest(folder)
    manifest["files"] |= trace.write_file(folder, trace.WEIGHTS, data)
    trace.write_manifest(folder, manifest)
    with pytest.raises(TraceError, match=f"the weights do not fit the model: {re.escape(name)}"):
        trained(folder)


def test_the_kernels_are_the_arithmetics_of_the_experiment():
    """And beside them the fault that is known to add up."""
    faults = yaml.safe_load((CONF / "experiment" / "natural_bf16.yaml").read_text())["experiment"]["faults"]
    for name, fault in faults.items():
        changes = {}
        for key, _, value in (override.partition("=") for override in fault["overrides"] if "fault." in override):
            changes[key.removeprefix("fault.")] = yaml.safe_load(value)
        numerics = construct("fault", "natural_bf16", **changes).corrupt.operation
        assert KERNELS[name].layer(0).arithmetic == numerics.layer(0).arithmetic, name
    assert KERNELS.keys() - faults.keys() == {"truncated2"}
