"""A model trained on the Triton kernels, and watched: what it is on the reference, healthy and under a fault."""

import pytest
import torch

from foreshock.models.numerics import HEALTHY, AttentionNumerics, SiteFault
from foreshock.models.tiles import Tile, Tiles
from foreshock.monitors.attention_laws import AttentionLaws
from tests.models.attention_in_fp64 import distance
from tests.models.attention_in_triton import in_the_interpreter
from tests.rounding_bounds import FP32, gamma

pytestmark = [*in_the_interpreter, pytest.mark.numeric]

TILES = Tiles(*[Tile(16, 16, 4, 1)] * 3)
GROUPED = {"n_kv_heads": 1, "window": 6, "positions": "rope", "qk_norm": True}
FAULT = AttentionNumerics((SiteFault("o", "backward", "truncate", 7), SiteFault("do", "backward", "truncate", 7)))


def watched(trained_steps, backend, numerics, model, steps=3):
    """Of every step: the loss, all gradients, the laws' residuals and what they are over their predicted noise."""
    laws, tiles = AttentionLaws(every_steps=1, rows=0), TILES if backend == "triton" else None
    shape = {"d_model": 32, "n_layers": 1, "init_std": 0.2, "backend": backend, "tiles": tiles}
    run = trained_steps(laws, numerics=numerics, **shape | model)
    for _ in range(steps):
        view = run.next()
        gradients = {name: p.grad.clone() for name, p in run.model.named_parameters()}
        yield view.loss.item(), gradients, laws.observe(view)


@pytest.mark.parametrize("numerics", [HEALTHY, FAULT])
@pytest.mark.parametrize("model", [{}, GROUPED])
def test_training_is_that_of_the_reference_up_to_rounding(trained_steps, numerics, model):
    both = (watched(trained_steps, backend, numerics, model) for backend in ("triton", "reference"))
    for (loss, gradients, laws), (right_loss, right_gradients, right_laws) in zip(*both, strict=True):
        assert loss == pytest.approx(right_loss, rel=2 * gamma(300, FP32))
        assert all(distance(gradients[name], right) < 1e-3 for name, right in right_gradients.items())
        for name, right in right_laws.items():
            torch.testing.assert_close(laws[name], right, rtol=0.1, atol=0.0, msg=name)
        assert (laws["key_shift_residual.over_noise"].min() > 10) == (numerics is FAULT)
