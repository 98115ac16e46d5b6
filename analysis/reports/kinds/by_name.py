"""Kinds of reports by the names of their files in ``conf/report_kind``, which an experiment's key ``draw`` gives.

A kind from a folder of one's own is recorded in the experiment's index, ``experiment.json``: its file's content in
``report_kind``, and in ``plugins`` the modules that its class comes from. So ``analysis.report`` draws it again without
the folder, where the command names these modules: a data file imports none by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.runs.conf import Conf, construct
from foreshock.experiments.validation import check_named

GROUP, PLUGINS = "report_kind", "plugins"
"""The folder of the files, and a key of an index; the first is a key of it too."""

CASES = "cases"
"""The kind of an experiment whose runs are judged each by itself: ``reports.cases`` makes its report."""

KINDS = {name: Conf().made(GROUP, name, (Kind,)) for name in Conf().files(GROUP)}
"""The project's own."""

DRAWINGS = (*KINDS, CASES)
"""What the key ``draw`` of an experiment of the project may be."""


def kind_named(name: Any, conf: Conf) -> Kind:
    """The kind of a name. Raises ValueError where there is none, or its file makes none."""
    check_named([name], conf.files(GROUP), "experiment.draw")
    return conf.made(GROUP, name, (Kind,))


def recorded(name: str, conf: Conf) -> dict[str, Any]:
    """What an index keeps of a kind from a folder of one's own; nothing of the project's."""
    if name in KINDS or name == CASES:
        return {}
    return {GROUP: conf.content(GROUP, name), PLUGINS: list(conf.plugins)}


def kind_of(index: Mapping[str, Any], conf: Conf | None = None) -> Kind:
    """The kind of report that an experiment's index asks for: of ``conf`` where that has one, else as recorded there.

    Raises ValueError where there is none of that name.
    """
    name, conf = index["experiment"]["draw"], conf or Conf()
    if GROUP in index and name not in conf.files(GROUP):
        named = [str(module) for module in index.get(PLUGINS, ())]
        if not set(named) <= set(conf.plugins):
            raise ValueError(
                f"{GROUP}.{name} of this index is a class of plugins=[{','.join(named)}]: a file imports no modules "
                "by itself; add that to the command if you trust them"
            )
        return construct(index[GROUP], f"{GROUP}.{name}", (Kind,), conf.plugins)
    return kind_named(name, conf)
