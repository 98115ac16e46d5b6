"""Small models of ``transformers``, randomly initialised, built offline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
LOCK = Path(__file__).parents[2] / "requirements.lock"
try:
    import transformers
except ImportError:
    if "transformers==" in LOCK.read_text():
        raise
    pytest.skip("transformers is not installed, and not in the lock", allow_module_level=True)

VOCABULARY, CONTEXT = 61, 32
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    **TOKENS,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OWN = {
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Mixtral": EXPERTS,
}


def model_of(kind: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """``GPT2``, ``Llama``, ``Qwen3``, ...: the causal language model of that name; attention: how it computes it."""
    torch.manual_seed(0)
    if kind == "GPT2":
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": CONTEXT}
        config = transformers.GPT2Config(**sizes | dropout | TOKENS | changes)
        config._attn_implementation = attention
        return transformers.GPT2LMHeadModel(config)
    config = getattr(transformers, f"{kind}Config")(**SIZES | OWN.get(kind, {}) | changes)
    config._attn_implementation = attention
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def batches(steps: int, rows: int = 4) -> list[torch.Tensor]:
    """Tokens (rows, CONTEXT) of a text with structure."""
    generator = torch.Generator().manual_seed(1)
    text = (torch.arange(3000) * 7 + torch.arange(3000).square() // 5).remainder(VOCABULARY)
    starts = torch.randint(0, 3000 - CONTEXT, (steps, rows), generator=generator).tolist()
    return [torch.stack([text[i : i + CONTEXT] for i in of_batch]) for of_batch in starts]
