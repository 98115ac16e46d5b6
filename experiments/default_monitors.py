"""``monitor: all`` of ``conf/config.yaml``: every file of ``conf/monitor`` that a loop of ours can fill.

So a new monitor is a class and its YAML, and no list is edited. A monitor stays out by what it says itself: that it
needs what loops of ``foreshock.attach`` alone have (``Needs.attached``).
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from foreshock.experiments.plain_config import CONF, construct

ALL = "all"
"""The option of the group ``monitor`` that stands for the list; no file of ``conf/monitor`` may have its name."""


def default_monitors() -> list[str]:
    """The names of the monitors that a run has where nobody chooses among them, sorted."""
    names = sorted(path.stem for path in (CONF / "monitor").glob("*.yaml"))
    return [name for name in names if not _of_attached_loops(name)]


def _of_attached_loops(name: str) -> bool:
    try:
        return construct("monitor", name).needs.attached
    except Exception:  # it cannot be built: it stays in the list, and building a run says what is wrong with it
        return False


ConfigStore.instance().store(group="monitor", name=ALL, node={"defaults": default_monitors()})
