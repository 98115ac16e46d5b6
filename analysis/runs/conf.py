"""Plain files of ``conf/``, for what is scored without Hydra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"


def conf(group: str, name: str) -> dict[str, Any]:
    """A plain file of conf/. Raises ValueError where there is none, naming those that are."""
    known = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    if name not in known:
        raise ValueError(f"{group}={name} is not allowed: one of {', '.join(known)}")
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    return content
