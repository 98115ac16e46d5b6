"""The oracle against the delta that the faulty backward really uses."""

import math
from dataclasses import replace

import pytest
import torch

from foreshock.models.arithmetic import Arithmetic
from foreshock.models.bits import truncate
from foreshock.models.numerics import AttentionNumerics, SiteFault, to_bf16_grid
from foreshock.monitors.delta_bias import DeltaBiasOracle

pytestmark = pytest.mark.numeric

HEALTHY = AttentionNumerics()


def fault(site, bits=7, **where) -> AttentionNumerics:
    return AttentionNumerics((SiteFault(site, "backward", "truncate", bits, **where),))


def natural(**cure) -> AttentionNumerics:
    return AttentionNumerics(arithmetic=Arithmetic("bf16", 1, **cure))


def cut(x, bits=7):
    return truncate(x.bfloat16(), bits).float()


def expected(view, corrupt) -> torch.Tensor:
    """Per layer and head, query by query in FP64 for the clean part; ``corrupt``: O, dO, clean O to the delta used."""
    bias = torch.zeros(2, 2)
    for layer, tap in enumerate(view.taps.at("dot_product").values()):
        for head in range(2):
            for row in range(3):
                q, k, v = (to_bf16_grid(x[row, head]).double() for x in tap.inputs)
                o, do = tap.output[row, head], tap.output_grad[row, head]
                seen = [k[: i + 1] @ q[i] / math.sqrt(8) for i in range(len(q))]
                clean = torch.stack([s.softmax(0) @ v[: len(s)] for s in seen])
                delta = corrupt(o, to_bf16_grid(do), clean)
                bias[layer, head] += (delta.double() - (do.double() * clean).sum(-1)).sum()
    return bias


@pytest.mark.parametrize(
    ("numerics", "corrupt"),
    [
        (HEALTHY, lambda o, do, clean: (do * o).sum(-1)),
        (fault("o"), lambda o, do, clean: (do * cut(o)).sum(-1)),
        (fault("do"), lambda o, do, clean: (cut(do) * o).sum(-1)),
        (fault("delta"), lambda o, do, clean: cut((do * o).sum(-1))),
        (fault("dq"), lambda o, do, clean: (do * o).sum(-1)),  # not a part of delta
        (natural(), lambda o, do, clean: (do * o).sum(-1)),  # in O itself
        (natural(stored_o="fp32"), lambda o, do, clean: (do * clean).sum(-1)),
        (natural(delta="p"), lambda o, do, clean: (do * clean).sum(-1)),
    ],
)
def test_it_is_the_bias_of_the_delta_that_the_backward_uses(trained_steps, numerics, corrupt):
    monitor = DeltaBiasOracle(1, 0)
    view = trained_steps(monitor, numerics=numerics, init_std=0.3).next()
    got = monitor.observe(view)["delta_bias_oracle"]
    scale = max(float((tap.output * tap.output_grad).abs().sum()) for tap in view.taps.at("dot_product").values())
    torch.testing.assert_close(got, expected(view, corrupt), rtol=1e-3, atol=1e-6 * scale)


def test_grouped_heads_within_a_window_have_the_bias_of_their_own_rounding(trained_steps):
    """FP32 attention of the same kind has none, which it would not with another head's keys or more of them."""
    monitor = DeltaBiasOracle(1, 0)
    grouped = {"n_heads": 4, "n_kv_heads": 2, "window": 5, "init_std": 0.3}
    rounded, exact = (
        monitor.observe(trained_steps(monitor, backend=backend, **grouped).next())["delta_bias_oracle"]
        for backend in ("reference", "sdpa")
    )
    assert rounded.shape == (2, 4) and rounded.abs().min() > 0
    assert exact.abs().max() < 1e-3 * rounded.abs().max()


def test_truncation_stands_far_above_healthy_rounding_in_its_head_alone(trained_steps):
    monitor = DeltaBiasOracle(1, 0)
    healthy, faulty = (
        monitor.observe(trained_steps(monitor, numerics=numerics, init_std=0.3).next())["delta_bias_oracle"].abs()
        for numerics in (HEALTHY, fault("o", layers=(1,), heads=(0,)))
    )
    assert healthy.min() > 0
    assert faulty[1, 0] > 20 * healthy[1, 0]
    assert torch.equal(faulty[1, 1], healthy[1, 1])


def test_rows_stand_for_the_whole_batch(trained_steps):
    """Over a round of the batch, the estimates average to the sum over all rows."""
    all_rows, one_row = DeltaBiasOracle(1, 0), DeltaBiasOracle(1, 1)
    view = trained_steps(all_rows, numerics=fault("o"), init_std=0.3).next()
    estimates = [one_row.observe(replace(view, step=step))["delta_bias_oracle"] for step in range(3)]
    torch.testing.assert_close(torch.stack(estimates).mean(0), all_rows.observe(view)["delta_bias_oracle"])


def test_it_says_that_it_is_an_oracle_and_does_not_count_the_fault_twice(trained_steps):
    monitor = DeltaBiasOracle(1, 0)
    run = trained_steps(monitor, numerics=fault("o"))
    with torch.no_grad():
        run.model.blocks[1].attention.v.weight[:8] = math.inf
    view = run.next()
    counted = [block.attention.nonfinite.item() for block in run.model.blocks]
    assert counted[1] > 0
    got = monitor.observe(view)["delta_bias_oracle"]
    assert monitor.needs.oracle and got[1, 0].isnan()
    assert [block.attention.nonfinite.item() for block in run.model.blocks] == counted


def test_fp32_attention_has_no_bias(trained_steps):
    monitor = DeltaBiasOracle(1, 0)
    kernels = {
        backend: monitor.observe(trained_steps(monitor, backend=backend, init_std=0.3).next())["delta_bias_oracle"]
        for backend in ("reference", "sdpa")
    }
    assert kernels["sdpa"].abs().max() < 1e-3 * kernels["reference"].abs().max()
