"""Euler's identities of every linear layer, watched: each residual, and the residual over predicted rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from models.taps import Tap
from monitors import conservation, fp32_rounding
from monitors.base import Reading, Signal, StepView
from monitors.batch_rows import TokensInTurn
from monitors.conservation import over_tokens, relative
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


class LinearLaws:
    """``linear_euler_residual.<part>`` and ``linear_input_residual.<qkv|o|mlp|head>`` of ``monitors.conservation``.

    Signals, per layer, ``head`` one for the model; bad: up: the residual, and ``.over_noise``, what is broken over what
    rounding alone predicts (``monitors.fp32_rounding``), which is about 1 in a healthy run at any step, so that it
    needs no healthy twin. The law in W holds for a whole batch: one number, whose ratio is as lucky as a normal
    one; the law in x for each token: the root mean square over tokens.

    Left out: parts that the model does not have; ``linear_euler_residual.head`` of a head tied to the embedding, whose
    gradient has two sources; ``linear_input_residual.mlp`` with experts, whose input also feeds the choice of experts.
    token_stride: the law in x and both predictions take one token in so many, in turn, 1 for all; the law in W always
    takes all. every_steps: cadence.
    """

    lookbacks = ()
    taps = ("dot_product", "linear", "norm")

    def __init__(self, every_steps: int, token_stride: int) -> None:
        self.tokens = TokensInTurn(token_stride, every_steps)
        names = [f"linear_euler_residual.{part}" for part in (*ATTENTION, *DENSE, *ROUTED, "head")]
        names += [f"linear_input_residual.{part}" for part in (*READERS, "o", "head")]
        self.signals = tuple(
            Signal(f"{name}{suffix}", "1", "up", () if name.endswith(".head") else ("layer",), every_steps)
            for name in names
            for suffix in ("", f".{OVER_NOISE}")
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        config = view.model.config
        layers = [self._block(view, layer) for layer in range(config.n_layers)]
        readings = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        tap, source = view.taps.at("linear")["head"], view.taps.at("norm")["final_norm"]
        sample = self._sample(view, tap)
        step = LinearStep.of(tap, sample)
        readings |= _input("head", source.output_grad.flatten(0, -2)[sample], [step])
        return readings if config.tie_embeddings else readings | _euler("head", tap, step)

    def _block(self, view: StepView, layer: int) -> dict[str, Tensor]:
        taps, slots = view.taps.at("linear"), view.routings[layer].counts_E if view.routings else None
        found: dict[str, Tensor] = {}
        steps: dict[str, LinearStep] = {}
        for part, name in (ATTENTION | (DENSE if slots is None else ROUTED)).items():
            tap = taps.get(f"blocks.{layer}.{name}")
            if tap is not None:
                steps[part] = LinearStep.of(tap, self._sample(view, tap), slots if part in EXPERTS else None)
                found |= _euler(part, tap, steps[part])
        sample = self._sample(view, taps[f"blocks.{layer}.attention.o"])
        for name, (norm, parts) in READERS.items():
            readers = [steps[part] for part in parts if part in steps]
            if readers:
                dx = view.taps.at("norm")[f"blocks.{layer}.{norm}"].output_grad
                found |= _input(name, dx.flatten(0, -2)[sample], readers)
        do_BHTD = view.taps.at("dot_product")[f"blocks.{layer}.attention.dot_product"].output_grad
        return found | _input("o", do_BHTD.transpose(1, 2).flatten(2).flatten(0, 1)[sample], [steps["o"]])

    def _sample(self, view: StepView, tap: Tap) -> slice:
        return self.tokens.at(view.step, tap.output.shape[:-1].numel())


def _euler(part: str, tap: Tap, step: LinearStep) -> dict[str, Tensor]:
    """The law over all tokens of the tap, its prediction from the sampled ones."""
    flat = (tensor.flatten(0, -2) for tensor in (tap.output, tap.output_grad))
    broken, scale = conservation.linear_euler(step.w, step.dw, *flat)
    noise = fp32_rounding.linear_euler_noise(step).sqrt()
    name = f"linear_euler_residual.{part}"
    return {name: relative(broken, scale), f"{name}.{OVER_NOISE}": relative(broken, noise)}


def _input(part: str, dx: Tensor, readers: list[LinearStep]) -> dict[str, Tensor]:
    """The law over the sampled tokens; dx: (n, in)."""
    x_dx = readers[0].x * dx
    broken, scale = conservation.linear_input(x_dx, [reader.y_dy for reader in readers])
    noise = fp32_rounding.linear_input_noise(x_dx, readers).sqrt()
    name = f"linear_input_residual.{part}"
    return {
        name: over_tokens(relative(broken, scale)),
        f"{name}.{OVER_NOISE}": over_tokens(relative(broken, noise)),
    }
