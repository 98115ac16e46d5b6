"""Costs as ratios measured in one run: ``make bench`` or ``python -m experiments.bench [out=FILE]``.

Every ratio comes from alternating measurements in one process, so that the machine's noise meets both
sides alike; medians throughout. Absolute times are printed for orientation only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from experiments.build import ROOT, Run, build_run
from experiments.cli import CONF
from experiments.optimizer import adamw
from experiments.trace import write_whole
from monitors.base import StepView
from monitors.spectra import qk_increment

STEPS = {"mha_nano": 120, "mha_small": 24}
LAPTOP_SWEEP = ROOT / "report" / "paper_attention-laptop" / "experiment.json"


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _step_of(run: Run) -> Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.nn.Module]]:
    """One training step as the loop does it, without monitors and label; also the bare loop, on the sdpa backend."""
    model, healthy = run.new_model(), run.healthy_sites()
    optimizer, parameters = adamw(model, run.train), list(model.parameters())

    def step(index: int):
        sites = run.fault.sites(index, healthy)
        batch = torch.from_numpy(run.corpus.batch(run.seed, index, sites.batch_size))
        loss = model.loss(batch, sites.numerics)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, run.train.clip)
        optimizer.step()
        return loss.detach(), norm, model

    return step


def step_costs(model: str) -> dict[str, float]:
    """Fault sites present but idle against a bare SDPA loop, and all monitors against the step.

    The monitors' cost is their time over 500 steps with every window full, divided by those steps' number
    and by the median step. It does not depend on what training does, so the weights are nudged, not trained.
    """
    torch.set_num_threads(1)
    runs = {
        name: build_run(compose("config", overrides=[f"model={model}", f"model.backend={name}"]))
        for name in ("reference", "sdpa")
    }
    steps = {name: _step_of(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(STEPS[model] + 5):
        for name, step in steps.items():
            times[name].append(_seconds(lambda step=step, index=index: step(index)))
    typical = {name: median(values[5:]) for name, values in times.items()}

    run = runs["reference"]
    loss, norm, trained = steps["reference"](0)
    history, spent = run.new_history(), 0.0
    windows = 500
    for now in range(2 * windows + 1):
        if now:
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        cost = _seconds(lambda now=now: history.record(now, trained))
        view = StepView(now, now, loss, norm, trained, history)
        if now:
            for monitor in run.monitors.values():
                if any(now % signal.every_steps == 0 for signal in monitor.signals):
                    cost += _seconds(lambda monitor=monitor, view=view: monitor.observe(view))
        spent += cost if now > windows else 0.0
    return {
        "step_ms": 1e3 * typical["reference"],
        "bare_sdpa_step_ms": 1e3 * typical["sdpa"],
        "step_over_bare_sdpa": typical["reference"] / typical["sdpa"],
        "monitors_share_of_step": spent / windows / typical["reference"],
    }


def qk_core_speedup(d_model: int, n_heads: int, d_head: int, repeats: int = 5) -> dict[str, float]:
    """The three increments of every head from their small cores against dense FP64 SVDs of the d x d products."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    w = [torch.randn(n_heads * d_head, d_model, generator=generator) * 0.02 for _ in range(2)]
    w += [x + 1e-3 * torch.randn(x.shape, generator=generator) for x in w]
    q0, k0, q1, k1 = (x.double().unflatten(0, (n_heads, d_head))[0] for x in w)

    def dense_one_head() -> None:
        for product in (q1.mT @ k1 - q0.mT @ k0, (q1 - q0).mT @ k0 + q0.mT @ (k1 - k0), (q1 - q0).mT @ (k1 - k0)):
            torch.linalg.svdvals(product)

    qk_increment(*w, n_heads)
    core = median(_seconds(lambda: qk_increment(*w, n_heads)) for _ in range(3 * repeats))
    dense = n_heads * median(_seconds(dense_one_head) for _ in range(max(1, repeats if d_model < 1024 else 2)))
    return {"core_ms": 1e3 * core, "dense_ms": 1e3 * dense, "dense_over_core": dense / core}


def measure() -> dict[str, Any]:
    with initialize_config_dir(CONF, version_base="1.3"):
        results: dict[str, Any] = {model: step_costs(model) for model in STEPS}
    results["qk core, d=768, 12 heads of 64"] = qk_core_speedup(768, 12, 64)
    results["qk core, d=2048, 4 heads of 64"] = qk_core_speedup(2048, 4, 64)
    if LAPTOP_SWEEP.exists() and (sweep := json.loads(LAPTOP_SWEEP.read_text())["sweep"]):
        results["laptop sweep"] = {"busy_share_of_cores": sweep["busy"], "wall_s": sweep["wall_s"]}
    results["torch"] = torch.__version__
    return results


GOALS = {
    "step_over_bare_sdpa": "at most 1.25",
    "monitors_share_of_step": "at most 0.03",
    "busy_share_of_cores": "above 0.90",
}


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) - {"out"} or len(given) != len(arguments):
        sys.exit("usage: python -m experiments.bench [out=FILE]")
    out = Path(given.get("out", ROOT / "report" / "bench.json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    results = measure()
    write_whole(out, json.dumps(results, indent=1).encode() + b"\n")
    table = Table("what", "measure", "value", "goal")
    for what, values in results.items():
        for measure_name, value in values.items() if isinstance(values, dict) else ():
            goal = GOALS.get(measure_name, "")
            if measure_name == "dense_over_core":
                goal = "at least 25" if "768" in what else "at least 200"
            table.add_row(what, measure_name, f"{value:.3g}", goal)
    console = Console()
    console.print(table)
    console.print(str(out))


if __name__ == "__main__":
    main(sys.argv[1:])
