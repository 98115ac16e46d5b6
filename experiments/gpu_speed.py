"""How fast the Triton attention is on a GPU: ratios to its rivals, measured in one run in turns, medians.

Causal, BF16, 16,384 tokens of 16 heads whatever the sequence length. A GPU that first sleeps for a while lets the host
queue the calls of a sample, so that the time of the host is not in it. Needs ``models/`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foreshock.experiments.gpu_record import first_line
from foreshock.models.flash import flash_attention_triton
from foreshock.models.numerics import HEALTHY_LAYER, LayerNumerics, SiteFault
from foreshock.models.tiles import Tiles, pinned_tiles

TOKENS, HEADS = 16384, 16
D_HEADS = (64, 128)
LENGTHS = (1024, 2048, 4096, 8192, 16384)
SAMPLES, WARM_UP, CALLS = 11, 3, 5
SLEEP_CYCLES = 10_000_000
"""Some 5 ms: more than the host needs to queue the calls of a sample."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS = "healthy"


@dataclass(frozen=True)
class Case:
    """One size. length: tokens a sequence; TOKENS / length sequences make a batch."""

    length: int
    d_head: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return TOKENS // self.length, HEADS, self.length, self.d_head


def flops(case: Case, backward: bool) -> float:
    """Of causal attention, as papers count them (arXiv:2307.08691): 4 S^2 D / 2 a head forward, 2.5 as many backward.

    backward: of forward and backward together.
    """
    B, H, S, D = case.shape
    return 4 * S**2 * D / 2 * H * B * (3.5 if backward else 1)


def faulty(bits: int) -> LayerNumerics:
    """The paper's fault, o and dO truncated in the backward, and O in the forward; at 0 bits compiled in, but off."""
    sites = (("o", "forward"), ("o", "backward"), ("do", "backward"))
    return LayerNumerics({(site, phase): (SiteFault(site, phase, "truncate", bits),) for site, phase in sites})


def triton_attention(numerics: LayerNumerics, tiles: Tiles, device: torch.device) -> Attend:
    """The kernels with these tiles and faults."""
    nonfinite = torch.zeros((), dtype=torch.int64, device=device)
    return lambda q, k, v: flash_attention_triton(q, k, v, numerics, nonfinite, None, tiles)


def _sdpa(backend: str) -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _flex(length: int, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # it compiles one function for a few sizes, then gives up
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def contestants(case: Case, device: torch.device) -> dict[str, Callable[[], Attend]]:
    """What is measured, each made when it is called: some need a compiler, or a part of PyTorch that may be missing.

    The healthy kernel is compiled without the sites: it is the build that never had them. Beside it, the same
    kernel with the sites of ``faulty`` compiled in and told to do nothing, and doing it; and one that adds dQ up
    with atomics, as FlashAttention-2 and cuDNN do.
    """
    tiles, adding = (pinned_tiles(case.d_head, deterministic) for deterministic in (True, False))
    return {
        OURS: lambda: triton_attention(HEALTHY_LAYER, tiles, device),
        "sites compiled in, off": lambda: triton_attention(faulty(0), tiles, device),
        "sites on": lambda: triton_attention(faulty(7), tiles, device),
        "dQ by atomics": lambda: triton_attention(HEALTHY_LAYER, adding, device),
        "cuDNN": lambda: _sdpa("CUDNN_ATTENTION"),
        "FlashAttention-2": lambda: _sdpa("FLASH_ATTENTION"),
        "FlexAttention": lambda: _flex(case.length, device),
    }


def passes(attend: Attend, case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """One call forward, and one forward and backward, on random BF16 tensors."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.randn(case.shape, generator=generator, device=device).bfloat16() for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    return {
        "forward": forward,
        "forward and backward": lambda: torch.autograd.grad(attend(*leaves), leaves, do),
    }


def _sample_ms(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    for _ in range(CALLS):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / CALLS


def in_turns(
    calls: Mapping[str, Callable[[], object]], sample: Callable[[Callable[[], object]], float] = _sample_ms
) -> dict[str, float]:
    """The median of each call's samples, taken in turns; the first few are warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(SAMPLES + WARM_UP):
        for name, call in calls.items():
            taken[name].append(sample(call))
    return {name: median(values[WARM_UP:]) for name, values in taken.items()}


def summary(ms: Mapping[str, float], case: Case, backward: bool) -> dict[str, dict[str, float]]:
    """Of every contestant: time, TFLOP/s, and its time over that of the healthy kernel."""
    return {
        name: {"ms": t, "tflops": flops(case, backward) / t / 1e9, "time_over_healthy": t / ms[OURS]}
        for name, t in ms.items()
    }


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """One size, both passes; a rival that cannot run is there with its error's first line."""
    ready: dict[str, dict[str, Callable[[], object]]] = {}
    missing: dict[str, str] = {}
    for name, make in contestants(case, device).items():
        try:
            calls = passes(make(), case, device)
            for call in calls.values():
                call()
            torch.cuda.synchronize()
            ready[name] = calls
        except Exception as error:
            if name == OURS:
                raise
            missing[name] = first_line(error)
    results: dict[str, Any] = {"length": case.length, "d_head": case.d_head, "shape": case.shape, "missing": missing}
    for part in ("forward", "forward and backward"):
        results[part] = summary(in_turns({name: calls[part] for name, calls in ready.items()}), case, part != "forward")
    return results


def cases() -> Iterator[Case]:
    """Short sequences first: what a time limit cuts off is the longest."""
    for length in LENGTHS:
        for d_head in D_HEADS:
            yield Case(length, d_head)
