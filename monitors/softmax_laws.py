"""What softmax's shift forbids outside attention, watched: at the logits, at an untied head, at every router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foreshock.models.numerics import at_least_fp32
from foreshock.models.taps import Tap, known
from foreshock.monitors import autocast_rounding, conservation, fp32_rounding
from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.batch_rows import check_stride, every
from foreshock.monitors.conservation import Broken, relative
from foreshock.monitors.fp32_rounding import LinearStep
from foreshock.monitors.law import LOSS, ROUTER, Law
from foreshock.monitors.linear_laws import all_seen
from foreshock.monitors.signal import OVER_NOISE, with_ratio


def _both(name: str, broken: Broken, noise: Tensor) -> dict[str, Reading]:
    """The residual, and what is broken over the predicted mean square."""
    return {name: relative(*broken), f"{name}.{OVER_NOISE}": relative(broken[0], noise.sqrt())}


class LogitLaws:
    """``logit_shift_residual`` of the logits' gradient, and its ``.head`` of an untied head's weight gradient. Bad: up.

    Each also as ``.over_noise``, what is broken over what rounding alone predicts (``monitors.fp32_rounding``, under
    autocast ``monitors.autocast_rounding``), about 1 in a healthy run at any step. Under autocast the head's law
    is that of the rounded logits' gradient, whose own shift is taken off. Left out: a tied head, whose gradient is also
    the embedding's.
    token_stride: the logits and both predictions are looked at for one token in so many, in turn, 1 for all.
    every_steps: cadence.
    """

    needs = Needs(taps=("linear",), roles=("head",), stackable=True)

    def __init__(self, every_steps: int, token_stride: int) -> None:
        self.token_stride, self.every_steps = check_stride(token_stride), every_steps
        self.signals = tuple(
            signal
            for name in ("logit_shift_residual", "logit_shift_residual.head")
            for signal in with_ratio(Signal(name, "1", "up", (), every_steps, family="conservation"), Law(LOSS, LOSS))
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        (tap,) = view.tapped("linear", "head")
        sample = every(self.token_stride, view.step // self.every_steps, tap.out.shape[:-1].numel())
        stored = tap.out.dtype
        logits, dlogits = (at_least_fp32(part.flatten(0, -2)[sample]) for part in (tap.out, tap.dout))
        tokens = tap.out.shape[:-1].numel() / (view.loss_scale or 1)
        if stored in autocast_rounding.U2:
            noise = autocast_rounding.logit_shift_noise(logits, dlogits, tokens, stored)
        else:
            noise = fp32_rounding.logit_shift_noise(logits, dlogits, tokens)
        noise = noise * (dlogits != 0).any(-1)
        readings = _both("logit_shift_residual", conservation.logit_shift(dlogits), noise.sum())
        if view.anatomy.tied or not all_seen([tap], "head"):
            return readings
        if stored in autocast_rounding.U2:
            broken = conservation.head_shift(tap.dw, tap.x, tap.dout)
            of_weight = autocast_rounding.weight_sum_noise(tap.dw, stored)
        else:
            broken = conservation.logit_shift(tap.dw.T)
            of_weight = fp32_rounding.weight_sum_noise(LinearStep.of([tap], sample), noise[None])[0]
        return readings | _both("logit_shift_residual.head", broken, of_weight)


def _of_rounded_logits(taps: Sequence[Tap]) -> dict[str, Reading]:
    """Of routers that return BF16 or FP16: what the rounded gradients of their logits hand on is taken off exactly."""
    laws = [conservation.head_shift(tap.dw, tap.x, tap.dout) for tap in taps]
    broken, scale = (torch.stack(parts) for parts in zip(*laws, strict=True))
    noise = torch.stack([autocast_rounding.weight_sum_noise(tap.dw, tap.out.dtype) for tap in taps])
    return _both("router_shift_residual", (broken, scale), noise)


class RouterLaws:
    """``router_shift_residual`` per layer, the z-loss taken off exactly. Bad: up.

    Also as ``.over_noise``, what is broken over what rounding alone predicts (``monitors.fp32_rounding``), about 1 in a
    healthy run at any step; a router whose logits autocast has rounded obeys the law of an untied head instead
    (``LogitLaws``), with that prediction. With the balance loss switched off the prediction still counts it, and is a
    little too large. Routers here are softmax routers; one of sigmoids has no such law.
    every_steps: cadence.
    """

    needs = Needs(view=("routings",), taps=("linear",), roles=("router",))

    def __init__(self, every_steps: int) -> None:
        self.signals = with_ratio(
            Signal("router_shift_residual", "1", "up", ("layer",), every_steps, family="conservation"),
            Law(ROUTER, ROUTER),
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        config, taps = known(view.anatomy.moe, "the routers' configuration"), view.tapped("linear", "router")
        if not all_seen(taps, "router"):
            return {}
        if taps[0].out.dtype in autocast_rounding.U2:
            return _of_rounded_logits(taps)
        step = LinearStep.of(taps)
        counts_LE = torch.stack([routing.counts_E for routing in view.routings]).double()
        share_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
        loss_scale = view.loss_scale or 1
        z_coef = config.z_coef * loss_scale
        aux_LE = config.aux_coef * loss_scale * config.n_experts / step.tokens * share_LE
        per_token = fp32_rounding.router_logit_noise(step.y, step.dy, aux_LE[:, None], z_coef)
        noise = fp32_rounding.weight_sum_noise(step, per_token)
        layers = zip([tap.dw for tap in taps], step.x, step.y, strict=True)
        broken, scale = zip(*(conservation.router_shift(*layer, z_coef) for layer in layers), strict=True)
        return _both("router_shift_residual", (torch.stack(broken), torch.stack(scale)), noise)
