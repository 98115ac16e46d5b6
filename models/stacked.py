"""Many small transformers along a leading model axis: one forward and one backward serve them all.

Shapes: N models, P weights in one segment of a model, and those of ``models.transformer``. A segment is what an
optimizer treats alike, the matrices or the vectors of one parameter group; the weights of all models in it, and their
gradients, are an (N, P) tensor, of which everything else is a view: the stacked modules' weights (N, ...), and those of
N plain transformers, the slices, which share the memory, so that whoever reads a transformer reads a slice. Each loss
depends on its own slice alone, so the gradient of their sum holds the gradient of each.

``torch.vmap`` does not serve here: hooks, taps and the fault sites' own backward would see its wrapped tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from foreshock.models.attention import DotProduct
from foreshock.models.moe import Routing
from foreshock.models.numerics import HEALTHY, AttentionNumerics, LayerNumerics, at_least_fp32
from foreshock.models.transformer import RMSNorm, Transformer, parameter_group


def _over_axes(weight_ND: Tensor, like: Tensor) -> Tensor:
    """(N, D) shaped to multiply (N, ..., D)."""
    return weight_ND.view(len(weight_ND), *[1] * (like.ndim - 2), -1)


class StackedLinear(nn.Linear):
    """weight: (N, out, in); maps (N, ..., in) to (N, ..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.flatten(1, -2), self.weight.mT).view(*x.shape[:-1], -1)


class StackedEmbedding(nn.Embedding):
    """weight: (N, V, E); maps tokens (N, B, T) to (N, B, T, E)."""

    def forward(self, tokens_NBT: Tensor) -> Tensor:
        N, V, _ = self.weight.shape
        first_row_N11 = torch.arange(0, N * V, V, device=tokens_NBT.device).view(N, 1, 1)
        return F.embedding(tokens_NBT + first_row_N11, self.weight.flatten(0, 1))


class StackedLayerNorm(nn.LayerNorm):
    """weight and bias: (N, D), applied after the kernel and not in it, so that its gradients round otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        normal = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return torch.addcmul(_over_axes(self.bias, x), normal, _over_axes(self.weight, x))


class StackedRMSNorm(RMSNorm):
    """weight: (N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.view_as(x), self.normalized_shape, eps=self.eps) * _over_axes(self.weight, x)


class StackedDotProduct(DotProduct):
    """The models folded into the batch; neighbours whose kernel has the same faults share one call."""

    def forward(  # type: ignore[override]  # each model has numerics of its own
        self,
        q_NBHTD: Tensor,
        k_NBHTD: Tensor,
        v_NBHTD: Tensor,
        numerics: Sequence[tuple[LayerNumerics, int]],
        nonfinite_N: Tensor,
    ) -> Tensor:
        sizes = [size for _, size in numerics]
        parts = zip(*(x.split(sizes) for x in (q_NBHTD, k_NBHTD, v_NBHTD, nonfinite_N)), strict=True)
        outputs = [
            # mypy does not know that there are three
            super(StackedDotProduct, self).forward(*(x.flatten(0, 1) for x in (q, k, v)), layer, nonfinite)  # type: ignore[call-arg]
            for (layer, _), (q, k, v, nonfinite) in zip(numerics, parts, strict=True)
        ]
        together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return together.unflatten(0, q_NBHTD.shape[:2])


TWINS: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StackedLinear,
    nn.Embedding: StackedEmbedding,
    nn.LayerNorm: StackedLayerNorm,
    RMSNorm: StackedRMSNorm,
    DotProduct: StackedDotProduct,
}
"""Each module with weights or a batch of its own, and its twin with a model axis: another forward."""


@dataclass(frozen=True)
class StackedNumerics:
    """What each slice's attention is made to do, in the order of the slices."""

    slices: tuple[AttentionNumerics, ...]

    @cached_property
    def neighbours(self) -> list[tuple[AttentionNumerics, int]]:
        """How many slices in a row have the same faults."""
        return [(numerics, len(list(same))) for numerics, same in groupby(self.slices)]

    def layer(self, index: int) -> list[tuple[LayerNumerics, int]]:
        """One layer's faults and how many slices in a row have them."""
        return [(numerics.layer(index), size) for numerics, size in self.neighbours]


