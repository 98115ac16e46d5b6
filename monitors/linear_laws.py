"""Euler's identities of every linear layer, watched: each residual, and the residual over predicted rounding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.taps import Tap
from models.transformer import TransformerConfig
from monitors import conservation, fp32_rounding
from monitors.base import Reading, Signal, StepView
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
    every_steps: cadence.
    """

    lookbacks = ()
    taps = ("dot_product", "linear", "norm")

    def __init__(self, every_steps: int) -> None:
        names = [f"linear_euler_residual.{part}" for part in (*ATTENTION, *DENSE, *ROUTED, "head")]
        names += [f"linear_input_residual.{part}" for part in (*READERS, "o", "head")]
        self.signals = tuple(
            Signal(f"{name}{suffix}", "1", "up", () if name.endswith(".head") else ("layer",), every_steps)
            for name in names
            for suffix in ("", f".{OVER_NOISE}")
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        config, layers = view.model.config, []
        for layer in range(config.n_layers):
            slots = view.routings[layer].counts_E if view.routings else None
            layers.append(self._block(view, f"blocks.{layer}.", _steps(view, layer, slots)))
        readings = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        return readings | _head(view, config)

    def _block(self, view: StepView, block: str, steps: Mapping[str, LinearStep]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part, step in steps.items():
            found |= _euler(part, step)
        for name, (norm, parts) in READERS.items():
            readers = [steps[part] for part in parts if part in steps]
            if readers:
                found |= _input(name, view.taps.at("norm")[block + norm], readers)
        return found | _input("o", view.taps.at("dot_product")[f"{block}attention.dot_product"], [steps["o"]])


def _steps(view: StepView, layer: int, slots: Tensor | None) -> dict[str, LinearStep]:
    """By part, those of one block that the model has."""
    taps, names = view.taps.at("linear"), ATTENTION | (DENSE if slots is None else ROUTED)
    present = {part: taps.get(f"blocks.{layer}.{name}") for part, name in names.items()}
    return {
        part: LinearStep.of(tap, slots if part in EXPERTS else None) for part, tap in present.items() if tap is not None
    }


def _head(view: StepView, config: TransformerConfig) -> dict[str, Tensor]:
    step = LinearStep.of(view.taps.at("linear")["head"])
    found = _input("head", view.taps.at("norm")["final_norm"], [step])
    return found if config.tie_embeddings else found | _euler("head", step)


def _euler(part: str, step: LinearStep) -> dict[str, Tensor]:
    broken, scale = conservation.linear_euler(step.w_dw, step.y_dy)
    noise = fp32_rounding.linear_euler_noise(step).sqrt()
    name = f"linear_euler_residual.{part}"
    return {name: relative(broken, scale), f"{name}.{OVER_NOISE}": relative(broken, noise)}


def _input(part: str, source: Tap, readers: list[LinearStep]) -> dict[str, Tensor]:
    x_dx = (source.output * source.output_grad).movedim(-3, -2) if part == "o" else source.output * source.output_grad
    x_dx = x_dx.reshape(readers[0].x.shape)
    broken, scale = conservation.linear_input(x_dx, [reader.y_dy for reader in readers])
    noise = fp32_rounding.linear_input_noise(x_dx, readers).sqrt()
    name = f"linear_input_residual.{part}"
    return {
        name: over_tokens(relative(broken, scale)),
        f"{name}.{OVER_NOISE}": over_tokens(relative(broken, noise)),
    }
