"""What ``experiments.bench_gpt2`` trains: GPT-2 124M as ``scale=gpu`` has it, and a rehearsal of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from experiments.gpt2_training import Training
from experiments.optimizer import TrainConfig
from experiments.plain_config import construct
from faults.base import Sites
from models.numerics import AttentionNumerics
from models.transformer import TransformerConfig


@dataclass(frozen=True)
class Size:
    """What is trained: backend: the one with fault sites; micro_batches: the configured one first.

    spectra: (how many, how wide) the matrices are whose eigenvalues a monitor asks for at once.
    """

    model: TransformerConfig
    train: TrainConfig
    backend: str
    compiler: str
    micro_batches: tuple[int, ...]
    spectra: tuple[tuple[int, int], ...]

    @classmethod
    def gpt2_124m(cls, device: str) -> Size:
        train: TrainConfig = construct("train", "gpt2", device=device)
        spectra = (576, 64), (144, 128), (48, 768)
        others = tuple(size for size in (64, 16, 8) if size != train.micro_batch)
        return cls(construct("model", "gpt2_124m"), train, "triton", "inductor", (train.micro_batch, *others), spectra)

    @classmethod
    def tiny(cls, device: str) -> Size:
        """The same pieces in seconds, without kernels that would have to be built."""
        model = construct(
            "model", "gpt2_124m", d_model=32, n_layers=2, n_heads=2, d_ff=64, context_length=16, vocab_size=64
        )
        train = construct("train", "gpt2", device=device, batch_size=8, micro_batch=4, held_out_sequences=4)
        return cls(model, train, "reference", "aot_eager", (4, 2), ((8, 16),))

    def training(self, backend: str, micro_batch: int, compile: bool, numerics: AttentionNumerics) -> Training:
        """Raises ValueError where the backend cannot run on the device."""
        config = replace(self.train, micro_batch=micro_batch, compile=compile)
        model = replace(self.model, backend=backend).on(torch.device(config.device))
        return Training(model, config, numerics, self.compiler)


SIZES = {"gpt2_124m": Size.gpt2_124m, "tiny": Size.tiny}


def paper_fault() -> AttentionNumerics:
    return construct("fault", "bf16_shift").sites(0, Sites(batch_size=1)).numerics
