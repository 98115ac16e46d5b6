"""Faults that stop a run: where they do, and what a resume then finds of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from foreshock.experiments import trace
from foreshock.experiments.build import Run
from foreshock.experiments.training import checkpoint
from foreshock.experiments.training.engine import Engine
from foreshock.faults.checkpoint_corrupt import LostCheckpoint
from foreshock.faults.log import InjectionLog
from foreshock.faults.resume_lossy import Resume

LOST = "checkpoint_lost"
"""The event that a checkpoint could not be loaded."""
DAMAGED = "damaged.pt"
"""A checkpoint as a fault leaves it, which is read once and deleted."""

Events = Sequence[Mapping[str, Any]]


class Stops:
    """The steps before whose update a run is stopped, known before it begins.

    resumes, losses: by step, what the resume forgets, and how the checkpoint is lost.
    """

    def __init__(self, run: Run) -> None:
        self.resumes: dict[int, Resume] = {}
        self.losses: dict[int, LostCheckpoint] = {}
        healthy, steps = run.healthy_sites(), run.train.steps
        for step in range(steps if run.fault.onset is None else run.fault.onset, steps):
            sites = run.fault.sites(step, healthy)
            for operation in (*sites.resume, *sites.system):
                if isinstance(operation, Resume):
                    self.resumes[step] = operation
                elif isinstance(operation, LostCheckpoint):
                    self.losses[step] = operation

    def losses_ahead(self, events: Events) -> dict[int, LostCheckpoint]:
        """How checkpoints will be lost, by step. A loss happens once, also where the run comes by again."""
        done = {event["step"] for event in events if event["event"] == LOST}
        return {step: loss for step, loss in self.losses.items() if step not in done}

    def to_keep(self, events: Events) -> set[int]:
        """The steps to which a loss ahead goes back, some of which the run may have passed."""
        return {loss.back_to(step) for step, loss in self.losses_ahead(events).items()}


def go_back(folder: Path, step: int, loss: LostCheckpoint, log: InjectionLog, events: Events) -> None:
    """Put the last whole checkpoint in the place of the newest, of this step, which cannot be loaded.

    It is told of the event, so that a run that is killed and resumed knows of it. log: of the run so far.
    """
    back = loss.back_to(step)
    reason = _reason(folder, loss)
    state = checkpoint.load(folder, torch.device("cpu"), checkpoint.kept(back))
    if state is None:
        raise trace.damaged(folder / checkpoint.kept(back), "is missing", folder)
    log.step = step
    if not loss.idle:
        log.add("system", loss, "step", torch.tensor([float(step)]), torch.tensor([float(back)]))
    own = {key: change for key, change in log.state_dict().items() if key[:2] == ("system", str(loss))}
    event = {"step": step, "event": LOST, "kind": loss.kind, "reason": reason}
    event |= {"back_to_step": back, "lost_steps": step - back}
    checkpoint.save(folder, state | {"injections": state["injections"] | own, "events": [*events, event]})


def _reason(folder: Path, loss: LostCheckpoint) -> str:
    """What the reader says of the folder's checkpoint as the fault leaves it, in a file beside it."""
    path = folder / DAMAGED
    try:
        loss.write(path, (folder / checkpoint.CHECKPOINT).read_bytes())
        checkpoint.checked(path)
    except ValueError as error:
        return str(error)
    except OSError as error:
        if loss.kind != "unwritable":
            raise
        return f"cannot be written: {error.strerror}"
    finally:
        path.unlink(missing_ok=True)
    raise RuntimeError(f"{loss} left a checkpoint that is whole")


def log_forgotten(engine: Engine, resume: Resume, state: Mapping[str, Any], step: int) -> None:
    """Log the optimizer's state that a resume has forgotten. state: of the checkpoint, whole."""
    if "optimizer" not in resume.forget:
        return
    log, names = engine.logs[0], {id(weight): name for name, weight in engine.model.named_parameters()}
    order = [names[id(weight)] for group in engine.optimizer.param_groups for weight in group["params"]]
    log.step = step
    for index, of_one in state["optimizer"]["state"].items():
        for key, before in of_one.items():
            log.add("resume", resume, f"{order[index]} {key}", before, torch.zeros_like(before))
