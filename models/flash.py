"""Causal flash attention in Triton with fault sites: ``models.attention`` in one kernel forward and three backward.

BF16 in and out, FP32 accumulation, the log-sum-exp saved. Head dims 16 to 256, any sequence length, grouped KV heads,
sliding windows, every arithmetic of ``models.arithmetic`` whose ``pv_block`` ends where a tile of keys does, the mask
and the scale of ``models.wiring`` (its key-value heads are exchanged before a kernel reads them). What each site means
is said in ``models.attention``; two things depend on the tiles, as in every flash kernel: the order of FP32
sums, and, where a row has several tiles of keys, that the forward ``p`` and a running sum in BF16 are relative to the
largest score so far. A non-finite number reaches only the queries and keys of tiles that read it.

The kernels stand behind two ``torch.library`` operators, which ``torch.compile`` and CUDA graphs take as they are.
``TRITON_INTERPRET=1``, set before Python starts, runs them on a CPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from foreshock.models.flash_arithmetic import KernelArithmetic, encode_arithmetic
from foreshock.models.flash_faults import BACKWARD, FORWARD, AttentionShape, constants, encode, fault_table, operation
from foreshock.models.numerics import SITES, LayerNumerics
from foreshock.models.tiles import Tiles
from foreshock.models.visibility import check_shapes

FORBIDDEN = 2
"""``torch.get_deterministic_debug_mode`` where what is not deterministic is an error, and not a warning."""

D_HEADS = "a multiple of 8 from 16 to 256"


def takes_d_head(d_head: int) -> bool:
    """Whether the kernels exist for a head dim."""
    return 16 <= d_head <= 256 and d_head % 8 == 0


def load_kernels(device: torch.device) -> SimpleNamespace:
    """The kernels, which need Triton: most machines without a GPU do not have it.

    Raises ModuleNotFoundError without it, and ValueError for a CPU outside Triton's interpreter.
    """
    try:
        from foreshock.models.flash_backward import delta_kernel
        from foreshock.models.flash_bits import INTERPRETED
        from foreshock.models.flash_delta import delta_of_p_kernel
        from foreshock.models.flash_forward import forward_kernel
        from foreshock.models.flash_key_gradient import key_gradient_kernel
        from foreshock.models.flash_query_gradient import query_gradient_kernel
        from foreshock.models.flash_query_sum import query_sum_kernel
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        message = "attention backend 'triton' needs the package triton: install foreshock[gpu]"
        raise ModuleNotFoundError(message) from error
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError("attention backend 'triton' got cpu tensors: set TRITON_INTERPRET=1 to run its interpreter")
    return SimpleNamespace(
        forward=forward_kernel,
        delta=delta_kernel,
        delta_of_p=delta_of_p_kernel,
        key_gradient=key_gradient_kernel,
        query_gradient=query_gradient_kernel,
        query_sum=query_sum_kernel,
    )


def _block_d(d_head: int) -> int:
    return max(16, 1 << (d_head - 1).bit_length())


def _counter(q: Tensor, faults: int) -> Tensor:
    """Where a pass counts each batch row's non-finite values; empty without faults, which spares a kernel launch."""
    return q.new_zeros(q.shape[0] if faults else 0, dtype=torch.int64)


def _adds_dq(tiles: list[int]) -> bool:
    """Whether the flat tiles leave dQ to the kernel of the keys and its atomics."""
    return len(tiles) == 8


def _add_counts(nonfinite: Tensor, count_B: Tensor) -> None:
    if count_B.numel():
        nonfinite.add_(count_B.view(*nonfinite.shape, -1).sum(-1))


def _table(pass_: int, q: Tensor, k: Tensor, faults: list[int], shares: list[float], window: int) -> Tensor:
    shape = AttentionShape(q.shape[1], *k.shape[1:], window)  # type: ignore[call-arg]  # k has three sizes after B
    return fault_table(tuple(faults), tuple(shares), shape, q.device)[pass_]


