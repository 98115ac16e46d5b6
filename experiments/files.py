"""Files that a kill leaves whole and that a flipped bit gives away. Needs only the standard library.

A file is written under another name and renamed into place. What it held is known by its SHA-256, which stands in
another file or, in a sealed JSON file, in the file's own first line, over all bytes that follow that line:
``tail -n +2 manifest.json | sha256sum``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, never a piece."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sha256(data: bytes) -> str:
    """Its SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()


def damage(path: Path, expected: str) -> str | None:
    """What is wrong with a file that should have the SHA-256 ``expected``, or None. Raises OSError if unreadable."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    return None if found == expected else "does not match its SHA-256"


def read_checked(path: Path, expected: str) -> bytes:
    """A file's content. Raises ValueError where it is missing or its SHA-256 is not ``expected``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError("is missing") from None
    if sha256(data) != expected:
        raise ValueError("does not match its SHA-256")
    return data


def sealed(content: Mapping[str, Any], sort_keys: bool = False) -> bytes:
    """A non-empty mapping as JSON, with the SHA-256 of all other lines in the first one."""
    body = json.dumps(content, indent=1, sort_keys=sort_keys).encode()[2:] + b"\n"  # without "{" and its newline
    return b'{"sha256": "%s",\n%s' % (sha256(body).encode(), body)


def unsealed(data: bytes) -> dict[str, Any]:
    """The content of a JSON file, sealed or, as older ones are, without a seal.

    Raises ValueError where it is no JSON object or does not match its seal.
    """
    first, _, body = data.partition(b"\n")
    if first.endswith(b","):  # no other JSON object of ours has a key in its first line and more lines after it
        seal = re.fullmatch(rb'\{"sha256": "([0-9a-f]{64})",', first)
        if seal is None or sha256(body) != seal[1].decode():
            raise ValueError("does not match its SHA-256")
        data = b"{" + body
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("is no JSON object")
    return content
