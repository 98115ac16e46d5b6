"""Files and folders that a command line names, held against what a command does with them: a mistake is one line.

Every function takes the path and ``where``, the field that names it, and raises ValueError that begins with
``where='path' is not allowed``. Needs only the standard library.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path


def check_path(path: Path | str, where: str) -> Path:
    """A path that a file system can have and this process can reach, where it is there: no link to nothing."""
    said = str(path)
    if not said.strip():
        raise ValueError(f"{where}={said!r} is not allowed: a path, '.' for the working directory")
    try:
        os.lstat(said)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError:
        raise ValueError(f"{where}={said!r} is not allowed: this process may not look there") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{where}={_short(said)} is not allowed: {str(reason).lower()}") from None
    nearest = _nearest_there(Path(path))
    if nearest.is_symlink() and not os.path.exists(nearest):
        what = "this" if nearest == Path(path) else repr(str(nearest))
        raise ValueError(f"{where}={said!r} is not allowed: {what} is a link to nothing")
    return Path(path)


def check_no_file(path: Path | str, where: str) -> Path:
    """A folder, or what may become one: neither the path nor anything above it is a file."""
    path = check_path(path, where)
    there = _nearest_there(path)
    if not there.is_dir():
        what = "this" if there == path else repr(str(there))
        raise ValueError(f"{where}={str(path)!r} is not allowed: a folder, and {what} is a file")
    return path


def check_folder_to_write(path: Path | str, where: str) -> Path:
    """A folder in which this process may write, or may make it."""
    path = check_no_file(path, where)
    _check_writable(_nearest_there(path), path, where)
    return path


def check_folder_to_read(path: Path | str, where: str) -> Path:
    """A folder that is there and that this process may list."""
    path = check_no_file(path, where)
    if not path.is_dir():
        raise ValueError(f"{where}={str(path)!r} is not allowed: there is no such folder{_beside(path)}")
    _check_readable(path, where, os.R_OK | os.X_OK)
    return path


def check_file_to_read(path: Path | str, where: str) -> Path:
    """A file that is there and that this process may read."""
    path = check_there(path, where)
    if path.is_dir():
        raise ValueError(f"{where}={str(path)!r} is not allowed: a file, and this is a folder")
    return path


def check_there(path: Path | str, where: str) -> Path:
    """A file or a folder that is there and that this process may read."""
    path = check_path(path, where)
    if not path.exists():
        raise ValueError(f"{where}={str(path)!r} is not allowed: there is no such file or folder{_beside(path)}")
    _check_readable(path, where, os.R_OK)
    return path


def check_file_to_write(path: Path | str, where: str) -> Path:
    """A file that this process may write, in a folder that is there or that it may make."""
    path = check_path(path, where)
    if path.is_dir():
        raise ValueError(f"{where}={str(path)!r} is not allowed: a file, and this is a folder")
    above = _nearest_there(path.parent)
    if not above.is_dir():
        raise ValueError(f"{where}={str(path)!r} is not allowed: {str(above)!r} is a file, and no folder to write in")
    _check_writable(above, path, where)
    return path


def _nearest_there(path: Path) -> Path:
    """The path itself, or the nearest one above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))


def _check_writable(folder: Path, path: Path, where: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{where}={str(path)!r} is not allowed: this process may not write in the folder {str(folder)!r}"
        )


def _check_readable(path: Path, where: str, mode: int) -> None:
    if not os.access(path, mode):
        raise ValueError(f"{where}={str(path)!r} is not allowed: this process may not read it")


def _beside(path: Path) -> str:
    """``; the nearest is 'x'``, of what lies in the same folder."""
    try:
        names = sorted(os.listdir(path.parent))
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; the nearest is {str(path.with_name(near[0]))!r}" if near else ""


def _short(said: str) -> str:
    """A path as a message repeats it, cut where it is long."""
    return repr(said if len(said) <= 60 else f"{said[:60]}...")
