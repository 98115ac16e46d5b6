"""Where the jobs of an experiment run."""

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
from joblib import cpu_count

from foreshock.experiments.executors import Cluster, Here, Processes, executor_of

JOBLIB, SLURM = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "submitit_launcher.SlurmLauncher"


@pytest.mark.parametrize(
    ("launcher", "jobs"),
    [  # more processes than cores are allowed
        ({"_target_": "core_plugins.basic_launcher.BasicLauncher"}, 1),
        ({"_target_": SLURM, "array_parallelism": 64}, 64),
        ({"_target_": JOBLIB, "n_jobs": 300}, 300),
        ({"_target_": JOBLIB, "n_jobs": -1}, cpu_count()),
    ],
)
def test_how_many_jobs_run_at_once_is_the_launcher_s_to_say(launcher, jobs):
    assert executor_of(launcher).at_once == jobs


@pytest.mark.parametrize("jobs", [0, 1.5, -2, 5000])
def test_no_job_at_a_time_is_refused(jobs):
    with pytest.raises(ValueError, match=rf"at_once={jobs} is not allowed: at least 1"):
        executor_of({"_target_": JOBLIB, "n_jobs": jobs})


def test_a_launcher_that_is_not_known_is_named():
    with pytest.raises(
        ValueError, match=r"hydra/launcher=RQLauncher is not allowed for an experiment: one of local, joblib, basic"
    ):
        executor_of({"_target_": "hydra_plugins.rq.RQLauncher"})


@pytest.mark.parametrize("executor", [Here(), Processes({"n_jobs": 1}), Processes({"n_jobs": 2})])
def test_results_come_in_the_order_of_the_jobs(executor):
    assert executor.run(str, [3, 1, 2]) == ["3", "1", "2"]


class AutoExecutor:
    """As much of submitit's as is called, in this process."""

    made: ClassVar[list] = []

    def __init__(self, folder, cluster, **own):
        self.given = {"folder": folder, "cluster": cluster, **own}
        self.made.append(self)

    def update_parameters(self, **settings):
        self.given |= settings

    def map_array(self, function, jobs):
        return [SimpleNamespace(result=lambda job=job: function(job)) for job in jobs]


def test_a_cluster_s_settings_are_submitit_s(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=AutoExecutor))
    settings = {"submitit_folder": "jobs", "timeout_min": 60, "partition": "long", "qos": None, "max_num_timeout": 2}
    assert Cluster("slurm", settings).run(str, [1, 2]) == ["1", "2"]
    assert AutoExecutor.made[-1].given == {
        "folder": "jobs",
        "cluster": "slurm",
        "slurm_max_num_timeout": 2,
        "timeout_min": 60,
        "slurm_partition": "long",
    }
