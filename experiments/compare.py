"""Monitors against the dose of one fault: train, score, and draw lead against dose.

    foreshock compare "monitors=[delta_w,loss]" fault=bf16_shift bits=5,6,7,8 seeds=5

monitors: of conf/monitor; every detector that reads them alone is scored, and held-out loss as the baseline. fault: of
conf/fault. Its number with several values is the dose, by default the doses of its file; its other keys may be set too
(onset=300). seeds: runs a dose; healthy runs are as many as the scale has. steps: of every run; model: of conf/model;
scale: of conf/scale. What else is given (report=, data=, dry_run=true, train.batch_size=32, experiment.seeds.test=10)
goes to ``experiments.reproduce``.

The comparison is an experiment like any other: it is written to conf/experiment/ in the report's folder, and
``experiments.reproduce`` trains and scores it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from foreshock.experiments import reproduce
from foreshock.experiments.cli import CONF, guarded, one_line_errors, options
from foreshock.experiments.files import write_whole
from foreshock.experiments.names import check_distinct
from foreshock.experiments.places import check_folder_to_write
from foreshock.experiments.plain_config import monitors_of
from foreshock.experiments.training.stopping import stoppable
from foreshock.experiments.usage import show_help
from foreshock.experiments.validation import check_named, nearest
from foreshock.faults.base import LABELS

OWN = ("monitors", "fault", "seeds", "steps", "model", "scale", "report")
PASSED = ("data", "train", "label", "rule", "align", "out", "dry_run", "score_only", "at_once")
"""Keys without a dot that ``experiments.reproduce`` takes."""
BASELINE = "held_out_loss"
NOT_DOSES = ("_target_", "defaults", *LABELS)


@dataclass(frozen=True)
class Comparison:
    """monitors, fault, model, scale: by their files' names, model None for the scale's; dose: a key of the fault;
    values: of it; fixed: other keys of the fault; seeds: runs a dose; steps: of a run, both None for the scale's;
    report: its folder; passed: overrides of ``experiments.reproduce``.
    """

    monitors: tuple[str, ...]
    fault: str
    dose: str
    values: tuple[float, ...]
    fixed: Mapping[str, str]
    seeds: int | None
    steps: int | None
    model: str | None
    scale: str
    report: Path
    passed: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Comparison:
        """From a command line. Raises ValueError in one line: an unknown key, monitor or fault, no dose, or two."""
        given = dict(_pair(argument) for argument in arguments)
        fault = given.get("fault", "")
        check_named([fault], options("fault"), "fault")
        keys = _keys_of(fault)
        known = [*OWN, *keys, *PASSED]
        passed = {key: value for key, value in given.items() if "." in key or "/" in key or key in PASSED}
        for key in given.keys() - passed.keys():
            if key not in known:
                said = f"a key of fault={fault} is one of {', '.join(keys)}"
                raise ValueError(f"{key}={given[key]} is not allowed: {said}{nearest(key, known)}")
        dose, values = _dose(fault, {key: given[key] for key in keys if key in given})
        monitors = _names(given.get("monitors", ""))
        check_named(monitors, options("monitor"), "monitors")
        check_distinct(monitors, "monitors")
        model, scale = given.get("model"), given.get("scale", "laptop")
        check_named([scale], options("scale"), "scale")
        check_named([] if model is None else [model], options("model"), "model")
        return cls(
            monitors=monitors,
            fault=fault,
            dose=dose,
            values=values,
            fixed={key: given[key] for key in keys if key in given and key != dose},
            seeds=_count(given, "seeds"),
            steps=_count(given, "steps"),
            model=model,
            scale=scale,
            report=check_folder_to_write(given.get("report", f"report/compare_{fault}_{dose}-{scale}"), "report"),
            passed=tuple(f"{key}={value}" for key, value in passed.items()),
        )

    @property
    def name(self) -> str:
        return f"compare_{self.fault}_{self.dose}"

    def experiment(self) -> dict[str, Any]:
        """The content of its file in ``conf/experiment``."""
        every = [f"fault={self.fault}", *(f"fault.{key}={value}" for key, value in self.fixed.items())]
        faults = {
            f"{self.dose}_{value:g}".replace(".", "_"): {
                "label": f"{self.dose} {value:g}",
                "dose": float(value),
                "overrides": [*every, f"fault.{self.dose}={value!r}"],
            }
            for value in self.values
        }
        seeds: dict[str, Any] = {role: f"${{scale.seeds.{role}}}" for role in ("reference", "calibration", "test")}
        baseline = _detectors_in(BASELINE)
        return {
            "name": self.name,
            "title": f"{self.fault} by {self.dose}",
            "models": [self.model or "${scale.dense}"],
            "align": ["steps"],
            "draw": "lead_by_dose",
            "dose": self.dose,
            "monitors": list(self.monitors),
            "seeds": {**seeds, "faulty": self.seeds or "${scale.seeds.faulty}"},
            "overrides": [] if self.steps is None else [f"train.steps={self.steps}"],
            "faults": faults,
            "detectors": detectors_of(self.monitors) | baseline,
            "baseline": list(baseline),
            "figure": {"held-out loss": {"signals": ["held_out_loss"]}},
        }

    def command(self) -> list[str]:
        """The arguments of ``experiments.reproduce`` for it, whose file has been written."""
        flags = ["--config-dir", str(self.report / "conf")]
        return [*flags, f"experiment={self.name}", f"scale={self.scale}", f"report={self.report}", *self.passed]

    def write(self) -> None:
        text = yaml.safe_dump({"experiment": self.experiment()}, sort_keys=False, allow_unicode=True, width=110)
        path = self.report / "conf" / "experiment" / f"{self.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"# @package _global_\n# {' '.join(['foreshock compare', *sys.argv[1:]])}\n{text}".encode())


def detectors_of(monitors: Sequence[str]) -> dict[str, list[str]]:
    """By name, the signals of every detector of ``conf/detector`` that reads these monitors alone, each once.

    A monitor that no detector reads enters under its own name, with all of its signals.
    """
    signals = {name: [s.name for s in monitor.signals] for name, monitor in monitors_of(True).items()}
    available = {signal for name in monitors for signal in signals[name]}
    chosen: dict[str, list[str]] = {}
    for file in options("detector"):
        for name, wanted in _detectors_in(file).items():
            if set(wanted) <= available and wanted not in chosen.values():
                chosen.setdefault(name, wanted)
    read = {signal for wanted in chosen.values() for signal in wanted}
    return chosen | {name: signals[name] for name in monitors if not read & {*signals[name]}}


def _detectors_in(file: str) -> dict[str, list[str]]:
    detectors: dict[str, list[str]] = yaml.safe_load((Path(CONF) / "detector" / f"{file}.yaml").read_text())
    return detectors


def _keys_of(fault: str) -> list[str]:
    return [key for key in _node(fault) if key not in NOT_DOSES]


def _node(fault: str) -> dict[str, Any]:
    node: dict[str, Any] = yaml.safe_load((Path(CONF) / "fault" / f"{fault}.yaml").read_text())
    return node


def _pair(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals or not value or key.startswith("-"):
        raise ValueError(f"{argument!r} is not allowed: key=value")
    return key, value


def _names(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.strip("[]").split(",") if name.strip())
    if not names:
        raise ValueError('monitors is missing: such as "monitors=[delta_w,loss]"')
    return names


def _dose(fault: str, given: Mapping[str, str]) -> tuple[str, tuple[float, ...]]:
    """The key of a fault that has several values, and them; where none has, those of its file's doses."""
    several = [key for key, value in given.items() if "," in value and not value.startswith(("[", "{"))]
    listed = _listed_doses(fault)
    if not several and listed is not None and listed[0] not in given:
        return listed
    if len(several) != 1:
        said = f"{' and '.join(several)} have several values" if several else "no key of the fault has several values"
        raise ValueError(f"fault={fault}: {said}: give one number of it as the dose, such as {_example(fault)}")
    (dose,) = several
    values = [yaml.safe_load(value) for value in given[dose].split(",")]
    for value in values:
        if not _is_number(value):
            raise ValueError(f"{dose}={given[dose]} is not allowed: {value!r} is no number, and a dose is")
    check_distinct(values, dose)
    return dose, tuple(sorted(values))


