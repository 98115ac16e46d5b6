"""What every command shares: configurations checked before Hydra runs, and errors in one line."""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from foreshock.experiments.build import ROOT
from foreshock.experiments.default_monitors import ALL
from foreshock.experiments.multirun import in_multirun, run_job, run_jobs
from foreshock.experiments.overrides import check_choices, check_form, check_merges, why_unread
from foreshock.experiments.pieces import UNFINISHED_CODE, Unfinished
from foreshock.experiments.trace import TraceError
from foreshock.experiments.training.checkpoint import RunError
from foreshock.experiments.training.out_of_memory import OutOfMemory
from foreshock.experiments.training.stopping import Stopped, stoppable
from foreshock.experiments.validation import did_you_mean, nearest
from foreshock.starting import said_of

CONF = str(ROOT / "conf")
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException)
"""What Hydra and OmegaConf raise on overrides that do not compose, and on a value that is not there."""
USER_ERRORS = (ValueError, OSError, RunError, TraceError, MemoryError, OutOfMemory, *COMPOSE_ERRORS)
"""Errors that a person can mend: shown in one line. Anything else is a bug and keeps its traceback."""


def own_folders() -> tuple[Path, ...]:
    """Configuration folders beside conf/, as ``--config-dir`` gives them; none outside a command of Hydra."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ()
    return tuple(Path(s.path) for s in sources if s.schema == "file" and s.provider not in ("hydra", "main"))


def options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """The files of a group by name, in conf/ and in folders of one's own."""
    return sorted({path.stem for folder in (Path(CONF), *folders) for path in (folder / group).glob("*.yaml")})


