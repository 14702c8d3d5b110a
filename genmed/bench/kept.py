"""Rows of a benchmark in a CSV file, so that a run that starts again goes on after the last one."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from genmed.errors import GenMedError
from genmed.files import write_bytes

T = TypeVar("T")
R = TypeVar("R", bound=NamedTuple)


def write_rows(path: Path, kind: type[R], rows: Iterable[R]) -> None:
    """`write_table` of rows of one kind, a column for each of its fields, which hold text and numbers."""
    write_table(path, kind._fields, rows)


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """What `write_rows` wrote, in the types of the fields; as `read_table`."""
    types = get_type_hints(kind)
    return read_table(path, kind._fields, lambda entries: kind(*(types[name](entries[name]) for name in types)))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """The whole file, replaced at once, so that a kill leaves the last one or this one; floats to the last digit."""
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    write_bytes(path, table.getvalue().encode("utf-8"))


def read_table(path: Path, columns: Sequence[str], parse: Callable[[Mapping[str, str]], T]) -> list[T]:
    """What `write_table` wrote, every row by `parse`, which gets the texts by column; nothing without a file.

    Raises:
        GenMedError: for a file with other columns, or with rows that `parse` raises `ValueError` for.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        if header != list(columns):
            raise ValueError("other columns")
        return [parse(dict(zip(columns, line, strict=True))) for line in lines]
    except (ValueError, csv.Error) as error:
        raise GenMedError(f"{path}: is no table of this benchmark and data set; use another --out.") from error


def key_of(*parts: Any) -> str:
    """What decides a row besides the case: 16 digits that change with the weights and settings given as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
