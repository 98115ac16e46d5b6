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
from experiments.loop import RunError
from experiments.trace import TraceError

CONF = str(ROOT / "conf")
USER_ERRORS = (ValueError, OSError, RunError, TraceError, MemoryError)
"""Errors that a person can mend: shown in one line. Anything else is a bug and keeps its traceback."""


def _explain(error: Exception, config_name: str, override: Sequence[str]) -> str:
    """One line for a configuration that does not compose, with the nearest known key or option."""
    text = str(error).strip()
    first = text.splitlines()[0]
    for line in override:
        key = line.lstrip("+~").split("=")[0]
        if f"'{key}'" not in text and f"{key}/" not in text and key not in first:
            continue
        group = ROOT / "conf" / key
        if group.is_dir() and "=" in line:
            known = sorted(path.stem for path in group.glob("*.yaml"))
            value = line.split("=", 1)[1]
            if value not in known:
                return f"{key}={value} is not an option of {key}{did_you_mean(value, known)}"
        parent, _, leaf = key.rpartition(".")
        others = [o for o in override if o != line and (ROOT / "conf" / o.split("=")[0]).is_dir()]
        config = OmegaConf.create(compose(config_name, overrides=others))
        node = OmegaConf.select(config, parent) if parent else config
        if isinstance(node, DictConfig) and leaf not in node:
            known = sorted(
                {str(k) for k in node} | ({p.name for p in Path(CONF).iterdir() if p.is_dir()} if not parent else set())
            )
            return f"{key} is not a key of the configuration{did_you_mean(leaf, known)}"
    return " ".join(text.split())


def check_overrides(config_name: str, arguments: Sequence[str]) -> None:
    """Compose every combination that the command line asks for. Raises ValueError with one line."""
    lines = [a for a in arguments if not a.startswith("-")]
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
        except KeyboardInterrupt:
            print("interrupted: the same command resumes from the last checkpoints", file=sys.stderr)
            sys.exit(130)

    return wrapped


def guarded(main: Callable[[], None], config_name: str) -> None:
    """Check the command line's configuration, then run a Hydra command whose body has ``one_line_errors``."""
    if not {"--help", "--hydra-help"} & set(sys.argv):
        one_line_errors(check_overrides)(config_name, sys.argv[1:])
    main()