@torch.library.custom_op("foreshock::flash_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    nonfinite: Tensor,
    faults: list[int],
    shares: list[float],
    window: int,
    scale: float,
    tiles: list[int],
    arithmetic: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(O, the O that the backward reads if it is another, L, each batch row's non-finite values that reached a fault).

    faults, shares: as ``models.flash_faults.encode`` gives them; window: 0 for none; scale: of Q K^T; tiles: ``Tiles``,
    flat; arithmetic: a ``KernelArithmetic``.
    ``nonfinite`` is for the backward, which adds to it.
    """
    B, H, T, D = q.shape
    code = constants(faults, shares, FORWARD)
    chosen = KernelArithmetic(*arithmetic)
    if _adds_dq(tiles) and torch.get_deterministic_debug_mode() == FORBIDDEN:
        raise RuntimeError("model.deterministic=False is not allowed after torch.use_deterministic_algorithms(True)")
    o, saved_o, lse, count = _forward_outputs(q, k, v, nonfinite, faults, shares, window, scale, tiles, arithmetic)
    queries, keys, warps, stages = tiles[:4]
    load_kernels(q.device).forward[(B * H, -(-T // queries))](
        q, k, v, o, saved_o, lse, _table(FORWARD, q, k, faults, shares, window), count, T,
        SCALE=scale, WINDOW=window, D=D, BLOCK_D=_block_d(D), ROWS=queries, COLS=keys, HEADS=H, KV_HEADS=k.shape[1],
        FAULTS=code, PV_BLOCK=int(chosen.pv_block), STORED_FP32=bool(chosen.stored_fp32),
        OFFSET=chosen.offset, BETA=chosen.beta, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o, saved_o, lse, count


@_forward.register_fake
def _forward_outputs(q, k, v, nonfinite, faults, shares, window, scale, tiles, arithmetic):
    code = constants(faults, shares, FORWARD)
    saved_o = torch.empty_like(q) if operation(code, SITES.index("o")) else q.new_empty(0)
    if KernelArithmetic(*arithmetic).stored_fp32:
        saved_o = torch.empty_like(q, dtype=torch.float32)
    return torch.empty_like(q), saved_o, q.new_empty(q.shape[:3], dtype=torch.float32), _counter(q, code)


@torch.library.custom_op("foreshock::flash_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    faults: list[int],
    shares: list[float],
    window: int,
    scale: float,
    tiles: list[int],
    arithmetic: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dQ, dK, dV, each batch row's non-finite values that reached a fault). Arguments as in the forward."""
    B, H, T, D = q.shape
    G = k.shape[1]
    code = constants(faults, shares, BACKWARD)
    table = _table(BACKWARD, q, k, faults, shares, window)
    dq, dk, dv, count = _backward_outputs(q, k, v, o, lse, do, faults, shares, window, scale, tiles, arithmetic)
    delta = torch.empty_like(lse)
    kernels = load_kernels(q.device)
    every = {"D": D, "BLOCK_D": _block_d(D), "HEADS": H, "FAULTS": code}
    both = {"SCALE": scale, "WINDOW": window, "KV_HEADS": G, **every}

    adds_dq = _adds_dq(tiles)
    queries, keys, warps, stages = tiles[:4] if adds_dq else tiles[8:]
    if KernelArithmetic(*arithmetic).delta_of_p:
        kernels.delta_of_p[(B * H, -(-T // queries))](
            q, k, v, do, lse, delta, table, count, T,
            ROWS=queries, COLS=keys, num_warps=warps, num_stages=stages, **both,
        )  # fmt: skip
    else:
        kernels.delta[(B * H, -(-T // queries))](o, do, delta, table, count, T, ROWS=queries, **every)
    if not adds_dq:
        kernels.query_gradient[(B * H, -(-T // queries))](
            q, k, v, do, lse, delta, dq, table, count, T,
            ROWS=queries, COLS=keys, num_warps=warps, num_stages=stages, **both,
        )  # fmt: skip
    dq_sum = torch.zeros_like(q, dtype=torch.float32) if adds_dq else lse  # lse: not touched
    key_queries, keys, warps, stages = tiles[4:8]
    kernels.key_gradient[(B * G, -(-T // keys))](
        q, k, v, do, lse, delta, dk, dv, dq_sum, table, count, T,
        ROWS=key_queries, COLS=keys, ADDS_DQ=adds_dq, num_warps=warps, num_stages=stages, **both,
    )  # fmt: skip
    if adds_dq:
        kernels.query_sum[(B * H, -(-T // queries))](
            dq_sum, dq, table, count, T, SCALE=scale, ROWS=queries, num_warps=warps, **every
        )
    return dq, dk, dv, count


@_backward.register_fake
def _backward_outputs(q, k, v, o, lse, do, faults, shares, window, scale, tiles, arithmetic):
    count = _counter(q, constants(faults, shares, BACKWARD))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), count


def _save_for_backward(ctx, inputs, output):
    q, k, v, ctx.nonfinite, *ctx.settings = inputs
    o, saved_o, lse, _ = output
    ctx.save_for_backward(q, k, v, saved_o if saved_o.numel() else o, lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, *_):
    dq, dk, dv, count = _backward(*ctx.saved_tensors, do.contiguous(), *ctx.settings)
    _add_counts(ctx.nonfinite, count)
    return dq, dk, dv, None, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


def check_numerics(numerics: LayerNumerics, tiles: Tiles) -> None:
    """Raise ValueError, in one line, for a layer's faults or arithmetic that the kernels cannot do."""
    encode_arithmetic(numerics.arithmetic, tiles.forward.keys)
    for pass_ in (FORWARD, BACKWARD):
        constants(*encode(numerics), pass_)


def _check(tensors: dict[str, Tensor]) -> None:
    q, k, v = (tensors[name] for name in "qkv")
    for name in "qkv":
        if tensors[name].dtype is not torch.bfloat16:
            raise TypeError(f"{name} is {tensors[name].dtype}: attention backend 'triton' takes torch.bfloat16")
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)} do not fit q {tuple(q.shape)}: only heads may differ")
    if not takes_d_head(q.shape[-1]):
        raise ValueError(f"d_head={q.shape[-1]} is not allowed by attention backend 'triton': {D_HEADS}")
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"attention backend 'triton' needs one device, got {devices}")


def flash_attention_triton(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    numerics: LayerNumerics,
    nonfinite: Tensor,
    window: int | None,
    tiles: Tiles,
) -> Tensor:
    """O (B, H, T, D) of causal attention, BF16; differentiable once.

    q: (B, H, T, D), k and v: (B, G, T, D), BF16; query head h reads KV head h // (H / G), query i the keys
    i - window + 1 to i, and with a shifted mask those after it. nonfinite: int64 scalar, or one each for the runs that
    follow one another in the batch; to it are added the non-finite values that reach an active fault, masked scores not
    among them.
    """
    _check({"q": q_BHTD, "k": k_BGTD, "v": v_BGTD, "nonfinite": nonfinite})
    check_shapes(q_BHTD, k_BGTD, window)
    faults, shares = encode(numerics)
    o, _, _, count = _forward(
        q_BHTD.contiguous(),
        k_BGTD.contiguous(),
        v_BGTD.contiguous(),
        nonfinite,
        faults,
        shares,
        0 if window is None else window,
        numerics.wiring.scale(q_BHTD.shape[-1]),
        tiles.flat(),
        encode_arithmetic(numerics.arithmetic, tiles.forward.keys),
    )
    _add_counts(nonfinite, count)
    return o
