"""The norms' conservation laws, watched: each residual, and the residual over what rounding alone predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foreshock.models.taps import Tap
from foreshock.monitors import conservation, fp32_rounding
from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.batch_rows import check_rows, in_turn
from foreshock.monitors.conservation import relative
from foreshock.monitors.fp32_rounding import NormStep
from foreshock.monitors.law import NORM, Law
from foreshock.monitors.signal import OVER_NOISE, with_ratio

NORM_NAMES = ("attention", "mlp", "q", "k", "final")
LAW = "norm_orthogonality_residual"


class NormLaws:
    """``norm_orthogonality_residual.<attention|mlp|q|k|final>`` and its ``.shift.<...>``. Bad: up.

    Signals, per layer, ``final`` one for the model: the residual, the root mean square over tokens, and
    ``.over_noise``, what is broken over what rounding alone predicts (``monitors.fp32_rounding``), about 1 in a healthy
    run at any step. Left out: ``q`` and ``k`` without QK-norm, the shift law of an RMSNorm.

    rows: how many rows of the batch are looked at, taken in turn from reading to reading; 0 for all. every_steps:
    cadence.
    """

    needs = Needs(taps=("norm",), stackable=True)

    def __init__(self, every_steps: int, rows: int) -> None:
        self.rows, self.every_steps = check_rows(rows), every_steps
        self.signals = tuple(
            signal
            for law in (LAW, f"{LAW}.shift")
            for norm in NORM_NAMES
            for signal in _signals(law, norm, every_steps)
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        alike: dict[torch.Size, dict[str, list[Tap]]] = {}
        for norm in NORM_NAMES:
            own = view.tapped("norm", f"{norm}_norm")
            if own:
                alike.setdefault(own[0].output.shape, {})[norm] = own
        readings: dict[str, Reading] = {}
        for group in alike.values():
            found = _laws([tap for own in group.values() for tap in own], self.rows, view.step // self.every_steps)
            for (law, suffix), values in found.items():
                for norm, value in zip(group, values.split([len(own) for own in group.values()]), strict=True):
                    readings[f"{law}.{norm}{suffix}"] = value[0] if norm == "final" else value
        return readings


def _signals(law: str, norm: str, every_steps: int) -> tuple[Signal, Signal]:
    """The residual of a law of one norm and its ratio."""
    axes = () if norm == "final" else ("layer",)
    return with_ratio(Signal(f"{law}.{norm}", "1", "up", axes, every_steps, family="conservation"), Law(NORM, norm))


def _laws(taps: Sequence[Tap], rows: int, reading: int) -> dict[tuple[str, str], Tensor]:
    """By law and suffix, (len(taps),), of norms of one shape, whichever they are: every operation is paid once."""
    t = _step(taps, in_turn(rows, reading, len(taps[0].output)))
    orthogonality = conservation.norm_orthogonality(t.x, t.dx, t.y, t.dy, eps=t.eps, bias=t.bias, centred=t.centred)
    laws = {LAW: (orthogonality, fp32_rounding.norm_orthogonality_noise(t))}
    if t.centred:
        laws[f"{LAW}.shift"] = (conservation.norm_shift(t.dx), fp32_rounding.norm_shift_noise(t))
    found = {}
    in_fp32 = all(x.dtype in (torch.float32, torch.float64) for x in (taps[0].inputs[0], taps[0].output))
    for law, ((broken, scale), noise) in laws.items():
        found[law, ""] = _over_tokens(relative(broken, scale))
        if not in_fp32:
            continue  # BF16 is rounded to on the way, which the predictions do not know
        found[law, f".{OVER_NOISE}"] = _over_tokens(relative(broken, noise.sqrt()))
    return found


def _over_tokens(residual: Tensor) -> Tensor:
    """(norms, ...) -> (norms,): the root mean square over tokens."""
    return residual.flatten(1).square().mean(-1).sqrt()


def _step(taps: Sequence[Tap], rows: slice) -> NormStep:
    def together(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor[rows] for tensor in tensors]).double()

    def beside(vectors: Sequence[Tensor]) -> Tensor:
        """(norms, M) so that it broadcasts over the tokens of each."""
        stacked = torch.stack([vector.detach() for vector in vectors]).double()
        return stacked.view(len(taps), *[1] * (taps[0].output.ndim - 1), -1)

    kind = taps[0].kind
    return NormStep(
        x=together([tap.inputs[0] for tap in taps]),
        dx=together([tap.input_grads[0] for tap in taps]),
        y=together([tap.output for tap in taps]),
        dy=together([tap.output_grad for tap in taps]),
        gain=beside([tap.module.weight for tap in taps]),
        bias=None if taps[0].bias is None else beside([tap.bias for tap in taps]),
        eps=kind.eps,
        centred=kind.centred,
    )
