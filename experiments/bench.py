"""Costs as ratios measured in one run: ``make bench`` or ``python -m experiments.bench [out=FILE]``.

Every ratio comes from alternating measurements in one process, so that the machine's noise meets both
sides alike; medians throughout. Absolute times are printed for orientation only. ``parts=steps,monitors`` measures
these parts alone and keeps the rest of the file.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from foreshock.analysis.runs.simulated import simulate_experiment
from foreshock.analysis.scores.costs import MonitorCost, costs_of, detector_cost, taps_share
from foreshock.experiments.build import ROOT, Run, build_run
from foreshock.experiments.cli import CONF
from foreshock.experiments.places import check_file_to_write
from foreshock.experiments.trace import write_whole
from foreshock.experiments.usage import fail, misused, show_help
from foreshock.monitors.base import Monitor, StepView, WeightHistory, cadences, tapped
from foreshock.monitors.cadence import Cadence, period
from foreshock.monitors.spectra import qk_increment
from foreshock.monitors.watch import Watch

STEPS = {"mha_nano": 120, "mha_small": 24}
CONSERVATION = ("attention_laws", "linear_laws", "logit_laws", "norm_laws", "router_laws")
DENSE_TWIN = {"moe_nano": "mha_nano", "moe_small": "mha_small"}
LAPTOP_SWEEP = ROOT / "report" / "paper_attention-laptop" / "experiment.json"


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _cpu_seconds(call: Callable[[], object]) -> float:
    """Processor time of this process: a few per mille drown in what other processes do to the time on the wall."""
    started = time.process_time()
    call()
    return time.process_time() - started


def _step_of(run: Run, places: Collection[str] = ()) -> Callable[[int], StepView]:
    """One training step as the loop does it, without monitors and label; also the bare loop, on the sdpa backend.

    places: what is tapped.
    """
    engine, healthy = run.new_engine(), run.healthy_sites()
    return lambda index: engine.step(index, [run.fault.sites(index, healthy)], places)


def _watched(run: Run) -> StepView:
    """What the monitors of a run see after one step, with all the taps that they want."""
    engine, sites = run.new_engine(), run.fault.sites(0, run.healthy_sites())
    view = engine.step(0, [sites], tapped(run.monitors.values()))
    return Watch(engine.anatomy, engine.optimizer, run.monitors).seen(view)


def _alternate(steps: dict[str, Callable[[int], StepView]], count: int) -> dict[str, float]:
    """The median processor time of each step, measured in turns; the first five are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(count + 5):
        for name, step in steps.items():
            times[name].append(_cpu_seconds(partial(step, index)))
    return {name: median(values[5:]) for name, values in times.items()}


def _monitor_seconds(view: StepView, groups: Mapping[str, Mapping[str, Monitor]]) -> dict[str, float]:
    """By group of monitors, their processor time a step, over 500 steps with every window full.

    A group shares its copies of weights, which are in it; taps are not (``tap_shares``). It does not depend on what
    training does, so the weights are nudged, not trained.
    """
    histories = {
        group: WeightHistory(lookback for monitor in monitors.values() for lookback in monitor.needs.history)
        for group, monitors in groups.items()
    }
    spent, windows = dict.fromkeys(groups, 0.0), 500
    nudges = [3e-5 * torch.randn_like(parameter) for parameter in view.model.parameters()]
    for now in range(2 * windows + 1):
        if now:
            with torch.no_grad():
                for parameter, nudge in zip(view.model.parameters(), nudges, strict=True):
                    parameter.add_(nudge)
        for group, monitors in groups.items():
            history = histories[group]
            cost = _cpu_seconds(partial(history.record, now, view.anatomy))
            seen = replace(view, step=now, tokens=now, history=history)
            for monitor in monitors.values() if now else ():
                if any(cadence.is_due(now) for cadence in cadences(monitor)):
                    cost += _cpu_seconds(partial(monitor.observe, seen))
            spent[group] += cost if now > windows else 0.0
    return {group: seconds / windows for group, seconds in spent.items()}


