"""Alarms of the rules in healthy saved runs, for docs/alarms.md: python -m tests.alarms.healthy_runs FOLDER [RUNS]

FOLDER: a reduced one, such as results/reference_set/dense; RUNS: how many of its healthy runs, 40 without.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from foreshock.alarms.settings import AlarmRules
from foreshock.analysis.runs import reduced
from tests.alarms.readings import panel, told_again


def main(folder: str, count: str = "40") -> None:
    runs = [run for run in reduced.read(Path(folder)).values() if run.onset is None][: int(count)]
    episodes, alarmed = Counter(), Counter()
    for run in runs:
        rules = AlarmRules(warmup_steps=run.manifest["config"]["train"]["warmup_steps"])
        watched = panel(*(run.described[name] for name in run.signals), settings=rules)
        for step, readings in told_again(run, list(run.signals)):
            watched.read(step, readings)
        episodes.update((event.rule, event.signal) for event in watched.events)
        alarmed.update({event.rule for event in watched.events})
    for rule in rules.rules:
        total = sum(number for (of_rule, _), number in episodes.items() if of_rule == rule)
        print(f"{rule}: {total} episodes, in {alarmed[rule]} of {len(runs)} healthy runs of {runs[0].horizon} steps")
    for (rule, signal), number in sorted(episodes.items()):
        print(f"  {rule} {signal}: {number}")


if __name__ == "__main__":
    main(*sys.argv[1:])
