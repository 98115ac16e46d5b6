"""What every command shares: configurations checked before Hydra runs, and errors in one line."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.build import ROOT, did_you_mean
from experiments.checkpoint import RunError
from experiments.memory import OutOfMemory
from experiments.pieces import UNFINISHED_CODE, Unfinished
from experiments.trace import TraceError

CONF = str(ROOT / "conf")
USER_ERRORS = (ValueError, OSError, RunError, TraceError, MemoryError, OutOfMemory)
"""Errors that a person can mend: shown in one line. Anything else is a bug and keeps its traceback."""


def _groups() -> set[str]:
    return {path.name for path in Path(CONF).iterdir() if path.is_dir()}


def _explain(error: Exception, config_name: str, overrides: Sequence[str]) -> str:
    """One line for overrides that do not compose, with the nearest option or key where one of them is to blame."""
    chosen = [line for line in overrides if line.split("=")[0] in _groups()]
    for line in chosen:
        group, option = line.split("=", 1)
        known = sorted(path.stem for path in (Path(CONF) / group).glob("*.yaml"))
        for name in option.strip("[]").split(","):
            if name and name not in known:
                return f"{group}={option} is not an option of {group}{did_you_mean(name, known)}"
    config = compose(config_name, overrides=chosen)
    for line in overrides:
        key = line.lstrip("+~").split("=")[0]
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if (
            line not in chosen
            and "/" not in key
            and not line.startswith("+")
            and isinstance(node, DictConfig)
            and leaf not in node
        ):
            known = {str(name) for name in node if name != "_target_"} | (set() if parent else _groups())
            return f"{key} is not a key of the configuration{did_you_mean(leaf, sorted(known))}"
    return " ".join(str(error).split())


def check_overrides(config_name: str, arguments: Sequence[str]) -> None:
    """Compose every combination that the command line asks for. Raises ValueError with one line."""
    lines = [a for a in arguments if "=" in a or a.startswith("~")]  # the rest are Hydra's own flags
    of_hydra = next((line for line in lines if line.lstrip("+").startswith("hydra.") and "_target_" in line), None)
    if of_hydra:
        raise ValueError(f"{of_hydra} is not allowed: Hydra takes no class by name; hydra/launcher=NAME chooses one")
    with initialize_config_dir(CONF, version_base="1.3"):
        try:
            choices = []
            for line, override in zip(lines, OverridesParser.create().parse_overrides(lines), strict=True):
                swept = override.is_sweep_override()
                key = override.get_key_element()
                choices.append([f"{key}={v}" for v in override.sweep_string_iterator()] if swept else [line])
        except HydraException as error:
            raise ValueError(" ".join(str(error).split())) from None
        for combination in itertools.product(*choices):
            try:
                compose(config_name, overrides=list(combination))
            except (HydraException, OmegaConfBaseException) as error:
                raise ValueError(_explain(error, config_name, combination)) from None


def one_line_errors(task: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command's body: a mistake ends it with one line on standard error and exit code 2.

    So does a piece that is over (``train.piece_s``), with exit code 75 and what the same command will do.

    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """

    @functools.wraps(task)
    def wrapped(*arguments: object) -> None:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            task(*arguments)
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
            print("interrupted: the same command resumes from the last checkpoints", file=sys.stderr)
            sys.exit(130)

    return wrapped


def guarded(main: Callable[[], None], config_name: str) -> None:
    """Check the command line's configuration, then run a Hydra command whose body has ``one_line_errors``."""
    if not {"--help", "--hydra-help"} & set(sys.argv):
        one_line_errors(check_overrides)(config_name, sys.argv[1:])
    main()
