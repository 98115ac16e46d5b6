"""Upper limits of a healthy run's numbers: beyond each the number cannot do what it is for.

Every limit follows from FP32 or from the quantity that the number is a part of, none from a machine. The schemas of
model and training give lower limits. The doses of faults have no limit but FP32 itself, since a fault may be as large
as a flipped exponent bit makes it, and its run ends as data.

- A weight: ``sqrt(sqrt(FP32_MAX) / d_model)``. Of weights with standard deviation s, attention's output has s^2 d_model
  (values and the output projection, each a sum over d_model terms of a normalised input), and the next norm squares it.
  So large may weights begin (``init_std``), and so far may one update of AdamW move one (``learning_rate``).
- Decay: ``1 / learning_rate``. A step multiplies a weight by 1 - learning_rate x weight_decay.
- A norm: ``sqrt(FP32_MAX)``. A norm is the root of a sum of squares: none above it is finite, so that no clip there
  acts, and a loss with such a factor has no finite gradient norm.
- Steps: as many as a run may have.
- A balancing bias: 1. It is added to probabilities, and a step beyond 1 outweighs them all.
"""

from __future__ import annotations

import math

from foreshock.experiments.training.train_config import MOST_STEPS, TrainConfig
from foreshock.experiments.validation import LARGEST_FLOAT, shown
from foreshock.models.transformer import TransformerConfig

LARGEST_NORM = math.sqrt(LARGEST_FLOAT)
MOST_STACKED = 1024
"""Runs along a model axis: as many as an experiment's role may have seeds, in the next power of 2."""


def largest_weight(model: TransformerConfig) -> float:
    """Of weights whose attention output a norm can square in FP32."""
    return math.sqrt(LARGEST_NORM / model.d_model)


def check_ranges(model: TransformerConfig, train: TrainConfig) -> None:
    """Raises ValueError, in one line that names the field, for a number beyond its limit."""
    weight, of_weights = largest_weight(model), "beyond it FP32 cannot square what attention gives"
    for field in ("init_std", "query_init_std"):
        _at_most(weight, getattr(model, field), f"model.{field}", of_weights)
    _at_most(weight, train.learning_rate, "train.learning_rate", "an update moves weights by it, and " + of_weights)
    _at_most(
        1 / train.learning_rate,
        train.weight_decay,
        "train.weight_decay",
        "1 / train.learning_rate, with which a step takes all of a weight away",
    )
    _at_most(LARGEST_NORM, train.clip, "train.clip", "the largest norm that FP32 can take; null for no clip")
    for field in ("warmup_steps", "checkpoint_every_steps"):
        _at_most(MOST_STEPS, getattr(train, field), f"train.{field}", "the most steps of a run")
    _at_most(MOST_STACKED, train.stack, "train.stack", "the most runs of a role")
    if moe := model.moe:
        _at_most(1.0, moe.bias_update_speed, "model.moe.bias_update_speed", "the largest probability")
        for field in ("aux_coef", "z_coef"):
            _at_most(LARGEST_NORM, getattr(moe, field), f"model.moe.{field}", "the largest norm that FP32 can take")


def _at_most(limit: float, value: float | None, where: str, why: str) -> None:
    if value is not None and value > limit:
        raise ValueError(f"{where}={shown(value)} is not allowed: at most {limit:.7g}, {why}")
