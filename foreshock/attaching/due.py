"""Which monitors read a step, and why the others do not."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping

from foreshock.alarms.terminal import in_one_line
from foreshock.attaching.sight import Sight
from foreshock.models.anatomies.watched_rows import NoObjective
from foreshock.models.anatomy import Anatomy
from foreshock.models.taps import Taps
from foreshock.monitors.base import Monitor, Reading, StepView
from foreshock.monitors.unreadable import Unreadable
from foreshock.monitors.watch import Watch

OF_A_FORWARD = frozenset({"batch", "objective_at", "routings"})
"""Fields of a view that a forward leaves behind, or the rows that it had."""


class Due:
    """The monitors of one attached watch.

    watch: that holds them; say: takes a line about one that declines; lost: takes the kind and the words of an alarm,
    for one that is switched off.

    monitors: by name, those that read; declined: by monitor, or ``<monitor>.over_noise``, why it does not read;
    tracebacks: of monitors that raised and were switched off.
    """

    def __init__(
        self,
        watch: Watch,
        anatomy: Anatomy,
        monitors: Mapping[str, Monitor],
        declined: Mapping[str, str],
        say: Callable[[str], None],
        lost: Callable[[str, str], None],
    ) -> None:
        self._watch, self._anatomy, self._say, self._lost = watch, anatomy, say, lost
        self.monitors, self.declined = dict(monitors), dict(declined)
        self.tracebacks: dict[str, str] = {}

    def at(self, step: int) -> list[str]:
        """The monitors that have a signal due at a step."""
        return [name for name in self._watch.due(step) if name in self.monitors]

    def places(self, due: list[str]) -> frozenset[str]:
        """What has to be tapped for these monitors."""
        return self._watch.places(due)

    def routed(self, due: list[str]) -> bool:
        """Whether one of these monitors asks for routings."""
        return self._anatomy.moe is not None and any("routings" in self.monitors[name].needs.view for name in due)

    def readable(self, due: list[str], sight: Sight) -> list[str]:
        """Without those that cannot read at all.

        They read a forward that no hook has seen, or an optimizer that has not stepped or has lost its gradients.
        """
        for name in filter(self._takes_a_forward, () if sight.forwards else due):
            self._leave_out(name, "no hook has seen a forward: call the model itself, and attach before torch.compile")
        due = [name for name in due if sight.forwards or not self._takes_a_forward(name)]
        takers = [name for name in due if "optimizer" in self.monitors[name].needs.view]
        lost = sight.gradients_are_lost()
        for name in takers if lost else []:
            self._decline(name, "gradients are gone: call watch.step(loss) before optimizer.zero_grad()")
        return [name for name in due if name not in takers or (sight.updated and not lost)]

    def untapped(self, due: list[str], error: Exception) -> list[str]:
        """Without those that read a forward, where the watched rows could not run again for what was raised."""
        for name in (takers := [name for name in due if self._takes_a_forward(name)]):
            if isinstance(error, NoObjective):
                self._leave_out(name, str(error))
            else:
                self._lose(name, error, "it cannot run the watched rows again: ")
        return [name for name in due if name not in takers]

    def reached(self, due: list[str], view: StepView, sight: Sight) -> list[str]:
        """Without those that tap what no gradient reaches, what is called twice, or what a hook could not look at."""
        for name in due:
            places = self.monitors[name].needs.taps
            taps = {module: tap for place in places for module, tap in view.taps.at(place).items()}
            failed = next(((module, tap.failure) for module, tap in taps.items() if tap.failure is not None), None)
            if failed is not None:
                self._lose(name, failed[1], f"it cannot look at {failed[0]}: ")
            elif self.routed([name]) and not view.routings:
                failure = sight.router_failure or RuntimeError("one of them has not run")
                self._lose(name, failure, "it cannot look at the routers: ")
        due = [name for name in due if name in self.monitors and not self._called_again(name, view, sight)]
        unreached = untouched(view.taps, self.places(due))
        for name in due:
            module = next((unreached[place] for place in self.monitors[name].needs.taps if place in unreached), None)
            if module is not None:
                self._decline(name, f"no gradient reaches {module}: it is not used, or all before it is frozen")
        return [name for name in due if name in self.monitors]

    def observe(self, name: str, view: StepView) -> dict[str, Reading]:
        """What one monitor reads; one that raises is switched off, and its traceback kept."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                readings = self._watch.observe(view, [name])
            self._note_unpredicted(name, view, readings)
            if caught:
                self._leave_out(name, f"in part: {'; '.join(sorted({str(each.message) for each in caught}))}")
            return readings
        except Unreadable as reason:
            self._leave_out(name, str(reason))
        except Exception as error:
            self._lose(name, error, "it raised ")
        return {}

    def _takes_a_forward(self, name: str) -> bool:
        """Whether a monitor reads what a forward has left behind."""
        needs = self.monitors[name].needs
        return bool(needs.taps) or not OF_A_FORWARD.isdisjoint(needs.view)

    def _called_again(self, name: str, view: StepView, sight: Sight) -> bool:
        """Whether a weight's gradient is of more calls than were tapped, which a monitor leaves such a step out for."""
        places = [place for place in self.monitors[name].needs.taps if place != "dot_product"]  # says so of itself
        again = (module for place in places for module, tap in view.taps.at(place).items() if tap.arrivals > 1)
        module = next(again, None)
        if module is not None:
            self._leave_out(name, f"{module} is called more than once in a backward")
        elif "linear" in places and sight.shared and view.taps is sight.taps:
            self._leave_out(name, "a backward goes through more than one forward of the model")
        else:
            return False
        return True

    def _note_unpredicted(self, name: str, view: StepView, readings: Mapping[str, Reading]) -> None:
        """Say once that a kernel's laws have no prediction beside them."""
        ratios = [signal.name for signal in self.monitors[name].signals if signal.universal]
        if not ratios or not readings or any(ratio in readings for ratio in ratios):
            return
        call = next((tap.call for tap in view.taps.at("dot_product").values() if tap.call is not None), None)
        if call is not None:
            of = "" if call.dtype is None else f" of {str(call.dtype).removeprefix('torch.')}"
            self._leave_out(f"{name}.over_noise", f"the rounding of a {call.kernel} kernel{of} is not known")

    def _lose(self, name: str, error: Exception, how: str) -> None:
        """Switch a monitor off for what was raised in it, and keep the traceback."""
        self.tracebacks[name] = "".join(traceback.format_exception(error))
        said = f"switched off, {how}{in_one_line(error)}"
        self._decline(name, f"{said} (watch.tracebacks[{name!r}])")
        self._lost("monitor_failed" if self.monitors else "monitoring_blackout", f"{name} is {said}")

    def _decline(self, name: str, reason: str) -> None:
        """Switch a monitor off."""
        self.monitors.pop(name, None)
        self._leave_out(name, reason)

    def _leave_out(self, name: str, reason: str) -> None:
        """Say why a monitor does not read; a reason that was said last is not said again."""
        if self.declined.get(name) != reason:
            self.declined[name] = reason
            self._say(f"{name} declines: {reason}")


def untouched(taps: Taps, places: frozenset[str]) -> dict[str, str]:
    """By tapped place, a module that a forward or a backward has not gone through; attention says so of itself."""
    without = {
        place: [name for name, tap in taps.at(place).items() if tap.output is None or tap.output_grad is None]
        for place in places & taps.places - {"dot_product"}
    }
    return {place: names[0] for place, names in without.items() if names}