def tap_shares(run: Run, count: int) -> dict[str, float]:
    """By place that a monitor taps, what tapping it adds to the step that is tapped, as a share of that step.

    0 where noise makes it less than nothing: a tap cannot save time.
    """
    plain, bare = _step_of(run), []
    watched = {place: _step_of(run, (place,)) for place in sorted(tapped(run.monitors.values()))}
    extra: dict[str, list[float]] = {place: [] for place in watched}
    for index in range(count + 5):
        bare.append(_cpu_seconds(partial(plain, index)))
        for place, step in watched.items():
            extra[place].append(_cpu_seconds(partial(step, index)) - bare[-1])
    return {place: max(0.0, median(seconds[5:])) / median(bare[5:]) for place, seconds in extra.items()}


def _taps(monitors: Mapping[str, Monitor], places: Mapping[str, float]) -> float:
    """What the taps of these monitors add to a step of a period, a place that several read at one step once."""
    return taps_share([MonitorCost(name, 0.0, _every_steps(m), taps_of(m, places)) for name, m in monitors.items()])


def taps_of(monitor: Monitor, places: Mapping[str, float]) -> dict[str, float]:
    """The places that a monitor taps, with what each costs the step that is tapped."""
    return {place: places[place] for place in sorted(tapped([monitor]))}


def step_costs(model: str) -> dict[str, float]:
    """Fault sites present but idle against a bare SDPA loop, taps and all monitors against the step.

    The share of the monitors is what they compute and, at the steps at which they read, what their taps cost.
    """
    torch.set_num_threads(1)
    runs = {
        name: build_run(compose("config", overrides=[f"model={model}", f"model.backend={name}"]))
        for name in ("reference", "sdpa")
    }
    steps = {name: _step_of(run) for name, run in runs.items()}
    steps["tapped"] = _step_of(runs["reference"], tapped(runs["reference"].monitors.values()))
    typical, watched = _alternate(steps, STEPS[model]), runs["reference"]
    readings = _monitor_seconds(_watched(watched), {"all": watched.monitors})["all"] / typical["reference"]
    taps = _taps(watched.monitors, tap_shares(watched, STEPS[model]))
    return {
        "step_ms": 1e3 * typical["reference"],
        "bare_sdpa_step_ms": 1e3 * typical["sdpa"],
        "step_over_bare_sdpa": typical["reference"] / typical["sdpa"],
        "tapped_step_over_step": typical["tapped"] / typical["reference"],
        "monitors_share_of_step": readings + taps,
        "of these, taps": taps,
    }


def expert_costs(model: str, dense: str) -> dict[str, float]:
    """A step with experts against the dense step with as many active parameters, and its router monitors."""
    torch.set_num_threads(1)
    runs = {name: build_run(compose("config", overrides=[f"model={name}"])) for name in (model, dense)}
    steps = {name: _step_of(run) for name, run in runs.items()}
    typical = _alternate(steps, STEPS[dense])
    router = [name for name, monitor in runs[model].monitors.items() if "router" in monitor.needs.roles]
    alone = replace(runs[model], monitors={name: runs[model].monitors[name] for name in router})
    readings = _monitor_seconds(_watched(alone), {"router": alone.monitors})["router"] / typical[model]
    return {
        "step_ms": 1e3 * typical[model],
        "step_over_dense": typical[model] / typical[dense],
        "router_monitors_share_of_step": readings + _taps(alone.monitors, tap_shares(alone, STEPS[dense])),
    }


