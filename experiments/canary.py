"""A few short runs after a change of code, data or optimizer, held against healthy runs from before it.

    foreshock canary band=canary/nano store=19 model=mha_nano train.steps=200    before: train the healthy band
    foreshock canary band=canary/nano                                            after a change of code
    foreshock canary band=canary/nano train.weight_decay=0.2                     after a change of a setting
    foreshock canary band=canary/mine healthy=DIR                                before: runs of foreshock.attach(out=)
    foreshock canary band=canary/mine runs=DIR                                   after: runs of the same script

band=DIR        the healthy band: its runs, thresholds and settings
store=N         train N healthy runs and keep them as the band; alpha=0.1 takes 19. healthy=DIR: keep these runs
alpha=0.1       the probability that a healthy run stands outside the band in any signal
seeds=3         how many runs after the change, with seeds of the band; seeds=[7,8] chooses them
runs=DIR        finished runs after the change, instead of training
at_once=2       runs at a time

Every other key is one of foreshock train; a canary has the settings of its band, and those that are given. It trains
200 steps unless train.steps says otherwise: 200 to 2,000 are sensible. Exit code 0: inside the band; 1: outside.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import initialize_config_dir

from foreshock.analysis.calibrate import healthy_runs, left_out
from foreshock.analysis.detect.calibration import NO_READING
from foreshock.analysis.figures.canary import draw
from foreshock.analysis.probes import band as bands
from foreshock.analysis.probes.canary import Verdict, judge
from foreshock.analysis.reports.canary import lines, write_table
from foreshock.experiments import trace
from foreshock.experiments.cli import CONF, check_overrides, one_line_errors
from foreshock.experiments.executors import Here, Processes
from foreshock.experiments.places import check_folder_to_read, check_folder_to_write
from foreshock.experiments.plan import PlannedRun
from foreshock.experiments.reproduce import CONFIG_NAME, build_all
from foreshock.experiments.sweep import sweep
from foreshock.experiments.trace import Trace
from foreshock.experiments.training.stopping import stoppable
from foreshock.experiments.usage import show_help
from foreshock.experiments.validation import check_seed

OWN = ("band", "store", "healthy", "alpha", "seeds", "runs", "at_once")
_THERE = "runs that are there already"
_OF_THE_BAND = "a canary: alpha is that of its band"
WITHOUT_EFFECT: Mapping[str, Mapping[str, str]] = {
    "a canary": {"alpha": _OF_THE_BAND},
    "runs": {"alpha": _OF_THE_BAND, "seeds": _THERE, "at_once": _THERE},
    "store": {"seeds": "a band, whose runs have the first seeds"},
    "healthy": {"seeds": _THERE, "at_once": _THERE},
}
"""By what is done, the options that it has no use for, and why."""
STEPS = "train.steps=200"
CANARIES = 3
"""Runs after a change, unless they are chosen."""


@dataclass(frozen=True)
class Command:
    """band: its folder; store: how many healthy runs to train, healthy: or where they are; both None for a canary.

    seeds: of the runs after the change, or how many; runs: where they are, None to train them; overrides: of
    ``foreshock train``.
    """

    band: Path
    store: int | None
    healthy: Path | None
    alpha: float
    seeds: int | tuple[int, ...]
    runs: Path | None
    at_once: int
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Command:
        """From a command line. Raises ValueError in one line."""
        given: dict[str, str] = {}
        overrides = []
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if not equals or not value or key.startswith("-"):
                raise ValueError(f"{argument!r} is not allowed: key=value")
            if key in given:
                raise ValueError(f"{key}= is given twice: {given[key]} and {value}")
            if key in OWN:
                given[key] = value
            elif key in ("seed", "out"):
                raise ValueError(f"{argument} is not allowed: a canary's seeds are seeds=, and its folder is band=")
            else:
                overrides.append(argument)
        if "band" not in given:
            raise ValueError("band= is missing: foreshock canary band=DIR, and store=19 to train a healthy band")
        chosen = [key for key in ("store", "healthy", "runs") if key in given]
        if len(chosen) > 1:
            said = "store and healthy make a band, runs is held against one"
            raise ValueError(f"{' and '.join(chosen)} are not allowed together: {said}")
        if overrides and chosen and chosen[0] != "store":
            there = f"{chosen[0]}={given[chosen[0]]}"
            raise ValueError(f"{overrides[0]} has no effect on runs that are there already ({there})")
        command = cls(
            band=Path(given["band"]),
            store=_whole(given["store"], "store") if "store" in given else None,
            healthy=Path(given["healthy"]) if "healthy" in given else None,
            alpha=_share(given.get("alpha", "0.1")),
            seeds=_seeds(given.get("seeds", str(CANARIES))),
            runs=Path(given["runs"]) if "runs" in given else None,
            at_once=_whole(given.get("at_once", "2"), "at_once"),
            overrides=tuple(overrides),
        )
        what = chosen[0] if chosen else "a canary"
        useless = next((key for key in given if key in WITHOUT_EFFECT[what]), None)
        if useless is not None:
            raise ValueError(f"{useless}={given[useless]} has no effect on {WITHOUT_EFFECT[what][useless]}")
        return command


def _whole(value: str, key: str) -> int:
    if not (value.isdecimal() and int(value) > 0):
        raise ValueError(f"{key}={value} is not allowed: a whole number from 1")
    return int(value)


def _share(value: str) -> float:
    try:
        alpha = float(value)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={value} is not allowed: a number between 0 and 1")
    return alpha


def _seeds(value: str) -> int | tuple[int, ...]:
    if not value.startswith("["):
        return _whole(value, "seeds")
    parts = [part.strip() for part in value.strip("[]").split(",") if part.strip()]
    seeds = tuple(int(part) if part.isdecimal() else -1 for part in parts)
    for seed in seeds:
        check_seed(seed, "seeds")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={value} is not allowed: how many, or a list of different ones such as [7,8]")
    return seeds


def trained(overrides: Sequence[str], seeds: Sequence[int], out: Path, at_once: int) -> list[Trace]:
    """The runs of these overrides, one a seed, trained where they are not in ``out`` yet, however they ended."""
    check_overrides(CONFIG_NAME, overrides)
    with initialize_config_dir(CONF, version_base="1.3"):
        runs = build_all([[*overrides, f"seed={seed}"] for seed in seeds])
    planned = [PlannedRun("", "canary", None, run.seed, ()) for run in runs]
    sweep(planned, runs, out, Here() if at_once == 1 else Processes({"n_jobs": at_once}))
    return [trace.read(out / run.run_id) for run in runs]


def make_band(command: Command) -> None:
    """Store a band of trained runs, or of runs that are there."""
    bands.check_new(command.band)
    overrides = _with_steps(command.overrides)
    if command.healthy is not None:
        runs, overrides = _healthy(command.healthy), ()
    else:
        assert command.store is not None
        faulty = next((line for line in overrides if line.lstrip("+~").startswith("fault")), None)
        if faulty is not None:
            raise ValueError(f"{faulty} is not allowed with store: the runs of a band are healthy")
        bands.check_count(command.store, command.alpha)
        runs = trained(overrides, range(command.store), command.band / bands.HEALTHY, command.at_once)
    band = bands.store(command.band, runs, command.alpha, overrides)
    made = band.thresholds
    print(
        f"{command.band}: {len(made.signals)} signals of {len(runs)} healthy runs of {band.steps:,} steps; a healthy "
        f"run stands outside with probability {made.alpha:g} at most"
    )
    unread = [name for name, reason in made.declined.items() if reason.endswith(NO_READING)]
    if unread:
        print(f"  {len(unread)} signals have no reading in so few steps, such as {unread[0]}")
    for name in sorted(made.declined.keys() - {*unread}):
        print(f"  not compared: {made.declined[name]}")


def _healthy(folder: Path) -> list[Trace]:
    """The completed runs of a folder; what is left out is said."""
    if not any(folder.glob("*/manifest.json")):
        raise ValueError(f"healthy={folder} holds no finished healthy run: folders of foreshock.attach(out=...)")
    unfinished = left_out(folder)
    if unfinished:
        print(f"  left out, since they did not complete: {', '.join(unfinished)}")
    return healthy_runs(folder)


def compare(command: Command) -> Verdict:
    """Hold runs after a change against the band, and write what came out beside it."""
    band = bands.read(command.band)
    if command.runs is None and not band.overrides:
        raise ValueError(f"band={command.band} is of runs that were trained elsewhere: give yours as runs=DIR")
    folder = _next_folder(command.band)
    if command.runs is not None:
        runs = _finished(command.runs)
    else:
        seeds = _seeds_of(band, command.seeds)
        runs = trained([*band.overrides, *command.overrides], seeds, folder / "runs", command.at_once)
    verdict = judge(band, runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "canary.csv", verdict)
    draw(folder / "canary.png", band, verdict)
    print("\n".join([*lines(band, verdict), str(folder)]))
    return verdict


def _seeds_of(band: bands.Band, seeds: int | tuple[int, ...]) -> Sequence[int]:
    if not isinstance(seeds, int):
        return seeds
    if seeds > len(band.seeds):
        raise ValueError(f"seeds={seeds} is not allowed: the band has {len(band.seeds)} to choose from, or name yours")
    return band.seeds[:seeds]


def _with_steps(overrides: tuple[str, ...]) -> tuple[str, ...]:
    given = any(line.lstrip("+").startswith("train.steps=") for line in overrides)
    return overrides if given else (*overrides, STEPS)


def _next_folder(band: Path) -> Path:
    """The first of canary-1, canary-2, ... that is not there: a canary is trained, whatever was trained before."""
    number = 1
    while (band / f"canary-{number}").exists():
        number += 1
    return band / f"canary-{number}"


def _finished(folder: Path) -> list[Trace]:
    """Every run in a folder, however it ended. Raises TraceError for one that cannot be read, ValueError for none."""
    runs = [trace.read(path.parent) for path in sorted(folder.glob("*/manifest.json"))]
    if not runs:
        raise ValueError(f"runs={folder} holds no run: folders of foreshock.attach(out=...) are needed")
    return runs


def _check_places(command: Command) -> None:
    """Raises ValueError where an option names no folder that can be read, or written."""
    check_folder_to_write(command.band, "band")
    for key, folder in (("healthy", command.healthy), ("runs", command.runs)):
        if folder is not None:
            check_folder_to_read(folder, key)


@one_line_errors
@stoppable()
def command() -> None:
    chosen = Command.of(sys.argv[1:])
    _check_places(chosen)
    if chosen.store is not None or chosen.healthy is not None:
        make_band(chosen)
    elif compare(chosen).outside:
        sys.exit(1)


def main() -> None:
    show_help(sys.argv[1:], __doc__)
    command()


if __name__ == "__main__":
    main()
