"""Where the jobs of an experiment run: in this process, in joblib's processes, or through submitit on a cluster.

The settings are those of Hydra's launcher (``hydra/launcher=...``), so that an experiment and ``-m`` are configured
alike. The jobs themselves are handed over by joblib's and submitit's own interfaces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from joblib import Parallel, delayed, effective_n_jobs

from foreshock.experiments.training.checkpoint import RunError
from foreshock.experiments.training.stopping import check_in

MOST_PROCESSES = 1024
"""At a time on one machine. They may be more than its cores, which they then share."""

Job = TypeVar("Job")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs the jobs of an experiment. is_here: whether on this machine."""

    is_here: ClassVar[bool]

    @property
    def at_once(self) -> int:
        """How many jobs run at a time."""

    def start(self, folder: Path) -> None:
        """Be ready for jobs; workers check in by a file in ``folder`` (``experiments.training.stopping``)."""

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """What the function returns of each job, in order. Raises RunError where a process was killed."""


@dataclass(frozen=True)
class Here:
    """One job after the other, in this process."""

    is_here: ClassVar[bool] = True
    at_once: int = 1

    def start(self, folder: Path) -> None:
        pass

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        return [function(job) for job in jobs]


@dataclass(frozen=True)
class Processes:
    """joblib's processes, which it keeps from one call to the next. settings: of ``joblib.Parallel``."""

    is_here: ClassVar[bool] = True
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        jobs = self.settings["n_jobs"]
        if not isinstance(jobs, int) or not (jobs == -1 or 1 <= jobs <= MOST_PROCESSES):
            raise ValueError(
                f"at_once={jobs} is not allowed: at least 1, at most {MOST_PROCESSES}, or -1 for a run on every core"
            )

    @property
    def at_once(self) -> int:
        return effective_n_jobs(self.settings["n_jobs"])

    def start(self, folder: Path) -> None:
        """Let each worker end with this process from the start."""
        if self.at_once > 1:
            warnings.filterwarnings("ignore", "A worker stopped while some jobs")  # it was asked to, or is replaced
            Parallel(**self.settings)(delayed(check_in)(folder, self.at_once) for _ in range(self.at_once))

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        try:
            return Parallel(**self.settings)(delayed(function)(job) for job in jobs)
        except BrokenExecutor:
            raise RunError(
                "a process that trained was killed, for want of memory perhaps: the same command resumes, a lower "
                "at_once needs less"
            ) from None


SHARED = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name")
"""Settings that submitit has for every cluster; those of one cluster begin with its name."""


@dataclass(frozen=True)
class Cluster:
    """submitit's jobs. cluster: ``slurm`` or, for trying, ``local``; settings: those of Hydra's submitit launcher."""

    is_here: ClassVar[bool] = False
    cluster: str
    settings: Mapping[str, Any]

    @property
    def at_once(self) -> int:
        return self.settings.get("array_parallelism") or 1

    def start(self, folder: Path) -> None:
        pass

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        try:
            import submitit
        except ModuleNotFoundError:
            raise RunError(f"hydra/launcher=submitit_{self.cluster} needs submitit: pip install submitit") from None
        settings = {key: value for key, value in self.settings.items() if value is not None}
        own = {f"{self.cluster}_max_num_timeout": settings.pop("max_num_timeout", 0)}
        executor = submitit.AutoExecutor(settings.pop("submitit_folder"), self.cluster, **own)
        named = {key if key in SHARED else f"{self.cluster}_{key}": value for key, value in settings.items()}
        executor.update_parameters(**named)
        return [job.result() for job in executor.map_array(function, jobs)]


def executor_of(launcher: Mapping[str, Any]) -> Executor:
    """The executor that a composed ``hydra.launcher`` describes. Raises ValueError on one that is not known here."""
    settings = {key: value for key, value in launcher.items() if key != "_target_"}
    kind = launcher.get("_target_", "BasicLauncher").rpartition(".")[2]
    if kind == "BasicLauncher":
        return Here()
    if kind == "JoblibLauncher":
        return Processes(settings)
    if kind in ("SlurmLauncher", "LocalLauncher"):
        return Cluster(kind.removesuffix("Launcher").lower(), settings)
    known = "local, joblib, basic, submitit_slurm, submitit_local"
    raise ValueError(f"hydra/launcher={kind} is not allowed for an experiment: one of {known}")
