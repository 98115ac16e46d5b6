"""What a fault may touch in one step, and what a fault is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import combinations
from typing import Any, ClassVar, Protocol, runtime_checkable

from foreshock.faults.card import Injection, InjectionCard, check_family
from foreshock.faults.clip_operation import ClipOperation
from foreshock.faults.loss_scale import ScaleOperation
from foreshock.faults.operation import (
    BatchOperation,
    Operation,
    SamplingOperation,
    SiteValue,
    SystemOperation,
    TensorOperation,
    Training,
)
from foreshock.faults.optimizer_update import OptimizerOperation
from foreshock.faults.product_format import ProductFormat
from foreshock.faults.schedule import Schedule
from foreshock.faults.window import Window
from foreshock.models.arithmetic import ORDINARY
from foreshock.models.backend import FAULT_SITES
from foreshock.models.corruption import ModuleChange
from foreshock.models.flash import check_numerics
from foreshock.models.numerics import HEALTHY, AttentionNumerics
from foreshock.models.transformer import PARAMETER_GROUPS, TransformerConfig


@dataclass(frozen=True)
class LearningRateScale:
    """Factor on the scheduled learning rate of each parameter group (``models.transformer.PARAMETER_GROUPS``)."""

    stackable: ClassVar[bool] = True

    embedding: float = 1.0
    attention: float = 1.0
    mlp: float = 1.0
    router: float = 1.0
    norm: float = 1.0

    def times(self, factor: float, groups: tuple[str, ...] = PARAMETER_GROUPS) -> LearningRateScale:
        """These factors with those of ``groups`` (default: all) multiplied by ``factor``."""
        return replace(self, **{group: getattr(self, group) * factor for group in groups})

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        """Raise ValueError where only the router's rate changes and the model has no router."""
        if not model.moe and self != LearningRateScale() == replace(self, router=1.0):
            raise ValueError(
                "fault: the learning rate of routers has no effect on a dense model: it needs model=moe_nano"
            )


_declared = partial(field, metadata={"declared": True})
"""A point of the step at which the training loop applies nothing yet."""


@dataclass(frozen=True)
class Sites:
    """Everything that a fault may touch in one step, in the order of the step. The defaults are a healthy step.

    All points hold values, no functions: a step without a fault is equal to a healthy one.

    batch_size: sequences of this step's batch.
    data_step: the step whose batch is read, or None for this one.
    sampling: operations on where in the corpus the batch's sequences begin.
    batch: operations on the batch's inputs and targets, token ids of shape (B, T) each.
    numerics: which operation is done to which attention tensor, and attention's arithmetic.
    modules: changes of what modules take and give, and of what they are made of.
    formats: the number formats in which linear layers multiply (FP8, MX), in both passes.
    balance_scale: factor on the load-balance loss's coefficient and on the balancing bias's step.
    start: operations on the parameters before the step's forward.
    scaling: operations on the loss scale of FP16, before the forward.
    accumulation: operations on the sum of the micro-batches' gradients, still scaled, after each addition.
    gradients: operations on the parameters' gradients, after accumulation and before the clip.
    clip: the clip's norm and scope.
    optimizer: operations on the optimizer's constants and state, around its update.
    schedule: where the learning-rate schedule stands, and its warm-up.
    lr_scale: factors on the scheduled learning rate.
    weights: operations on the parameters after the update.
    resume: a stop and a resume before the step's forward, and what it forgets (``faults.resume_lossy``).
    system: what becomes of the batch's read, the run's checkpoint and its readings; no weight depends on it.
    rank: what one worker does differently.
    world: what becomes of the exchange between workers.
    """

    batch_size: int
    data_step: int | None = None
    sampling: tuple[SamplingOperation, ...] = ()
    batch: tuple[BatchOperation, ...] = ()
    numerics: AttentionNumerics = HEALTHY
    modules: tuple[ModuleChange, ...] = ()
    formats: tuple[ProductFormat, ...] = ()
    balance_scale: float = 1.0
    start: tuple[TensorOperation, ...] = ()
    scaling: tuple[ScaleOperation, ...] = ()
    accumulation: tuple[TensorOperation, ...] = ()
    gradients: tuple[TensorOperation, ...] = ()
    clip: tuple[ClipOperation, ...] = ()
    optimizer: tuple[OptimizerOperation, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)
    lr_scale: LearningRateScale = field(default_factory=LearningRateScale)
    weights: tuple[TensorOperation, ...] = ()
    resume: tuple[Operation, ...] = ()
    system: tuple[SystemOperation, ...] = ()
    rank: tuple[Operation, ...] = _declared(default=())
    world: tuple[Operation, ...] = _declared(default=())

    @property
    def values(self) -> tuple[SiteValue, ...]:
        """The values of all points that check themselves."""
        operations = (operation for point in self._operations() for operation in point)
        return (self.numerics, self.schedule, self.lr_scale, *operations)

    @property
    def changes_forward(self) -> bool:
        """Whether an evaluation gives another loss than through healthy sites, with the same weights."""
        modules = any(change.changes_forward for change in self.modules)
        return self.numerics.changes_forward or modules or any(change.changes_forward for change in self.formats)

    def _operations(self) -> tuple[tuple[Operation, ...], ...]:
        of_the_forward = self.start, self.sampling, self.batch, self.modules, self.formats
        of_the_update = self.scaling, self.accumulation, self.gradients, self.clip, self.optimizer, self.weights
        return *of_the_forward, *of_the_update, self.resume, self.system

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        """Raise ValueError that names the field where the model or the training cannot have a value of this step."""
        for site in fields(self):
            if site.metadata.get("declared") and getattr(self, site.name) != site.default:
                raise ValueError(f"fault: the training loop applies nothing at {site.name!r} yet")
        for value in self.values:
            value.check_fits(model, train)
        for point in self._operations():
            for operation, other in combinations(point, 2):
                if operation.meets(other) or other.meets(operation):
                    raise ValueError(f"fault: {operation} and {other} meet: only one of them may set a value")
        if model.backend == "triton" and model.tiles is not None:
            for layer in range(model.n_layers):
                check_numerics(self.numerics.layer(layer), model.tiles)
        touched = self.numerics.faults or self.numerics.wirings or self.numerics.arithmetic != ORDINARY
        if touched and model.backend not in FAULT_SITES:
            raise ValueError(f"model.backend={model.backend!r} has no fault sites: use {' or '.join(FAULT_SITES)}")
        if self.balance_scale != 1 and not (model.moe and model.moe.balances):
            raise ValueError(
                "the fault changes load balancing, but the model has none: it needs model.moe.aux_coef above 0 "
                "or model.moe.bias_update_speed, as model=moe_nano has"
            )


