"""What a monitor needs of the run that it watches, declared in one value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foreshock.models.anatomy import ROLES, Anatomy
from foreshock.models.taps import PLACES
from foreshock.monitors.cadence import Cadence
from foreshock.monitors.choices import check_choice

ATTACHED_VIEW = ("update_tokens",)
"""Fields of ``StepView`` that an attached loop alone can fill: ours has updates of one size."""

VIEW = ("batch", "routings", "optimizer", "numerics", "objective_at", "scaling", *ATTACHED_VIEW)
"""Fields of ``StepView`` that not every loop can fill."""


@dataclass(frozen=True)
class Lookback:
    """A monitor's wish to see, whenever it reads at a cadence of ``every_steps``, weights as they were ``steps`` ago.

    roles: whose weights, of ``models.anatomy.ROLES``; jittered: as the monitor's readings are, which its ``Needs`` fill
    in. Raises ValueError for an unknown role, and for less than a step.
    """

    steps: int
    every_steps: int
    roles: tuple[str, ...]
    jittered: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"monitor.windows={self.steps} is not allowed: at least 1 step")
        for role in self.roles:
            check_choice("lookback.roles", role, ROLES)

    @property
    def cadence(self) -> Cadence:
        return Cadence(self.every_steps, self.jittered)


@dataclass(frozen=True)
class Needs:
    """What a monitor needs beside the weights, the loss and the gradient norm, which every step shows.

    view: the fields of ``StepView`` that it reads, of ``VIEW``. A monitor that reads ``numerics``, what the fault does,
        is an oracle: a bound, and no rival.
    taps: the places whose activations and gradients it reads, of ``models.taps.PLACES``.
    history: the earlier weights that it compares with. They decide where the monitor reads: see ``jittered``.
    roles: the parts that the model must have, of ``models.anatomy.ROLES``, beside those of ``history``. A monitor that
        needs a router is left out of a dense run.
    stackable: whether ``torch.vmap`` may run ``observe`` over a stack of runs. It then branches on no tensor's value,
        keeps its memory in ``state_dict`` alone, takes a learning rate for a tensor, and asks for the objective by a
        function ``on_trailing_axes`` (``monitors.trailing``). Any other monitor watches a stack run by run.

    Raises ValueError for an unknown field, place or role, with the nearest one.
    """

    view: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    history: tuple[Lookback, ...] = ()
    roles: tuple[str, ...] = ()
    stackable: bool = False

    def __post_init__(self) -> None:
        for field in self.view:
            check_choice("needs.view", field, VIEW)
        for place in self.taps:
            check_choice("needs.taps", place, PLACES)
        for role in self.roles:
            check_choice("needs.roles", role, ROLES)
        history = tuple(replace(lookback, jittered=self.jittered) for lookback in self.history)
        object.__setattr__(self, "history", history)

    @property
    def jittered(self) -> bool:
        """Whether the monitor reads at jittered steps (``monitors.cadence``): what it reads is of single steps.

        An increment over a window of several steps is read at multiples of the cadence; the last step's update is of a
        single step.
        """
        return all(lookback.steps == 1 for lookback in self.history)

    @property
    def oracle(self) -> bool:
        """Whether the monitor reads what the fault does."""
        return "numerics" in self.view

    @property
    def attached(self) -> bool:
        """Whether the monitor reads what an attached loop alone has."""
        return any(field in ATTACHED_VIEW for field in self.view)

    @property
    def scaled(self) -> bool:
        """Whether the monitor reads the loss scale, which FP16 alone has."""
        return "scaling" in self.view

    def lacking(self, anatomy: Anatomy) -> str | None:
        """The first role that it needs and a model lacks, or None."""
        roles = (*self.roles, *(role for lookback in self.history for role in lookback.roles))
        return next((role for role in roles if not anatomy.parameters(role)), None)