def _choices_of(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """The options of a group: its files, and ``monitor=all``."""
    return [*options(group, folders), *([ALL] if group == "monitor" else [])]


def _groups(folders: Sequence[Path] = ()) -> set[str]:
    return {path.name for folder in (Path(CONF), *folders) for path in folder.iterdir() if path.is_dir()}


def explain(error: Exception, config_name: str, overrides: Sequence[str], folders: Sequence[Path] = ()) -> str:
    """One line for overrides that do not compose, with the nearest option or key where one of them is to blame.

    folders: of one's own beside conf/.
    """
    groups = _groups(folders)
    chosen = [line for line in overrides if line.split("=")[0] in groups]
    for line in chosen:
        group, option = line.split("=", 1)
        known = _choices_of(group, folders)
        for name in option.strip("[]").split(","):
            if name and name not in known:
                return f"{group}={option} is not an option of {group}{did_you_mean(name, known)}"
    config = compose(config_name, overrides=[*_searched(folders), *chosen])
    for line in overrides:
        key = line.lstrip("+~").split("=")[0]
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if (
            line not in chosen
            and "/" not in key
            and not line.startswith("+")
            and isinstance(node, DictConfig)
            and leaf not in set(node.keys())  # which also lists what has to be given
        ):
            keys = {str(name) for name in node if name != "_target_"} | (set() if parent else groups)
            return f"{key} is not a key of the configuration{did_you_mean(leaf, sorted(keys))}"
    return _first_sentences(error)


def _first_sentences(error: Exception) -> str:
    """What Hydra says in one line, without its search path and its manual; with the cause where it hides one."""
    said = " ".join(str(error).split()).split(" Config search path:")[0].split(" See https://")[0]
    cause = error.__cause__
    return f"{said}: {str(cause).splitlines()[0]}" if cause is not None and str(cause).strip() else said


FLAGS = ("--multirun", "-m", "--run", "-r", "--help", "-h", "--hydra-help", "--version", "--resolve")
VALUED_FLAGS = {
    "--cfg": ("job", "hydra", "all"),
    "-c": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "-i": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--package": None,
    "-p": None,
    "--config-dir": None,
    "-cd": None,
}
"""Flags of Hydra that a command takes, those of the second kind with a value of these (None: any)."""


def flags_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's flags, which are Hydra's, and its overrides. Raises ValueError on what is neither."""
    flags: list[str] = []
    lines: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, given = argument.partition("=")
        if flag in VALUED_FLAGS:
            value = given if equals else next(rest, None)
            allowed = VALUED_FLAGS[flag]
            if value is None or (allowed and value not in allowed):
                said = flag if value is None else f"{flag} {value}"
                raise ValueError(f"{said} is not allowed: {' or '.join(allowed) if allowed else 'a value'}")
            flags += [flag, value]
        elif argument.startswith("-") and argument not in FLAGS:
            raise ValueError(f"{argument} is not a flag of this command{did_you_mean(flag, [*FLAGS, *VALUED_FLAGS])}")
        elif not argument.startswith(("-", "~")) and not equals:
            raise ValueError(f"{argument!r} is not allowed: key=value, or ~key to drop one")
        else:
            (flags if argument.startswith("-") else lines).append(argument)
    return flags, lines


def _choices(line: str, swept: bool) -> list[str]:
    """The overrides that one stands for: several where it lists values. Raises ValueError where it cannot be read."""
    try:
        (override,) = OverridesParser.create().parse_overrides([line])
        if not override.is_sweep_override():
            return [line]
        if not swept:
            raise ValueError(f"{line} lists several values: add -m to run each of them, or write [...] for a list")
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise ValueError(why_unread(line, _first_sentences(error))) from None


def _check_folders(own: Sequence[Path]) -> None:
    """Raises ValueError for a folder that is not there, or with an option that conf/ has too: Hydra would take ours."""
    for folder in own:
        if not folder.is_dir():
            raise ValueError(f"--config-dir={folder} is not allowed: there is no such folder")
        names = (file.relative_to(folder) for file in sorted(folder.rglob("*.yaml")))
        taken = {Path("monitor", f"{ALL}.yaml")}
        twice = next((name for name in names if name in taken or (Path(CONF) / name).exists()), None)
        if twice is not None:
            option = f"{twice.parent}={twice.stem}"
            raise ValueError(f"{folder / twice} is not allowed: {option} is there already; give yours another name")


def _check_additions(config_name: str, lines: Sequence[str], folders: Sequence[Path]) -> None:
    """Raises ValueError for a key added with ``+`` beside those of the configuration: nothing would read it."""
    added = {line.lstrip("+").partition("=")[0] for line in lines if line.startswith("+")}
    roots = {key: re.split(r"[.@/]", key)[0] for key in sorted(added)}
    if not roots:
        return
    known = {str(name) for name in compose(config_name, overrides=_searched(folders))} | _groups(folders) | {"hydra"}
    for key, root in roots.items():
        if root not in known:
            raise ValueError(f"+{key} has no effect: {root} is not a key of the configuration{nearest(root, known)}")


def _searched(folders: Sequence[Path]) -> list[str]:
    """The override that lets Hydra search folders of one's own too."""
    return [f"hydra.searchpath=[{','.join(f'file://{folder.absolute()}' for folder in folders)}]"] if folders else []


def known_roots(config_name: str, groups: Collection[str]) -> list[str]:
    """The groups, and the keys that a configuration's own file has beside them."""
    return sorted({*groups, *map(str, OmegaConf.load(f"{CONF}/{config_name}.yaml"))} - {"defaults"})


def check_overrides(config_name: str, arguments: Sequence[str]) -> None:
    """Compose every combination that the command line asks for. Raises ValueError with one line."""
    swept = bool({"-m", "--multirun"} & set(arguments))
    flags, lines = flags_and_overrides(arguments)
    own = [Path(path) for flag, path in itertools.pairwise(flags) if flag in ("--config-dir", "-cd")]
    _check_folders(own)
    of_hydra = next((line for line in lines if re.match(r"[+~]*hydra\b", line) and "_target_" in line), None)
    if of_hydra:
        raise ValueError(f"{of_hydra} is not allowed: Hydra takes no class by name; hydra/launcher=NAME chooses one")
    groups = {group: _choices_of(group, own) for group in _groups(own)}
    roots = known_roots(config_name, groups)
    for line in lines:
        check_form(line, roots)
    choices = [_choices(line, swept) for line in lines]
    check_choices(itertools.chain.from_iterable(choices), groups)
    with initialize_config_dir(CONF, version_base="1.3"):
        for combination in itertools.product(*choices):
            try:
                config = compose(config_name, overrides=[*_searched(own), *combination])
            except COMPOSE_ERRORS as error:
                raise ValueError(explain(error, config_name, combination, own)) from None
            check_merges(combination, config)
        _check_additions(config_name, lines, own)


def one_line_errors(task: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's body: a mistake ends it with one line on standard error and exit code 2.

    So does a piece that is over (``train.piece_s``), with exit code 75 and what the same command will do, and a signal,
    with 128 and its number. In a job of ``-m`` they end the job alone (``experiments.multirun``).

    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """

    @functools.wraps(task)
    def wrapped(*arguments: object) -> None:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            task(*arguments)
            return
        if in_multirun():
            run_job(task, *arguments, expected=USER_ERRORS)
            return
        try:
            task(*arguments)
        except USER_ERRORS as error:
            print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            sys.exit(2)
        except Unfinished as rest:
            print(f"unfinished: {rest}", file=sys.stderr)
            sys.exit(UNFINISHED_CODE)
        except KeyboardInterrupt:
            print(said_of(signal.SIGINT), file=sys.stderr)
            sys.exit(130)
        except Stopped as stopped:
            print(said_of(stopped.number), file=sys.stderr)
            sys.exit(stopped.exit_code)

    return wrapped


def guarded(main: Callable[[], None], config_name: str) -> None:
    """Check the command line's configuration, then run a Hydra command whose body has ``one_line_errors``."""

    @one_line_errors
    @stoppable()
    def command() -> None:
        if not {"--help", "-h", "--hydra-help"} & set(sys.argv):
            check_overrides(config_name, sys.argv[1:])
            flags, lines = flags_and_overrides(sys.argv[1:])
            sys.argv[1:] = [*flags, *lines]  # Hydra takes no override after a flag that stands behind another
        if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv):
            run_jobs(main)
        else:
            main()

    command()
