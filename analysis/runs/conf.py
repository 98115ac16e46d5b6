"""Files of ``conf/``, and of folders of one's own beside it, for what is scored without Hydra."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from foreshock.experiments.targets import check_plugins, check_targets, target_class
from foreshock.experiments.validation import called, check_arguments, check_mapping, check_named, parameters_of

CONF = Path(__file__).resolve().parents[2] / "conf"

Made = TypeVar("Made")


@dataclass(frozen=True)
class Conf:
    """``conf/`` with what one adds: folders that are laid out as it is, and modules that their files may name.

    folders: such as ``--config-dir`` gives; plugins: modules outside the project whose classes a ``_target_`` may name.
    Raises ValueError where a folder is not there, and for plugins that are no distinct names of modules.
    """

    folders: tuple[Path, ...] = ()
    plugins: Sequence[str] = ()

    def __post_init__(self) -> None:
        missing = next((folder for folder in self.folders if not folder.is_dir()), None)
        if missing is not None:
            raise ValueError(f"--config-dir={missing} is not allowed: there is no such folder")
        check_plugins(self.plugins)

    def files(self, group: str) -> dict[str, Path]:
        """The files of a group by name, the project's own first. Raises ValueError where two have one name."""
        files: dict[str, Path] = {}
        for folder in (CONF, *self.folders):
            for file in sorted((folder / group).glob("*.yaml")):
                other = files.setdefault(file.stem, file)
                if other != file:
                    raise ValueError(f"{group}={file.stem} is there twice, {other} and {file}: give yours another name")
        return files

    def content(self, group: str, name: str) -> dict[str, Any]:
        """A plain file. Raises ValueError where there is none, naming those that are."""
        files = self.files(group)
        check_named([name], sorted(files), group)
        try:
            content: Any = OmegaConf.to_container(OmegaConf.load(files[name]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{files[name]} is no YAML file: {' '.join(str(error).split())}") from None
        check_mapping(content, f"{group}.{name}")
        return content

    def made(self, group: str, name: str, bases: tuple[type[Made], ...]) -> Made:
        """The object that a file describes, which is called by the file's name (``construct``)."""
        return construct(self.content(group, name), f"{group}.{name}", bases, self.plugins)


def own_conf(arguments: Sequence[str]) -> tuple[Conf, list[str]]:
    """What a command line says of files of one's own, and its other arguments, in order.

    ``--config-dir DIR``, ``--config-dir=DIR`` or ``config_dir=DIR``, each as often as wanted, and ``plugins=[a,b]``.
    Raises ValueError as ``Conf`` does, and for a folder that is not named.
    """
    folders: list[Path] = []
    plugins: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, _, value = argument.partition("=")
        if key in ("--config-dir", "config_dir"):
            folder = value or (next(rest, "") if argument == "--config-dir" else "")
            if not folder:
                raise ValueError(f"{key} is not allowed without a folder: {key}=DIR")
            folders.append(Path(folder))
        elif key == "plugins":
            plugins += [name.strip() for name in value.strip("[]").split(",")] if value.strip("[]") else []
        else:
            others.append(argument)
    return Conf(tuple(folders), tuple(plugins)), others


def conf(group: str, name: str) -> dict[str, Any]:
    """A plain file of the project's ``conf/``. Raises ValueError where there is none, naming those that are."""
    return Conf().content(group, name)


def experiment_named(name: str) -> dict[str, Any]:
    """An experiment of the project as Hydra composes it at its default scale, its references left as they stand.

    Monitors are no part of it: ``monitor=all`` is there only where runs are built (``experiments.default_monitors``).
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("reproduce", overrides=[f"experiment={name}", "~monitor"])
    content: Any = OmegaConf.to_container(composed.experiment, resolve=False)
    return content


def construct(node: Mapping[str, Any], where: str, bases: tuple[type[Made], ...], plugins: Sequence[str] = ()) -> Made:
    """The object of a node: its class, in ``_target_``, is given its name and the node's other keys.

    where: ``group.name``; bases: one of them is a base of the class, which is checked before the class is called.
    Raises ValueError in one line that names group, name and key.
    """
    group, _, name = where.partition(".")
    if "_target_" not in node:
        raise ValueError(f"{where} names no _target_ class")
    check_targets({group: {name: dict(node)}}, plugins)
    cls = target_class(node["_target_"], f"{where}._target_")
    _check_base(cls, f"{where}._target_={node['_target_']!r}", bases)
    parameters = {key: parameter for key, parameter in parameters_of(cls).items() if key != "name"}
    given = {key: value for key, value in node.items() if key != "_target_"}
    checked = check_arguments(cls.__name__, parameters, given, where)
    return called(lambda: cls(name=name, **checked), where, parameters)


def _check_base(cls: type, where: str, bases: tuple[type, ...]) -> None:
    """Raises ValueError for a class that is derived from none of the bases, or lacks a method that they ask for."""
    if not issubclass(cls, bases):
        wanted = " or ".join(base.__name__ for base in bases)
        raise ValueError(f"{where} is not allowed: a class derived from {wanted} is needed")
    lacking = [name for name, member in inspect.getmembers(cls) if getattr(member, "__isabstractmethod__", False)]
    if lacking:
        raise ValueError(f"{where} is not allowed: it has no {', '.join(lacking)}")
