"""Where an attention kernel rounds to BF16, by name: what a prediction of its rounding errors has to assume.

Every kernel here takes q, k, v and dO in BF16, accumulates products in FP32, and stores Pbar = exp(S - max S) for O, O,
P and dS for the products of the backward, and dQ, dK and dV in BF16. Kernels differ in what is below. A kernel without
an entry has no prediction: its laws are read as relative residuals only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foreshock.models.anatomies.attention_call import CUSTOM, EAGER, TORCH_FLASH, TORCH_OTHER, AttentionCall
from foreshock.models.taps import Tap
from foreshock.monitors.fast_exp import fast_exp


@dataclass(frozen=True)
class KernelRounding:
    """The rounding points of one kernel. Sizes are tokens.

    forward_keys: keys that the forward takes at a time; its Pbar is rounded relative to the largest score so far. None:
    the whole row at once, relative to the row's maximum.
    sum_queries: the running sums of dK and dV are rounded to BF16 after so many queries; None: once, at the end.
    sum_keys: the running sum of dQ is rounded to BF16 after so many keys; None: once, at the end.
    two_score_gradients: dQ and dK each multiply a dS of a kernel of their own, whose FP32 sums may differ, so that an
    entry near the middle of two BF16 numbers may be rounded up in one and down in the other.
    fast_exp: the forward's exponential is ``monitors.fast_exp``; else it is right to FP32.
    rounds: whether anything is rounded to BF16 at all.
    normalised: eager attention, which stores P after the division by its row sum, and S, dP and dS too.
    measured: whether its errors are measured in FP64 (``monitors.measured_twin``), FP32's among them.
    """

    name: str
    forward_keys: int | None = None
    sum_queries: int | None = None
    sum_keys: int | None = None
    two_score_gradients: bool = False
    fast_exp: bool = False
    rounds: bool = True
    normalised: bool = False
    measured: bool = False


NARROWEST = 16
"""Head width below which the library under PyTorch's flash kernel in FP32 sums in an order whose errors are larger than
the twin's, twice at 8. From here on they are 0.97 to 1.25 of them, and 1.5 for dV of width 128 in 64 tokens."""

UNROUNDED = KernelRounding("none", rounds=False)
"""Attention in FP32, or FP64 where its tensors are."""

REFERENCE = KernelRounding("reference")
"""``models.attention`` in health. A fault or a cure that stores other tensors in BF16 is no part of it."""


def triton_rounding(forward_keys: int, deterministic: bool) -> KernelRounding:
    """``models.flash`` with these tiles; not deterministic: one kernel makes dS and adds dQ up with atomics."""
    return KernelRounding("triton", forward_keys=forward_keys, two_score_gradients=deterministic)


def pytorch_cpu_rounding(tokens: int, fast: bool) -> KernelRounding:
    """The flash kernel of ``scaled_dot_product_attention`` on a CPU with BF16 tensors, for sequences of so many tokens.

    It takes 512 keys at a time, and 256 queries from 768 tokens on, 64 from 192 on, else 32. What each such tile gives
    is added to dQ, dK and dV in BF16 (PyTorch 2.13, aten/native/cpu/FlashAttentionKernel.cpp). fast: with vector
    instructions its forward, not its backward, has an exponential of its own.
    """
    queries = 256 if tokens >= 768 else 64 if tokens >= 192 else 32
    return KernelRounding("PyTorch's CPU flash", 512, queries, 512, fast_exp=fast)


@cache
def pytorch_cpu_exp_is_fast() -> bool | None:
    """Which exponential PyTorch's flash kernel has on this CPU, told from what it returns; None: neither.

    Another instruction set or release may have another. Of 4,096 numbers of one O the right one gives all but a few to
    the bit, the other 96 %.
    """
    angles = torch.arange(3 * 64 * 64).square().reshape(3, 1, 1, 64, 64) * 0.7
    q, k, v = (1.5 * angles.sin()).bfloat16()
    with torch.autocast("cpu", enabled=False), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    scores = (q.float() @ k.float().mT / 8).masked_fill(hidden, -torch.inf)
    below_top = scores - scores.amax(-1, keepdim=True)
    for exponential, fast in ((torch.exp, False), (fast_exp, True)):
        p = exponential(below_top)
        o = p.bfloat16().float() @ v.float() / p.sum(-1, keepdim=True)
        if (o.bfloat16() == found).double().mean() > 0.99:
            return fast
    return None


def kernel_rounding(tap: Tap) -> KernelRounding | None:
    """The rounding points of the kernel that ran under a tap on a dot product, or None where they are not known.

    Known of ``sdpa``: BF16 on a CPU with its flash kernel allowed as the monitor reads, every query head with its own
    keys, no window, and a multiple of 16 tokens where its exponential is fast: it takes the rest by another. PyTorch
    serves all else by kernels that it chooses by device and shape, or sums a group's dK outside of them.
    """
    call, q_BHTD = tap.call, tap.inputs[0]
    if call.kernel in (EAGER, TORCH_FLASH, TORCH_OTHER, CUSTOM):
        return _of_other_models(call, q_BHTD, tap.inputs[1])
    if call.kernel == "reference":
        return REFERENCE
    if call.kernel == "triton":
        return triton_rounding(call.tiles.forward.keys, call.tiles.deterministic)
    plain = call.window is None and q_BHTD.shape[-3] == tap.inputs[1].shape[-3]
    on_cpu = q_BHTD.device.type == "cpu" and torch.backends.cuda.flash_sdp_enabled()  # the flag is the CPU's as well
    if q_BHTD.dtype is not torch.bfloat16 or not on_cpu or not plain:
        return None
    tokens, fast = q_BHTD.shape[-2], pytorch_cpu_exp_is_fast()
    return None if fast is None or (fast and tokens % 16) else pytorch_cpu_rounding(tokens, fast)


def _of_other_models(call: AttentionCall, q_BHTD: Tensor, k_BGTD: Tensor) -> KernelRounding | None:
    """Known are eager attention and PyTorch's flash kernel on a CPU, of FP32 and of BF16 products."""
    on_cpu, tokens = q_BHTD.device.type == "cpu", q_BHTD.shape[-2]
    in_bf16 = call.dtype is torch.bfloat16
    if not in_bf16 and call.dtype is not torch.float32:
        return None
    if call.kernel == EAGER and (on_cpu or in_bf16 or not torch.backends.cuda.matmul.allow_tf32):
        return KernelRounding("eager", rounds=in_bf16, normalised=True, measured=True)
    if call.kernel != TORCH_FLASH or not on_cpu:
        return None
    if not in_bf16 and q_BHTD.shape[-1] < NARROWEST:
        return None
    if not in_bf16:
        return replace(pytorch_cpu_rounding(tokens, False), rounds=False, measured=True)
    fast = pytorch_cpu_exp_is_fast()
    if fast is None or (fast and tokens % 16):
        return None
    alike = q_BHTD.shape[-3] == k_BGTD.shape[-3] and call.window is None
    return replace(pytorch_cpu_rounding(tokens, fast), measured=not alike)
