"""A watch takes the monitors that the model's anatomy allows, and refuses another by name."""

import re
from pathlib import Path

import pytest
import torch

from foreshock.models.anatomy import Anatomy
from foreshock.models.moe import MoEConfig
from foreshock.models.transformer import Transformer, TransformerConfig
from foreshock.monitors.adam import AdamUpdateRMS
from foreshock.monitors.base import Lookback, Needs
from foreshock.monitors.router import RouterWeight
from foreshock.monitors.watch import Watch

MONITORS = Path(__file__).parents[2] / "monitors"


def model(moe: MoEConfig | None = None) -> Transformer:
    return Transformer(
        TransformerConfig(d_model=16, n_layers=1, n_heads=2, d_ff=16, context_length=4, vocab_size=7, moe=moe)
    )


def test_a_monitor_of_routers_declines_a_dense_model_by_name():
    monitors = {"router_weight": RouterWeight(10)}
    with pytest.raises(ValueError, match=r"^monitor\.router_weight needs the role 'router', and the model has none"):
        Watch(Anatomy.of(model()), None, monitors)
    assert Watch(Anatomy.of(model(MoEConfig(n_experts=2, top_k=1, renormalise=False))), None, monitors)


def test_a_monitor_that_looks_back_at_what_the_model_lacks_declines_by_name():
    class Gates:
        signals = ()
        needs = Needs(history=(Lookback(1, 1, ("gate",)),))

    with pytest.raises(ValueError, match=r"^monitor\.gates needs the role 'gate', and the model has none"):
        Watch(Anatomy.of(model()), None, {"gates": Gates()})


def test_a_monitor_of_the_optimizer_declines_a_watch_without_one():
    plain, monitors = model(), {"adam_update_rms": AdamUpdateRMS(10)}
    with pytest.raises(ValueError, match=r"^monitor\.adam_update_rms needs the optimizer, and the watch has none"):
        Watch(Anatomy.of(plain), None, monitors)
    assert Watch(Anatomy.of(plain), torch.optim.AdamW(plain.parameters()), monitors)


def test_monitors_name_no_part_of_the_transformer():
    ours = re.compile(r"blocks\.|\.attention\.|\.mlp\.|model\.config|models\.transformer")
    assert not [path.name for path in MONITORS.glob("*.py") if ours.search(path.read_text())]
