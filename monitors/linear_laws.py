"""Euler's identities of every linear layer, watched: each residual, and the residual over predicted rounding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from types import ModuleType

import torch
from torch import Tensor

from foreshock.models.anatomy import LINEAR_LAYERS
from foreshock.models.taps import Tap
from foreshock.monitors import autocast_rounding, conservation, fp32_rounding
from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.batch_rows import check_stride, every
from foreshock.monitors.conservation import relative
from foreshock.monitors.fp32_rounding import LinearStep
from foreshock.monitors.law import LINEAR, ROUTER, Law
from foreshock.monitors.signal import OVER_NOISE, with_ratio

READERS = {"qkv": ("attention_norm", ("q", "k", "v")), "mlp": ("mlp_norm", ("input", "gate"))}
"""By signal: the norm whose output is read, whose gradient is the input's, and the layers that alone read it."""

BrokenLaw = tuple[Tensor, Tensor, Tensor]
"""What is broken, the scale of its residual, and the mean square that rounding predicts: by layer, (L,) or (L, n)."""


class LinearLaws:
    """``linear_euler_residual.<part>`` and ``linear_input_residual.<qkv|o|mlp|head>`` of ``monitors.conservation``.

    Signals, per layer, ``head`` one for the model; bad: up: the residual, and ``.over_noise``, what is broken over what
    rounding alone predicts (``monitors.fp32_rounding``, under autocast ``monitors.autocast_rounding``), which is
    about 1 in a healthy run at any step, so that it needs no healthy twin. The law in W holds for a whole batch: one
    number, whose ratio is as lucky as a normal one; the law in x for each token: the root mean square over tokens.

    x, W and dW are what was multiplied and the gradient there (``models.products``): BF16 or FP16 under autocast,
    quantised numbers where a layer quantises. Left out: parts that the model does not have, and parts whose product
    cannot be seen, with a warning; ``linear_euler_residual.head`` of a head tied to the embedding, whose gradient has
    two sources; ``linear_input_residual.mlp`` with experts, whose input also feeds the choice of experts; the law in x
    of an input that some of its readers multiply as it is and others quantise.
    token_stride: the law in x and both predictions take one token in so many, in turn, 1 for all; the law in W always
    takes all. every_steps: cadence.
    """

    needs = Needs(view=("routings",), taps=("dot_product", "linear", "norm"), roles=("head",), stackable=True)

    def __init__(self, every_steps: int, token_stride: int) -> None:
        self.token_stride, self.every_steps = check_stride(token_stride), every_steps
        laws = [("linear_euler_residual", part) for part in (*LINEAR_LAYERS, "head")]
        laws += [("linear_input_residual", part) for part in (*READERS, "o", "head")]
        self.signals = tuple(signal for law, part in laws for signal in _signals(law, part, every_steps))

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        slots = torch.stack([routing.counts_E for routing in view.routings]) if view.routings else None
        tapped: set[str] = {"head"}
        steps: dict[str, LinearStep] = {}
        euler: dict[str, BrokenLaw] = {}
        for part in LINEAR_LAYERS:
            taps = view.tapped("linear", part)
            tapped |= {part} if taps else set()
            if taps and all_seen(taps, part):
                of_experts = slots if part.startswith("experts_") else None
                steps[part] = LinearStep.of(taps, self._sample(view, taps[0]), of_experts)
                euler[part] = _euler(taps, steps[part])
        (head,) = view.tapped("linear", "head")
        sample = self._sample(view, head)
        if all_seen([head], "head"):
            steps["head"] = LinearStep.of([head], sample)
            if not view.anatomy.tied:
                euler["head"] = _euler([head], steps["head"])

        do_BHTD = [tap.output_grad for tap in view.taps.at("dot_product").values()]
        seen = [do.transpose(1, 2).flatten(2) for do in do_BHTD if do is not None]
        inputs: dict[str, tuple[list[Tensor], tuple[str, ...]]] = {
            "o": (seen if len(seen) == len(do_BHTD) else [], ("o",))
        }
        for name, (norm, parts) in READERS.items():
            inputs[name] = [tap.dout for tap in view.tapped("norm", norm)], parts
        inputs["head"] = [tap.dout for tap in view.tapped("norm", "final_norm")], ("head",)
        by_input: dict[str, BrokenLaw] = {}
        for name, (dx, parts) in inputs.items():
            readers = [steps[part] for part in parts if part in steps]
            if not dx or len(readers) != sum(part in tapped for part in parts):
                continue
            one_product = view.anatomy.fused([part for part in parts if part in steps], view.taps.at("linear"))
            if len(readers) > 1 and one_product:
                readers = [LinearStep.of(one_product, sample)]
            if readers and _take_alike(readers):
                sampled = torch.stack([one.flatten(0, -2)[sample] for one in dx])
                by_input[name] = _input(sampled, readers)
        return _readings("linear_euler_residual", euler) | _readings("linear_input_residual", by_input)

    def _sample(self, view: StepView, tap: Tap) -> slice:
        return every(self.token_stride, view.step // self.every_steps, tap.out.shape[:-1].numel())


def _signals(law: str, part: str, every_steps: int) -> tuple[Signal, Signal]:
    """The residual of a law of one part and its ratio; experts take the place of an MLP, so that their law is its."""
    axes = () if part == "head" else ("layer",)
    residual = Signal(f"{law}.{part}", "1", "up", axes, every_steps, family="conservation")
    return with_ratio(residual, Law(ROUTER, ROUTER) if part == "router" else Law(LINEAR, part.removeprefix("experts_")))


def _euler(taps: Sequence[Tap], step: LinearStep) -> BrokenLaw:
    """Over all tokens of the taps, the prediction from the sampled ones."""
    laws = [conservation.linear_euler(tap.w, tap.dw, tap.y, tap.dout) for tap in taps]
    broken, scale = (torch.stack(parts) for parts in zip(*laws, strict=True))
    return broken, scale, _rounding(step).linear_euler_noise(step)


def _input(dx: Tensor, readers: Sequence[LinearStep]) -> BrokenLaw:
    """Over the sampled tokens; dx: (L, n, in), of the input that all readers multiplied, if they did."""
    of_readers = [reader.x * reader.dx for reader in readers if reader.dx is not None]
    x_dx = reduce(add, of_readers) if of_readers else readers[0].x * dx
    broken, scale = conservation.linear_input(x_dx, [reader.y_dy for reader in readers])
    return broken, scale, _rounding(readers[0]).linear_input_noise(x_dx, readers)


def _take_alike(readers: Sequence[LinearStep]) -> bool:
    """Whether all readers multiplied their common input, or each has the gradient at what it multiplied instead."""
    return len({reader.dx is None for reader in readers}) == 1


def all_seen(taps: Sequence[Tap], part: str) -> bool:
    """Whether what these layers multiplied is known; if not, a warning says which part has no law, and why."""
    of_taps = ("it takes no part in the step" if tap.product is None else tap.product.unseen for tap in taps)
    unseen = next((reason for reason in of_taps if reason), None)
    if unseen:
        warnings.warn(f"the laws of linear layers leave out {part}: {unseen}", stacklevel=2)
    return unseen is None


def _rounding(step: LinearStep) -> ModuleType:
    """The predictions for the arithmetic of these layers."""
    return autocast_rounding if step.stored in autocast_rounding.U2 else fp32_rounding


def _readings(law: str, found: Mapping[str, BrokenLaw]) -> dict[str, Reading]:
    """Residuals and ratios of one law, the root mean square over tokens where it is per token; all in one go."""
    if not found:
        return {}
    broken, scale, noise = (torch.cat(parts) for parts in zip(*found.values(), strict=True))
    readings: dict[str, Reading] = {}
    for suffix, unit in (("", scale), (f".{OVER_NOISE}", noise.sqrt())):
        values = relative(broken, unit).view(len(broken), -1).square().mean(-1).sqrt()
        for name, value in zip(found, values.split([len(part[0]) for part in found.values()]), strict=True):
            readings[f"{law}.{name}{suffix}"] = value[0] if name == "head" else value
    return readings
