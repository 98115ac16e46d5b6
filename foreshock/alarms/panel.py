"""All rules of a watch: readings in, events out, and what is done about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foreshock.alarms.calibrated import Calibrated
from foreshock.alarms.episodes import Episodes
from foreshock.alarms.event import UNKNOWN, Event, TrainingAlarm
from foreshock.alarms.evidence import Evidence
from foreshock.alarms.outlets import Outlets
from foreshock.alarms.overflow import Overflows, is_enabled
from foreshock.alarms.reading import HostReading
from foreshock.alarms.rules import Breach, Exact, NonFinite, Published, Rule, Self, Universal
from foreshock.alarms.settings import RAISE, SNAPSHOT, AlarmRules
from foreshock.alarms.severity import OWN, REPORTED, REPORTS, Case, Row, row_of, runbook_path
from foreshock.alarms.terminal import say
from foreshock.experiments.validation import check_named
from foreshock.monitors.signal import Signal

FILE = "alarms.jsonl"
EVIDENCE = "evidence"


class Panel:
    """The live alarms of one run.

    signals: by name, with the monitor that reads each; run: its name; outlets: where events go; scaler: the GradScaler,
    if any; model: what the thresholds must be of, as a manifest's ``attached`` has it.
    Nothing that an action or a callback raises leaves ``read`` or ``report``, but for the action ``raise``; ``own`` may
    be called inside a forward or a backward, so its alarm waits for the next ``read``, ``report`` or ``raise_kept``.

    Raises ValueError where the file of thresholds is none or of another model.
    """

    def __init__(
        self,
        settings: AlarmRules,
        signals: Mapping[str, tuple[str, Signal]],
        run: str,
        outlets: Outlets,
        scaler: Any = None,
        model: Mapping[str, Any] | None = None,
    ) -> None:
        self._signals, self._run, self._outlets = signals, run, outlets
        self._calibrated = None if settings.thresholds is None else Calibrated(settings.thresholds, model)
        self._rules = rules_of(settings, [signal for _, signal in signals.values()], self._calibrated)
        self._assign()
        self._episodes = Episodes()
        self._overflows = Overflows(scaler) if is_enabled(scaler) else None
        self._evidence = None if outlets.folder is None else Evidence(outlets.folder / EVIDENCE)
        self._declined: set[str] = set()
        self._fatal: list[Event] = []
        self.events: list[Event] = []

    events: list[Event]
    """Of the run so far."""

    def read(self, step: int, readings: list[HostReading], batch: Any = None, proven: bool = True) -> list[Event]:
        """Judge the readings of a step; the events that they raise. Raises TrainingAlarm for the action ``raise``.

        proven: whether predictions of rounding are known to hold in this arithmetic (``alarms.proven``). A rule that
        raises is switched off, with an alarm.
        """
        if self._evidence is not None:
            self._evidence.keep(step, readings, batch)
        events = self._reloaded(step)
        for rule in list(self._rules):
            if isinstance(rule, Universal):
                rule.proven = proven
            events += self._judged_or_off(step, rule, readings)
        events += self._news_of_declined(step)
        storm = None if self._overflows is None else self._overflows.update(step)
        if storm is not None:
            events.append(self._event(step, OWN, "overflow_storm", storm))
        self._told(events)
        self.raise_kept()
        return events

    def report(self, step: int, kind: str, message: str = "", value: float | None = None) -> Event:
        """An event of the training loop itself (``REPORTS``). Raises ValueError for another kind; TrainingAlarm."""
        check_named([kind], REPORTS, "report")
        event = self._event(step, REPORTED, kind, message, value)
        self._told([event])
        self.raise_kept()
        return event

    def own(self, step: int, kind: str, message: str) -> Event:
        """An event that befell the watch; raises nothing."""
        event = self._event(step, OWN, kind, message)
        self._told([event])
        return event

    def raise_kept(self) -> None:
        """Raises TrainingAlarm of the first alarm since the last call whose action is ``raise``, if any."""
        fatal, self._fatal = self._fatal, []
        if fatal:
            raise TrainingAlarm(fatal[0])

    def _reloaded(self, step: int) -> list[Event]:
        if self._calibrated is None:
            return []
        try:
            if self._calibrated.reload():
                self._assign()
        except ValueError as error:
            return [self._event(step, OWN, "thresholds_unreadable", f"{error}; the old ones stay")]
        return []

    def _news_of_declined(self, step: int) -> list[Event]:
        """Said once: a calibrated signal that is not judged would look like health."""
        declined = {} if self._calibrated is None else self._calibrated.declined
        news = sorted(declined.keys() - self._declined)
        self._declined |= declined.keys()
        if news:
            self._assign()
        return [self._event(step, OWN, "threshold_not_used", declined[name]) for name in news]

    def _assign(self) -> None:
        """Say which signals each rule judges; the rule ``self`` has those that ``calibrated`` has not."""
        for rule in self._rules:
            if isinstance(rule, Self):
                rule.leave_to(() if self._calibrated is None else self._calibrated.known)
        described = [signal for _, signal in self._signals.values()]
        self._applies = {rule.name: {s.name for s in described if rule.applies(s)} for rule in self._rules}

    def _judged_or_off(self, step: int, rule: Rule, readings: Sequence[HostReading]) -> list[Event]:
        try:
            return self._judged(rule, readings)
        except Exception as error:
            self._rules.remove(rule)
            if rule is self._calibrated:
                self._calibrated = None
                self._assign()
            reason = f"the rule {rule.name} is switched off, it raised {type(error).__name__}: {error}"
            return [self._event(step, OWN, "rule_failed", reason)]

    def _judged(self, rule: Rule, readings: Sequence[HostReading]) -> list[Event]:
        """The events of a rule at a step, one an episode."""
        judged = [reading for reading in readings if reading.signal.name in self._applies[rule.name]]
        breaches, events = rule.judge(judged), []
        for reading in judged:
            breach = breaches.get(reading.signal.name)
            if breach is None:
                self._episodes.clear(rule.name, reading.signal.name)
            elif (event := self._told_once(rule, reading, breach)) is not None:
                events.append(event)
        return events

    def _told_once(self, rule: Rule, reading: HostReading, breach: Breach) -> Event | None:
        signal, value = reading.signal, float(reading.value.flat[breach.index])

        def row(readings: int, first: float | None) -> Row:
            return row_of(Case(rule.name, signal.name, signal.family, breach.side, value, readings, first))

        told = self._episodes.tell(rule.name, signal.name, value, row)
        if told is None:
            return None
        rate, (layer, head) = rule.per_million_steps(reading.step), reading.place(breach.index)
        return Event(
            run=self._run,
            step=reading.step,
            rule=rule.name,
            monitor=self._signals[signal.name][0],
            signal=signal.name,
            family=signal.family,
            law=None if signal.law is None else str(signal.law),
            layer=layer,
            head=head,
            value=value,
            statistic=breach.statistic,
            threshold=breach.threshold,
            side=breach.side,
            expected_false_alarms_per_million_steps=UNKNOWN if rate is None else rate,
            severity=told.severity,
            runbook=runbook_path(told),
        )

    def _event(self, step: int, rule: str, kind: str, message: str, value: float | None = None) -> Event:
        row = row_of(Case(rule, kind, value=value))
        return Event(
            run=self._run,
            step=step,
            rule=rule,
            signal=kind,
            value=value,
            severity=row.severity,
            runbook=runbook_path(row),
            message=" ".join(message.split()),
        )

    def _told(self, events: list[Event]) -> None:
        """Tell every event, then act on each, and keep those whose action is ``raise``."""
        for event in events:
            self._say(event)
        self._fatal += [event for event in events if self._acted(event)]

    def _say(self, event: Event) -> None:
        folder, terminal = self._outlets.folder, self._outlets.terminal
        self.events.append(event)
        say(event.line(), terminal)
        if folder is not None:
            try:
                with open(folder / FILE, "a", encoding="utf-8") as file:
                    file.write(event.json() + "\n")
            except OSError as error:
                say(f"{folder / FILE} cannot be written: {error.strerror}", terminal)

    def _acted(self, event: Event) -> bool:
        """Do what is asked for this severity; whether to raise afterwards. What fails is an event without actions."""
        actions = self._outlets.actions.get(event.severity, ())
        for action in (*self._outlets.on_alarm, *actions):
            try:
                if action == SNAPSHOT and self._evidence is not None:
                    self._evidence.write(event)
                elif callable(action):
                    action(event)
            except Exception as error:
                name = action if isinstance(action, str) else getattr(action, "__name__", type(action).__name__)
                self._say(self._event(event.step, OWN, "action_failed", f"{name}: {type(error).__name__}: {error}"))
        return RAISE in actions


def rules_of(settings: AlarmRules, signals: Sequence[Signal], calibrated: Calibrated | None) -> list[Rule]:
    """The rules that are asked for, NaN first."""
    known = () if calibrated is None else calibrated.known
    made: dict[str, Rule] = {
        "non_finite": NonFinite(),
        "exact": Exact(),
        "universal": Universal(settings.budget, signals),
        "self": Self(settings.budget, signals, known, settings.warmup_steps),
        "published": Published(),
    }
    rules = [rule for name, rule in made.items() if name in settings.rules]
    return rules if calibrated is None else [*rules, calibrated]
