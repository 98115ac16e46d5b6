"""A tiny run, as everything above models/ and monitors/ is tested on it."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from foreshock.experiments.build import ROOT, build_run
from foreshock.experiments.default_monitors import default_monitors
from foreshock.experiments.plain_config import read

CONF = ROOT / "conf"
TINY = [
    "model.d_model=16",
    "model.n_heads=2",
    "model.n_layers=2",
    "model.d_ff=32",
    "model.context_length=16",
    "train.batch_size=8",
    "train.held_out_sequences=4",
    "train.warmup_steps=5",
    "train.steps=40",
    "train.checkpoint_every_steps=10",
]


def rarely_read(every_steps: int) -> list[str]:
    """The monitors of ``monitor: all`` whose own cadence is longer than this, whichever there are."""
    cadence = {name: read("monitor", name).get("every_steps", 1) for name in default_monitors()}
    return [name for name, steps in cadence.items() if steps > every_steps]


SHORT_WINDOWS = [
    *(f"monitor.{name}.every_steps=5" for name in rarely_read(30)),
    *(f"monitor.{name}.every_steps=5" for name in ("expert_load", "router_weight", "routing_probability")),
    "monitor.delta_w.windows=[2,10]",
    "monitor.qk_increment.windows=[2,10]",
    "monitor.random_matrix.window=10",
    *(f"monitor.{name}.every_steps=5" for name in ("adam_update_rms", "attention_scores", "output_log_z")),
    "monitor.gradient_curvature.every_steps=10",
    "monitor.spike_score.window=20",
    "monitor.spike_score.minimum=10",
]


def pytest_configure():
    """Without a GPU, Triton kernels are tested in Triton's interpreter, which it must know before its first import."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_itemcollected(item):
    """Tests give the kernels NaN and Inf, of which the numpy beneath Triton's interpreter warns."""
    if item.get_closest_marker("triton"):
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"))


@pytest.fixture(scope="session", autouse=True)
def parse_each_file_of_conf_once():
    """Hydra reads conf/ anew for each configuration, parsing for a third of the time. An edited file is another one."""
    load, parsed = OmegaConf.load, {}

    def load_once(file):
        if not hasattr(file, "read"):
            return load(file)
        content = file.read()
        if content not in parsed:
            parsed[content] = load(io.StringIO(content))
        return copy.deepcopy(parsed[content])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", load_once)
        yield


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """``once(name, make)``: a folder that ``make`` fills once in a suite, in whichever test process comes first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a process's temporary folder is one of several
        shared = shared.parent

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not path.exists():
                making = shared / f"{name}.making"
                making.mkdir(exist_ok=True)
                make(making)
                making.rename(path)
        return path

    return folder


@pytest.fixture(scope="session")
def text(once) -> Path:
    """Some prose with structure, 40 kB: one for all test processes, as its place is in a run's identity."""
    words = ["when", "the", "saved", "output", "loses", "its", "low", "bits", "every", "row", "errs", "one", "way"]
    lines = (f"{i}: {' '.join(words[(i * 7) % 8 : (i * 7) % 8 + 6])}\n" for i in itertools.count())
    prose = "".join(itertools.islice(lines, 1000))
    return once("corpus", lambda folder: (folder / "text.txt").write_text(prose)) / "text.txt"


@pytest.fixture
def tiny() -> list[str]:
    """The overrides of a tiny run, for tests that start a process."""
    return TINY


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """conf/config.yaml with overrides. Composing takes a sixth of a second, and most tests ask for what others did."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.fixture
def make_config(text):
    """Compose conf/config.yaml for the tiny model on the small text, with further overrides."""

    def make(*overrides: str, tiny: bool = True):
        small = [*TINY, *SHORT_WINDOWS] if tiny else []
        return copy.deepcopy(composed("data=text", f"data.path={text}", *small, *overrides))

    return make


@pytest.fixture
def make_run(make_config):
    def make(*overrides: str, tiny: bool = True):
        return build_run(make_config(*overrides, tiny=tiny))

    return make