@runtime_checkable
class Fault(Protocol):
    """A frozen dataclass whose fields are the keys of ``conf/fault/<name>.yaml``.

    ``sites`` is pure: the same step and healthy sites always give the same answer. Outside its
    window it returns the very object ``healthy``, so that "healthy before onset" is an equality.
    ``step`` counts optimizer updates from 0: the update of an onset-0 fault is the run's first.
    ``describe`` says what the fault does as plain data.
    """

    onset: int | None

    def sites(self, step: int, healthy: Sites) -> Sites: ...

    def describe(self) -> InjectionCard: ...


LABELS = frozenset({"family", "doses"})
"""Keys of a fault that change nothing of what it does."""


@dataclass(frozen=True, kw_only=True)
class WindowedFault:
    """The fields that all faults with a window share.

    onset: the window's first update; duration: updates, or None for no end; every: period in updates, 1 for every
    update; window_phase: the faulty update of each period, from 0, so that the first is ``onset + window_phase`` (a
    bare ``phase`` is attention's pass); family: of ``faults.card.FAMILIES``; doses: keys of the fault with their
    values, the weakest dose first, for campaigns and tables. Family and doses change nothing of what the fault does.
    Raises ValueError on an impossible window and on a dose of other keys, by name.
    """

    onset: int = 0
    duration: int | None = None
    every: int = 1
    window_phase: int = 0
    family: str = field(default="other", compare=False)
    doses: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        self.window  # noqa: B018  (building it checks its fields)
        check_family(self.family)
        own = {one.metadata.get("key", one.name) for one in fields(self)} - LABELS
        for dose in self.doses:
            if not own >= set(dose):
                raise ValueError(f"fault.doses={dict(dose)} is not allowed: of the keys {', '.join(sorted(own))}")

    @cached_property
    def window(self) -> Window:
        return Window(self.onset, self.duration, self.every, self.window_phase)

    def check_begins(self, train: Training) -> None:
        """Raise ValueError, by name, where the fault begins too late, or too early, to change anything."""

    def injection(
        self, what: str, where: Mapping[str, Any], size: Mapping[str, Any], control: bool = False
    ) -> Injection:
        """One entry of the injection card, in this fault's window."""
        return Injection(what, where, size, self.window, control)