class StackedTransformer(Transformer):
    """N transformers of one configuration as one module.

    ``slices``: the given transformers, whose parameters, their ``grad`` and counters become views of this one's;
    weights, gradients: by segment, (N, P), FP32, contiguous, so that an optimizer updates neighbours in one piece;
    segments: the names and shapes of the parameters in a row of each, in the order of an optimizer's parameter groups.
    ``take_gradients`` after each backward.
    Raises ValueError where the models differ in shape or have experts, whose tokens are not shared out evenly.
    """

    def __init__(self, slices: Sequence[Transformer]) -> None:
        config = slices[0].config
        if any(other.config != config for other in slices):
            raise ValueError("model: models that are stacked must have one configuration")
        if config.moe is not None:
            raise ValueError("model.moe is not allowed in a stack: experts are trained one run at a time")
        if config.dropout:
            raise ValueError(f"model.dropout={config.dropout} is not allowed in a stack: masks are of single runs")
        super().__init__(config)
        alike: dict[tuple[str, bool], dict[str, torch.Size]] = {}
        for name, parameter in self.named_parameters():
            alike.setdefault((parameter_group(name), parameter.ndim >= 2), {})[name] = parameter.shape
        self.segments = tuple(alike.values())
        sizes = [sum(shape.numel() for shape in shapes.values()) for shapes in self.segments]
        device = slices[0].tokens.weight.device
        self.slices = tuple(slices)
        self.weights = tuple(torch.empty(len(slices), size, device=device) for size in sizes)
        self.gradients = tuple(torch.zeros_like(weights) for weights in self.weights)
        for index, model in enumerate(slices):
            row = [weights[index] for weights in self.weights]
            for name, view in self.views(row).items():
                view.copy_(model.get_parameter(name).detach())
            self._house(model, row)
            for name, view in self.views([gradients[index] for gradients in self.gradients]).items():
                model.get_parameter(name).grad = view
        self.to(device)
        for module in self.modules():
            if type(module) in TWINS:  # its attributes stay, whatever they are; its forward alone is another
                module.__class__ = TWINS[type(module)]
        self._house(self, self.weights)
        for index, block in enumerate(self.blocks):
            counters = [model.blocks[index].attention for model in slices]
            block.attention.nonfinite = torch.stack([counter.nonfinite for counter in counters])
            for counter, view in zip(counters, block.attention.nonfinite, strict=True):
                counter.nonfinite = view

    def views(self, numbers: Sequence[Tensor]) -> dict[str, Tensor]:
        """By parameter name, what each segment's (P,) or (N, P) numbers belong to: of its shape, or (N, that)."""
        return {
            name: part.unflatten(-1, shape)
            for of_segment, shapes in zip(numbers, self.segments, strict=True)
            for (name, shape), part in zip(
                shapes.items(), of_segment.split([shape.numel() for shape in shapes.values()], dim=-1), strict=True
            )
        }

    def stacked_tensors(self) -> dict[str, Tensor]:
        """The parameters, and the counters of attention, by name: what each slice has of its own."""
        counters = {
            f"blocks.{index}.attention.nonfinite": block.attention.nonfinite for index, block in enumerate(self.blocks)
        }
        return dict(self.named_parameters()) | counters

    def _house(self, model: Transformer, numbers: Sequence[Tensor]) -> None:
        """Let a model's parameters live in this memory, by segment, and have the values that it holds."""
        for name, view in self.views(numbers).items():
            model.get_parameter(name).data = view

    def take_gradients(self) -> None:
        """Move what the backward left in the parameters' ``grad`` into ``gradients``, and so into the slices'.

        Autograd cannot add into ``gradients`` by itself: it wants memory laid out as a whole tensor.
        """
        for gradients, names in zip(self.gradients, self.segments, strict=True):
            parameters = [self.get_parameter(name) for name in names]
            # the backward has left one in each
            torch.cat([parameter.grad.flatten(1) for parameter in parameters], dim=1, out=gradients)  # type: ignore[union-attr]
            for parameter in parameters:
                parameter.grad = None

    def forward(  # type: ignore[override]  # each slice has numerics of its own
        self, tokens_NBT1: Tensor, numerics: StackedNumerics | None = None, balance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor, tuple[Routing, ...]]:
        """As of a transformer, the two terms one a slice, (N,); backpropagate their sum. No numerics: all healthy."""
        if numerics is None:
            numerics = StackedNumerics((HEALTHY,) * len(tokens_NBT1))
        logits_NBTV, _ = self._run(tokens_NBT1[..., :-1], numerics)
        targets = tokens_NBT1[..., 1:]
        nll = F.cross_entropy(at_least_fp32(logits_NBTV.flatten(0, -2)), targets.flatten(), reduction="none")
        nll_N = nll.view(len(targets), -1).mean(1)
        return nll_N, torch.zeros_like(nll_N), ()
