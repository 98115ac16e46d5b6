"""What ``experiments.bench_gpt2`` trains: GPT-2 124M as ``scale=gpu`` has it, and a rehearsal of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from foreshock.experiments.gpt2_training import Training
from foreshock.experiments.plain_config import construct
from foreshock.experiments.training.train_config import TrainConfig
from foreshock.faults.base import Sites
from foreshock.models.numerics import HEALTHY, AttentionNumerics
from foreshock.models.transformer import TransformerConfig


@dataclass(frozen=True)
class Size:
    """What is trained; the model's backend is the one with fault sites.

    rivals: by name, what of the model they change; micro_batches: the configured one first.
    """

    model: TransformerConfig
    train: TrainConfig
    rivals: Mapping[str, Mapping[str, Any]]
    compiler: str
    micro_batches: tuple[int, ...]

    @classmethod
    def gpt2_124m(cls, device: str) -> Size:
        train: TrainConfig = construct("train", "gpt2", device=device)
        micro_batch = train.micro_batch or train.batch_size
        return cls(
            construct("model", "gpt2_124m", backend="triton"),
            train,
            {"sdpa": {"backend": "sdpa"}, "dQ by atomics": {"deterministic": False}},
            "inductor",
            (micro_batch, *(size for size in (64, 16, 8) if size != micro_batch)),
        )

    @classmethod
    def tiny(cls, device: str) -> Size:
        """The same pieces in seconds, without kernels that would have to be built."""
        shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "context_length": 16, "vocab_size": 64}
        return cls(
            construct("model", "gpt2_124m", backend="reference", **shape),
            construct(
                "train", "gpt2", device=device, batch_size=8, micro_batch=4, watched_sequences=1, held_out_sequences=4
            ),
            {"sdpa": {"backend": "sdpa"}},
            "aot_eager",
            (4, 2),
        )

    def training(
        self, micro_batch: int, compile: bool, numerics: AttentionNumerics = HEALTHY, **changes: Any
    ) -> Training:
        """changes: to the model. Raises ValueError where it cannot run on the device."""
        config = replace(self.train, micro_batch=micro_batch, compile=compile)
        model = replace(self.model, **changes).on(torch.device(config.device))
        return Training(model, config, numerics, self.compiler)


SIZES = {"gpt2_124m": Size.gpt2_124m, "tiny": Size.tiny}


def paper_fault() -> AttentionNumerics:
    return construct("fault", "bf16_shift").sites(0, Sites(batch_size=1)).numerics