def _listed_doses(fault: str) -> tuple[str, tuple[float, ...]] | None:
    """The doses of a fault's file, where they are several numbers of one key."""
    doses = _node(fault).get("doses", ())
    keys, values = {key for dose in doses for key in dose}, [value for dose in doses for value in dose.values()]
    if len(keys) != 1 or len(values) < 2 or not all(map(_is_number, values)):
        return None
    return keys.pop(), tuple(sorted(values))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _example(fault: str) -> str:
    """A dose of this fault: its first number, at its default and below."""
    numbers = {key: of for key, of in _node(fault).items() if _is_number(of) and of}
    key, value = next(iter(numbers.items()), ("KEY", 1))
    return f"{key}={value - 1 if isinstance(value, int) else value / 2},{value}"


def _count(given: Mapping[str, str], key: str) -> int | None:
    value = given.get(key)
    if value is not None and not (value.isdecimal() and int(value) > 0):
        raise ValueError(f"{key}={value} is not allowed: a whole number from 1")
    return None if value is None else int(value)


@one_line_errors
@stoppable()
def prepare() -> None:
    """Write the comparison as an experiment, and leave the command line that trains it."""
    comparison = Comparison.of(sys.argv[1:])
    comparison.write()
    sys.argv[1:] = comparison.command()


def main() -> None:
    show_help(sys.argv[1:], __doc__)
    prepare()
    guarded(reproduce.main, reproduce.CONFIG_NAME)


if __name__ == "__main__":
    main()
