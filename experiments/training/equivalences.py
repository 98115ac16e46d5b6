"""Sources that train alike although they read otherwise, as ``python -m experiments.runs adopt`` has found by training.

``results/equivalences.json``: by the digest of newer sources, that of the older ones whose runs they reproduce.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from foreshock.experiments.files import write_whole
from foreshock.experiments.training.source_code import ROOT

EQUIVALENCES = ROOT / "results" / "equivalences.json"


@cache
def _older() -> dict[str, str]:
    return {new: entry["as"] for new, entry in read().items()}


def read() -> dict[str, Any]:
    """By newer digest: ``as``, the older one, and what was trained to find out."""
    return json.loads(EQUIVALENCES.read_text()) if EQUIVALENCES.exists() else {}


def canonical(digest: str) -> str:
    """The oldest digest that sources are known to be equivalent to, their own where none is known."""
    older, seen = _older(), {digest}
    while digest in older and older[digest] not in seen:
        digest = older[digest]
        seen.add(digest)
    return digest


def add(new: str, old: str, evidence: Any) -> None:
    """Enter that sources of digest ``new`` train as those of ``old`` do, whose own equivalence counts."""
    entries = read() | {new: {"as": canonical(old), "evidence": evidence}}
    write_whole(EQUIVALENCES, json.dumps(entries, indent=1, sort_keys=True).encode() + b"\n")
    _older.cache_clear()
