"""Which keys a query may look at: those before it and its own, or the last few of them.

T: tokens. Query i sees key j where i - window < j <= i; window None: every j <= i (arXiv:2004.05150, causal).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def visible_keys(tokens: int, window: int | None, device: torch.device | None = None, ahead: int = 0) -> Tensor:
    """(T, T), boolean: rows are queries, columns keys; not to be written. A window of T or more is none.

    ahead: how many later keys a query sees, 0 where the mask is right.
    """
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril_(ahead)
    return seen if window is None else seen.triu_(1 - window)


@lru_cache(maxsize=16)
def score_mask(
    tokens: int, window: int | None, query_heads: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(1, query_heads x T, T), to be added to scores: 0 where a query may look, -inf elsewhere. Not to be written.

    query_heads: how many query heads share the keys, one after another.
    """
    mask = torch.zeros(tokens, tokens, device=device, dtype=dtype)
    return mask.masked_fill_(~visible_keys(tokens, window, device), -math.inf).repeat(query_heads, 1).unsqueeze(0)


@lru_cache(maxsize=16)
def shifted_visible_keys(
    tokens: int, window: int | None, ahead: int, heads: tuple[int, ...] | None, n_heads: int, device: torch.device
) -> Tensor:
    """(n_heads, T, T), boolean: as ``visible_keys`` of each query head, some of which (None: all) see keys ahead."""
    seen = visible_keys(tokens, window, device).expand(n_heads, -1, -1).clone()
    seen[slice(None) if heads is None else list(heads)] = visible_keys(tokens, window, device, ahead)
    return seen


def check_shapes(q_BHTD: Tensor, k_BGTD: Tensor, window: int | None) -> None:
    """Raise ValueError for key-value heads that query heads cannot share evenly, or a window without a key."""
    H, G = q_BHTD.shape[1], k_BGTD.shape[1]
    if H % G:
        raise ValueError(f"{H} query heads cannot share {G} key-value heads evenly")
    if window is not None and window < 1:
        raise ValueError(f"window={window} is not allowed: at least 1 key, or None for all")
