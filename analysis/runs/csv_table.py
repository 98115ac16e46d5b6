"""A CSV file of someone else's: a table, or one line that names the file and what is wrong with it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pandas as pd


def read_table(path: Path, where: str, columns: Sequence[str], text: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of a CSV file in UTF-8. Raises ValueError, in one line that begins with ``where``, where it is none.

    where: the file as its option names it; columns: that it must have; text: columns that are read as they are written.
    """
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(text, str), encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{where} does not exist") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{where} is no CSV in UTF-8: it holds other bytes") from None
    except pd.errors.EmptyDataError:
        raise ValueError(f"{where} is empty: a CSV with columns {', '.join(columns)} is needed") from None
    except (ValueError, csv.Error) as error:  # pandas' parser raises a kind of the first
        raise ValueError(f"{where} is no CSV: {' '.join(str(error).split())}") from None
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{where} has no column {missing[0]!r}: {', '.join(columns)}")
    return table