def monitor_shares(model: str) -> dict[str, Any]:
    """Each monitor by itself: the cost column of the leaderboard, read by ``analysis.scores.costs``.

    share_of_step: what it computes, and its copies of weights; signals; every_steps: its cadences; taps: by place that
    it taps, what tapping adds to a step at which it reads.
    """
    torch.set_num_threads(1)
    run, count = build_run(compose("config", overrides=[f"model={model}"])), STEPS[DENSE_TWIN.get(model, model)]
    typical = _alternate({model: _step_of(run)}, count)[model]
    places = tap_shares(run, 2 * count)
    spent = _monitor_seconds(_watched(run), {name: {name: monitor} for name, monitor in run.monitors.items()})
    return {
        name: {
            "share_of_step": spent[name] / typical,
            "signals": [signal.name for signal in monitor.signals],
            "every_steps": _every_steps(monitor),
            "taps": taps_of(monitor, places),
        }
        for name, monitor in run.monitors.items()
    }


def _every_steps(monitor: Monitor) -> tuple[int, ...]:
    return tuple(cadence.every_steps for cadence in cadences(monitor))


def due_together(named: Mapping[str, Cadence]) -> list[frozenset[str]]:
    """Of each step of a period, the names that are due at it; named: cadences."""
    return [frozenset(n for n, cadence in named.items() if cadence.is_due(s)) for s in range(period(named.values()))]


