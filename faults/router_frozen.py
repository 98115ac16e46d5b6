"""A router that stops learning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard
from foreshock.faults.layers import Layers, check_layers, check_layers_fit
from foreshock.faults.operation import Operation, Training
from foreshock.faults.optimizer_update import Update
from foreshock.models.transformer import TransformerConfig, parameter_group


@dataclass(frozen=True)
class RouterRates(Operation):
    """The learning rate of some layers' routers times a factor, for one update. layers: indices."""

    stackable: ClassVar[bool] = False

    layers: tuple[int, ...]
    factor: float

    @property
    def idle(self) -> bool:
        return self.factor == 1

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        if not model.moe:
            raise ValueError("fault: routers that are frozen have no effect on a dense model: it needs model=moe_nano")
        check_layers_fit(self.layers, model.n_layers)

    def touches(self, names: Iterable[str]) -> list[str]:
        begins = tuple(f"blocks.{layer}." for layer in self.layers)
        return [name for name in names if name.startswith(begins) and parameter_group(name) == "router"]

    @contextmanager
    def around(self, update: Update) -> Iterator[None]:
        """Give these routers a parameter group of their own, so that the update is AdamW's at that rate."""
        own = {id(update.parameters[name]): name for name in self.touches(update.parameters)}
        groups = update.optimizer.param_groups
        before = [(group, group["params"]) for group in groups]
        for group, parameters in before:
            routers = [parameter for parameter in parameters if id(parameter) in own]
            if routers:
                rate = group["lr"] * self.factor
                groups.append({**group, "params": routers, "lr": rate})
                group["params"] = [parameter for parameter in parameters if id(parameter) not in own]
                self._count(update, [own[id(router)] for router in routers], group["lr"], rate)
        try:
            yield
        finally:
            del groups[len(before) :]
            for group, parameters in before:
                group["params"] = parameters

    def _count(self, update: Update, names: Iterable[str], rate: float, scaled: float) -> None:
        if update.log is not None:
            rates = torch.tensor([rate, scaled], dtype=torch.float64)
            for name in names:
                update.log.add("optimizer", self, f"{name} learning rate", *rates)


@dataclass(frozen=True)
class RouterFrozen(WindowedFault):
    """The learning rate of routers times a factor, by default 0, at the steps of a window.

    What breaks: routers that no parameter group has, or that were frozen for a stage of training and stay so. No
    public report is named. Equation: the update of AdamW with learning rate factor x lr(step); with 0 the weights,
    which weight decay would shrink by lr x wd, keep their bits. Moments go on, as does a balancing bias, which is no
    weight. The gradients of routers stay in the global norm that the clip takes. Of some layers alone it is done around
    the optimizer's update, and monitors read the rate of the group, as they would where an optimizer lacks those
    routers.

    factor: 0 to 1; 1 is the healthy control; layers: indices, or None for all. Raises ValueError on impossible values,
    by name.
    """

    factor: float = 0.0
    layers: Layers = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers)
        if not 0 <= self.factor <= 1:
            raise ValueError(f"fault.factor={self.factor} is not allowed: 0 (frozen) to 1 (the healthy control)")

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        if self.layers is None:
            return replace(healthy, lr_scale=healthy.lr_scale.times(self.factor, ("router",)))
        return replace(healthy, optimizer=(*healthy.optimizer, RouterRates(self.layers, self.factor)))

    def describe(self) -> InjectionCard:
        where = (
            {"point": "lr_scale", "groups": ("router",)}
            if self.layers is None
            else {"point": "optimizer", "groups": ("router",), "layers": self.layers}
        )
        injection = self.injection("scale", where, {"factor": self.factor}, control=self.factor == 1)
        return InjectionCard(self.family, (injection,))
