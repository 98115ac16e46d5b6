"""ln Z of the output logits against its definition."""

import math

import pytest
import torch

from foreshock.monitors.output_logits import OutputLogZ
from tests.rounding_bounds import FP32, gamma

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(("rows", "chosen"), [(0, slice(None)), (1, slice(1, 2))])
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_mean_square_of_ln_z(trained_steps, rows, chosen, tied):
    monitor = OutputLogZ(1, rows)
    view = trained_steps(monitor, tie_embeddings=tied, init_std=0.5).next()
    logits = view.taps.at("linear")["head"].output[chosen].double()
    expected = (logits.exp().sum(-1).log() ** 2).mean()
    # 48 tokens and 7 exponentials, whose arguments are rounded relative to the largest logit
    bound = gamma(64, FP32) * (1 + logits.abs().max().item()) ** 2
    assert monitor.observe(view)["output_log_z"].item() == pytest.approx(expected.item(), rel=0, abs=bound)


def test_zero_logits_have_a_z_of_the_vocabulary_and_nan_stays(trained_steps):
    monitor = OutputLogZ(1, 0)
    run = trained_steps(monitor, tie_embeddings=False)
    with torch.no_grad():
        run.model.head.weight.zero_()
    assert monitor.observe(run.next())["output_log_z"].item() == pytest.approx(math.log(7) ** 2, rel=gamma(64, FP32))
    with torch.no_grad():
        run.model.head.weight[0] = math.nan
    assert monitor.observe(run.next())["output_log_z"].isnan()