def conservation_costs(model: str) -> dict[str, float]:
    """What the conservation family adds to a step, as a share of it: at its own cadences, and read at every step.

    A reading costs what its monitor computes, measured right after the step that it reads, and what the taps cost that
    step, paid once for all monitors that are due. ``reading`` and ``tapped`` are these parts, of one step.
    """
    torch.set_num_threads(1)
    run = build_run(compose("config", overrides=[f"model={model}"]))
    laws = {name: run.monitors[name] for name in CONSERVATION if name in run.monitors}
    due = due_together({name: cadences(monitor)[0] for name, monitor in laws.items()})
    everything = frozenset(laws)
    plain, watched = (
        _step_of(run),
        {n: _step_of(run, tapped(laws[name] for name in n)) for n in {*due, everything} if n},
    )
    bare: list[float] = []
    extra: dict[frozenset[str], list[float]] = {names: [] for names in watched}
    readings: dict[str, list[float]] = {name: [] for name in laws}
    for index in range(2 * STEPS[model]):
        bare.append(_cpu_seconds(partial(plain, index)))
        for names, step in watched.items():
            extra[names].append(_cpu_seconds(partial(step, index)) - bare[-1])
        view = watched[everything](index)
        for name, monitor in laws.items():
            readings[name].append(_cpu_seconds(partial(monitor.observe, view)))
        del view

    def share(seconds: list[float]) -> float:
        """The first five are warm-up."""
        return median(seconds[5:]) / median(bare[5:])

    def cost(names: frozenset[str]) -> float:
        return share(extra[names]) + sum(share(readings[name]) for name in names) if names else 0.0

    return {
        "conservation_share_of_step": sum(map(cost, due)) / len(due),
        "conservation_share_of_step_every_1": cost(everything),
        "tapped, share of step": share(extra[everything]),
        **{f"reading of {name}, share of step": share(seconds) for name, seconds in readings.items()},
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

    before_q, before_k, after_q, after_k = w
    qk_increment(before_q, before_k, after_q, after_k, n_heads)
    core = median(
        _seconds(lambda: qk_increment(before_q, before_k, after_q, after_k, n_heads)) for _ in range(3 * repeats)
    )
    dense = n_heads * median(_seconds(dense_one_head) for _ in range(max(1, repeats if d_model < 1024 else 2)))
    return {"core_ms": 1e3 * core, "dense_ms": 1e3 * dense, "dense_over_core": dense / core}


def scoring_cost(signals: int = 100) -> dict[str, float]:
    """A whole replay of 500 made-up runs of 250 samples: every track, chart, label and interval."""
    ways = ("up", "down", "both")
    meta = {
        f"signal{i}": {"unit": "1", "bad": ways[i % 3], "axes": ["layer", "head"][: 1 + i % 2], "every_steps": 10}
        for i in range(signals)
    }
    detectors = {name: [name] for name in meta} | {"baseline": ["signal0", "signal3"]}
    shows = {name: 500 + 10 * i for i, name in enumerate(meta)}
    faults = {name: {"shows": shows, "diverges": 1800, "onset": 1} for name in ("one", "two", "three")}
    counts = {"reference": 30, "calibration": 59, "test": 30, "faulty": 127}
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        simulate_experiment(runs, counts, meta, detectors, faults, baseline="baseline", steps=2500, alpha=0.05)
        command = [sys.executable, "-m", "foreshock.analysis.score", f"runs={runs}", f"out={folder}/scores"]
        wall = _seconds(lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"scoring_wall_s": wall, "scoring_peak_gib": peak / 2**20}


def _of_config(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with initialize_config_dir(CONF, version_base="1.3"):
        return measured()


def _sweep() -> dict[str, Any]:
    sweep = json.loads(LAPTOP_SWEEP.read_text())["sweep"] if LAPTOP_SWEEP.exists() else None
    return {"laptop sweep": {"busy_share_of_cores": sweep["busy"], "wall_s": sweep["wall_s"]}} if sweep else {}


PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "steps": lambda: _of_config(
        lambda: {m: step_costs(m) for m in STEPS} | {m: expert_costs(m, dense) for m, dense in DENSE_TWIN.items()}
    ),
    "conservation": lambda: _of_config(lambda: {"conservation laws, mha_small": conservation_costs("mha_small")}),
    "monitors": lambda: _of_config(lambda: {"monitors": {m: monitor_shares(m) for m in (*STEPS, *DENSE_TWIN)}}),
    "qk_core": lambda: {
        "qk core, d=768, 12 heads of 64": qk_core_speedup(768, 12, 64),
        "qk core, d=2048, 4 heads of 64": qk_core_speedup(2048, 4, 64),
    },
    "scoring": lambda: {"scoring, 500 runs x 100 signals x 250 samples": scoring_cost()},
    "sweep": _sweep,
}
"""What can be measured by itself."""


def measure(parts: Iterable[str] = tuple(PARTS)) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for part in parts:
        results |= PARTS[part]()
    return results | {"torch": torch.__version__}


GOALS = {
    "step_over_bare_sdpa": "at most 1.25",
    "monitors_share_of_step": "at most 0.03",
    "conservation_share_of_step": "at most 0.01",
    "conservation_share_of_step_every_1": "at most 0.03",
    "step_over_dense": "at most 1.5",
    "router_monitors_share_of_step": "at most 0.01",
    "busy_share_of_cores": "above 0.90",
    "scoring_wall_s": "under 60",
    "scoring_peak_gib": "under 2",
}


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) - {"out", "parts"} or len(given) != len(arguments):
        misused("python -m experiments.bench [out=FILE] [parts=A,B]")
    parts = tuple(given["parts"].split(",")) if "parts" in given else tuple(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        fail(f"parts={unknown[0]} is not allowed: of {', '.join(PARTS)}")
    try:
        out = check_file_to_write(given.get("out", ROOT / "report" / "bench.json"), "out")
    except ValueError as error:
        fail(str(error))
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text()) if "parts" in given and out.exists() else {}
    results = kept | measure(parts)
    write_whole(out, json.dumps(results, indent=1).encode() + b"\n")
    table = Table("what", "measure", "value", "goal")
    shares = {
        f"{model}, monitor {name}": {"share_of_step": detector_cost(one["signals"], costs)}
        for model, monitors in results.get("monitors", {}).items()
        for costs in [costs_of(monitors)]
        for name, one in monitors.items()
    }
    ratios = {what: values for what, values in results.items() if isinstance(values, dict) and what != "monitors"}
    for what, values in (ratios | shares).items():
        for measure_name, value in values.items():
            goal = GOALS.get(measure_name, "")
            if measure_name == "dense_over_core":
                goal = "at least 25" if "768" in what else "at least 200"
            table.add_row(what, measure_name, f"{value:.3g}", goal)
    console = Console()
    console.print(table)
    console.print(str(out))


if __name__ == "__main__":
    main(sys.argv[1:])
