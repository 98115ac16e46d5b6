"""foreshock: which monitor sees a training failure coming first, how surely, and does it name the cause?

Everything is importable under this name: ``foreshock.faults``, ``foreshock.models``, ``foreshock.monitors``,
``foreshock.experiments``, ``foreshock.analysis``. In a clone these are its top-level folders, and ``faults.base`` is
the very module ``foreshock.faults.base``; installed, there is no other name, so that a ``models`` folder of yours
stays yours.

    watch = foreshock.attach(model, optimizer)   # monitors on a training loop of your own (``foreshock.attaching``)
    readings = foreshock.load("runs")            # saved runs as one pandas table (``analysis.runs.frame``)
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from foreshock import starting
from foreshock._clone import is_clone, one_name

starting.begin()

ROOT = Path(__file__).resolve().parent.parent

if is_clone(ROOT):
    __path__.append(str(ROOT))
    one_name()

PUBLIC = {
    "AlarmRules": "foreshock.alarms.settings",
    "TrainingAlarm": "foreshock.alarms.event",
    "attach": "foreshock.attaching.attach",
    "load": "foreshock.analysis.runs.frame",
    "watched_attention": "foreshock.models.anatomies.attention_capture",
}
"""By name, the module that has it: loaded at first use, so that ``import foreshock`` needs no torch."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'foreshock' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
