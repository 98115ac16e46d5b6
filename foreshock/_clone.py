"""In a clone the folders are importable by themselves too: ``import faults.base`` gives ``foreshock.faults.base``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType

from foreshock.names import FOLDERS


def is_clone(root: Path) -> bool:
    """Whether a folder is a clone of the project, and not where packages are installed."""
    return (root / "pyproject.toml").is_file() and all((root / folder / "__init__.py").is_file() for folder in FOLDERS)


class _OneName(MetaPathFinder, Loader):
    """Finds ``faults.base`` as the module ``foreshock.faults.base``, which is loaded once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.split(".")[0] not in FOLDERS:
            return None
        own = find_spec(f"foreshock.{name}")
        if own is None:
            return None
        spec = ModuleSpec(name, self, origin=own.origin, is_package=own.submodule_search_locations is not None)
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"foreshock.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It is executed already; importlib has just given it the other name's specification."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state

    def get_code(self, name: str) -> CodeType | None:
        """For ``python -m``."""
        spec = find_spec(f"foreshock.{name}")
        loader = None if spec is None else spec.loader
        return loader.get_code(f"foreshock.{name}") if isinstance(loader, InspectLoader) else None


def one_name() -> None:
    """Let both names mean one module from now on."""
    if not any(isinstance(finder, _OneName) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OneName())
