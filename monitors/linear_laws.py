"""Euler's identities of every linear layer, watched: each residual, and the residual over predicted rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from models.taps import Tap
from monitors import conservation, fp32_rounding
from monitors.base import Reading, Signal, StepView
from monitors.batch_rows import check_stride, every
from monitors.conservation import relative
from monitors.fp32_rounding import LinearStep
from monitors.rounding import OVER_NOISE

ATTENTION = {part: f"attention.{part}" for part in "qkvo"}
DENSE = {part: f"mlp.{part}" for part in ("input", "gate", "output")}
EXPERTS = {f"experts_{part}": name for part, name in DENSE.items()}
SHARED = {f"shared_{part}": f"mlp.shared.{part}" for part in DENSE}
ROUTED = {**EXPERTS, **SHARED, "router": "mlp.router"}
"""By part of a block, the module's name in it: a block has ATTENTION and either DENSE or, with experts, ROUTED."""

READERS = {"qkv": ("attention_norm", ("q", "k", "v")), "mlp": ("mlp_norm", ("input", "gate"))}
"""By signal: the norm whose output is read, whose gradient is the input's, and the parts that alone read it."""

Law = tuple[Tensor, Tensor, Tensor]
"""What is broken, the scale of its residual, and the mean square that rounding predicts: 0-dim, or one a token."""
Found = dict[str, list[Law]]
"""By signal, its layers."""


class LinearLaws:
    """``linear_euler_residual.<part>`` and ``linear_input_residual.<qkv|o|mlp|head>`` of ``monitors.conservation``.

    Signals, per layer, ``head`` one for the model; bad: up: the residual, and ``.over_noise``, what is broken over what
    rounding alone predicts (``monitors.fp32_rounding``), which is about 1 in a healthy run at any step, so that it
    needs no healthy twin. The law in W holds for a whole batch: one number, whose ratio is as lucky as a normal
    one; the law in x for each token: the root mean square over tokens.

    Left out: parts that the model does not have; ``linear_euler_residual.head`` of a head tied to the embedding, whose
    gradient has two sources; ``linear_input_residual.mlp`` with experts, whose input also feeds the choice of experts;
    under BF16 autocast every ratio but the router's, which alone is computed in FP32.
    token_stride: the law in x and both predictions take one token in so many, in turn, 1 for all; the law in W always
    takes all. every_steps: cadence.
    """

    lookbacks = ()
    taps = ("dot_product", "linear", "norm")

    def __init__(self, every_steps: int, token_stride: int) -> None:
        self.token_stride, self.every_steps = check_stride(token_stride), every_steps
        names = [f"linear_euler_residual.{part}" for part in (*ATTENTION, *DENSE, *ROUTED, "head")]
        names += [f"linear_input_residual.{part}" for part in (*READERS, "o", "head")]
        self.signals = tuple(
            Signal(f"{name}{suffix}", "1", "up", () if name.endswith(".head") else ("layer",), every_steps)
            for name in names
            for suffix in ("", f".{OVER_NOISE}")
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        found: Found = {}
        for layer in range(view.model.config.n_layers):
            self._block(view, layer, found)
        head, source = view.taps.at("linear")["head"], view.taps.at("norm")["final_norm"]
        sample = self._sample(view, head)
        step = LinearStep.of(head, sample)
        found["linear_input_residual.head"] = [_input(source.output_grad.flatten(0, -2)[sample], [step])]
        if not view.model.config.tie_embeddings:
            found["linear_euler_residual.head"] = [_euler(head, step)]
        readings = _readings(found, "linear_euler_residual") | _readings(found, "linear_input_residual")
        if fp32_rounding.stored_in_fp32(head):
            return readings
        return {name: value for name, value in readings.items() if OVER_NOISE not in name or ".router." in name}

    def _block(self, view: StepView, layer: int, found: Found) -> None:
        taps, slots = view.taps.at("linear"), view.routings[layer].counts_E if view.routings else None
        steps: dict[str, LinearStep] = {}
        for part, name in (ATTENTION | (DENSE if slots is None else ROUTED)).items():
            tap = taps.get(f"blocks.{layer}.{name}")
            if tap is not None:
                steps[part] = LinearStep.of(tap, self._sample(view, tap), slots if part in EXPERTS else None)
                found.setdefault(f"linear_euler_residual.{part}", []).append(_euler(tap, steps[part]))
        do_BHTD = view.taps.at("dot_product")[f"blocks.{layer}.attention.dot_product"].output_grad
        inputs = {"o": (do_BHTD.transpose(1, 2).flatten(2), ("o",))}
        for name, (norm, parts) in READERS.items():
            inputs[name] = view.taps.at("norm")[f"blocks.{layer}.{norm}"].output_grad, parts
        sample = self._sample(view, taps[f"blocks.{layer}.attention.o"])
        for name, (dx, parts) in inputs.items():
            readers = [steps[part] for part in parts if part in steps]
            if readers:
                law = _input(dx.flatten(0, -2)[sample], readers)
                found.setdefault(f"linear_input_residual.{name}", []).append(law)

    def _sample(self, view: StepView, tap: Tap) -> slice:
        return every(self.token_stride, view.step // self.every_steps, tap.output.shape[:-1].numel())


def _euler(tap: Tap, step: LinearStep) -> Law:
    """Over all tokens of the tap, its prediction from the sampled ones."""
    broken, scale = conservation.linear_euler(step.w, step.dw, tap.output, tap.output_grad)
    return broken, scale, fp32_rounding.linear_euler_noise(step)


def _input(dx: Tensor, readers: list[LinearStep]) -> Law:
    """Over the sampled tokens; dx: (n, in)."""
    x_dx = readers[0].x * dx
    broken, scale = conservation.linear_input(x_dx, [reader.y_dy for reader in readers])
    return broken, scale, fp32_rounding.linear_input_noise(x_dx, readers)


def _readings(found: Found, law: str) -> dict[str, Reading]:
    """Residuals and ratios of one law, the root mean square over tokens where it is per token; all in one go."""
    names = [name for name in found if name.startswith(law)]
    broken, scale, noise = (torch.stack(parts) for parts in zip(*(one for n in names for one in found[n]), strict=True))
    readings: dict[str, Reading] = {}
    for suffix, unit in (("", scale), (f".{OVER_NOISE}", noise.sqrt())):
        values = relative(broken, unit).view(len(broken), -1).square().mean(-1).sqrt()
        for name, value in zip(names, values.split([len(found[name]) for name in names]), strict=True):
            readings[name + suffix] = value[0] if name.endswith(".head") else value
    return readings
