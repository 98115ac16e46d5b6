"""A stop and a resume that forgets parts of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard
from foreshock.faults.operation import Operation
from foreshock.faults.redrawn import Redrawn
from foreshock.faults.window import Window

PARTS = ("optimizer", "schedule", "data", "random")
"""What a resume can forget."""


@dataclass(frozen=True)
class Resume(Operation):
    """The run stops before the update and goes on from its checkpoint. forget: of ``PARTS``."""

    stackable: ClassVar[bool] = False

    forget: tuple[str, ...]

    def meets(self, other: Any) -> bool:
        return isinstance(other, Resume)

    def remembered(self, state: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        """What is loaded of a checkpoint's state. new: the state of an engine that has just been built."""
        lost = {"optimizer": new["optimizer"]} if "optimizer" in self.forget else {}
        return {**state, **lost}


@dataclass(frozen=True)
class ResumeLossy(WindowedFault):
    """The run stops before the updates of a window, by default once, and the resume forgets a part of its state.

    What breaks: a resume that restores the weights and not all of what belongs to them. Report: paiml/entrenar #294.
    The run is really stopped: its checkpoint is written, its engine and monitors are built anew, and the checkpoint is
    read back and loaded. With a resume before update r, the last one up to step t, what is forgotten is
    ``optimizer``: m, v and the step counters are those of a new optimizer, 0 (``adam_state_reset``);
    ``schedule``: lr_t = schedule(t - r), to the end of the run (``schedule_restart``);
    ``data``: step t reads the batch of step t - r, to the end of the run, where ``random`` is kept (``data_repeat``);
    ``random``: every draw here is a function of seed and step, so that the state of a generator is where its draws
    stand. A lost one means that the starts of all sequences are drawn from r on as seed, step and r say, in place of
    seed and step. With ``data`` too, they are drawn as seed, t - r and r say, so that step t reads neither the batch of
    step t nor that of t - r. What faults draw is no part of it. Not modelled: masks of ``model.dropout``, which
    ``random`` leaves as they are; weights that are lost; a balancing bias; a loader of several workers that restore a
    part of their positions.

    forget: of optimizer, schedule, data and random, each once; none is the healthy control, a real stop and resume. The
    window says when the run is stopped; what a resume forgot stays forgotten after it. The first stop is after the
    run's first update, which has nothing to forget. Raises ValueError on impossible values, by name.
    """

    forget: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = next((part for part in self.forget if part not in PARTS), None)
        if unknown is not None or len(set(self.forget)) != len(self.forget):
            raise ValueError(
                f"fault.forget={list(self.forget)} is not allowed: each of {', '.join(PARTS)} once at most"
            )
        super().__post_init__()
        if self._first == 0:
            raise ValueError("fault.onset=0 is not allowed: before the run's first update there is nothing to forget")

    @property
    def _first(self) -> int:
        return self.window.first

    def last_resume(self, step: int) -> int | None:
        """The last step up to this one before whose update the run is resumed, None where there is none."""
        last = step if self.duration is None else min(step, self.onset + self.duration - 1)
        return None if last < self._first else last - (last - self._first) % self.every

    def sites(self, step: int, healthy: Sites) -> Sites:
        resume = self.last_resume(step)
        if resume is None:
            return healthy
        stopped = replace(healthy, resume=(*healthy.resume, Resume(self.forget))) if step == resume else healthy
        return replace(stopped, **self._lost_at(step, resume, healthy)) if self._lasting else stopped

    @property
    def _lasting(self) -> bool:
        """Whether something is forgotten that each later step reads."""
        return any(part in self.forget for part in ("schedule", "data", "random"))

    def _lost_at(self, step: int, resume: int, healthy: Sites) -> dict[str, Any]:
        """The points of a step after a resume that read what it forgot."""
        lost: dict[str, Any] = {}
        if "schedule" in self.forget:
            if healthy.schedule.first_step:
                raise ValueError(f"fault: at step {step} two faults say where the learning-rate schedule stands")
            lost["schedule"] = replace(healthy.schedule, first_step=resume)
        if "data" in self.forget:
            if healthy.data_step is not None:
                raise ValueError(f"fault: at step {step} two faults say which step's batch is read")
            lost["data_step"] = step - resume
        if "random" in self.forget:
            lost["sampling"] = (Redrawn(f"resume_lossy {resume}"), *healthy.sampling)
        return lost

    def describe(self) -> InjectionCard:
        size = {"forget": list(self.forget)}
        stop = self.injection("resume", {"point": "resume"}, size, control=not self.forget)
        points = {"schedule": "schedule", "data": "data_step", "random": "sampling"}
        later = [self.injection("forgotten", {"point": points[part]}, {}) for part in points if part in self.forget]
        to_the_end = Window(self._first)
        return InjectionCard(self.family, (stop, *(replace(injection, window=to_the_end) for injection in later)))
