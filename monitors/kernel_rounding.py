"""Where an attention kernel rounds to BF16, by name: what a prediction of its rounding errors has to assume.

Every kernel here takes q, k, v and dO in BF16, accumulates products in FP32, and stores Pbar = exp(S - max S) for O, O,
P and dS for the products of the backward, and dQ, dK and dV in BF16. Kernels differ in what is below. A kernel without
an entry has no prediction: its laws are read as relative residuals only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.taps import Tap


@dataclass(frozen=True)
class KernelRounding:
    """The rounding points of one kernel. Sizes are tokens.

    forward_keys: keys that the forward takes at a time; its Pbar is rounded relative to the largest score so far. None:
    the whole row at once, relative to the row's maximum.
    sum_queries: the running sums of dK and dV are rounded to BF16 after so many queries; None: once, at the end.
    sum_keys: the running sum of dQ is rounded to BF16 after so many keys; None: once, at the end.
    two_score_gradients: dQ and dK each multiply a dS of a kernel of their own, whose FP32 sums may differ, so that an
    entry near the middle of two BF16 numbers may be rounded up in one and down in the other.
    """

    name: str
    forward_keys: int | None = None
    sum_queries: int | None = None
    sum_keys: int | None = None
    two_score_gradients: bool = False


REFERENCE = KernelRounding("reference")
"""``models.attention``."""


def triton_rounding(forward_keys: int, deterministic: bool) -> KernelRounding:
    """``models.flash`` with these tiles; not deterministic: one kernel makes dS and adds dQ up with atomics."""
    return KernelRounding("triton", forward_keys=forward_keys, two_score_gradients=deterministic)


def pytorch_cpu_rounding(tokens: int) -> KernelRounding:
    """The flash kernel of ``scaled_dot_product_attention`` on a CPU with BF16 tensors, for sequences of so many tokens.

    It takes 512 keys at a time, and 256 queries from 768 tokens on, 64 from 192 on, else 32. What each such tile gives
    is added to dQ, dK and dV in BF16 (PyTorch 2.13, aten/native/cpu/FlashAttentionKernel.cpp).
    """
    queries = 256 if tokens >= 768 else 64 if tokens >= 192 else 32
    return KernelRounding("PyTorch's CPU flash", forward_keys=512, sum_queries=queries, sum_keys=512)


def kernel_rounding(tap: Tap) -> KernelRounding | None:
    """The rounding points of the kernel that ran under a tap on a dot product, or None where they are not known.

    Known of ``sdpa``: BF16 on a CPU with its flash kernel allowed, every query head with its own keys, and no window.
    PyTorch serves all else by kernels that it chooses by device and shape, or sums a group's dK outside of them.
    """
    module, q_BHTD = tap.module, tap.inputs[0]
    if module.backend == "reference":
        return REFERENCE
    if module.backend == "triton":
        return triton_rounding(module.tiles.forward.keys, module.tiles.deterministic)
    plain = module.window is None and q_BHTD.shape[-3] == tap.inputs[1].shape[-3]
    on_cpu = q_BHTD.device.type == "cpu" and torch.backends.cuda.flash_sdp_enabled()  # the flag is the CPU's as well
    if q_BHTD.dtype is torch.bfloat16 and on_cpu and plain:
        return pytorch_cpu_rounding(q_BHTD.shape[-2])
    return None
