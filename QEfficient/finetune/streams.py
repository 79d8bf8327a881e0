# SPDX-License-Identifier: BSD-3-Clause
"""Rows that stay on disk and are read one by one, in any order: for sets larger than memory. Knows no formats and no tokens."""

import csv
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from QEfficient.errors import ConfigError
from QEfficient.finetune.formats import Row
from QEfficient.finetune.sources import (
    decoded_lines,
    kind_of,
    load_function,
    load_table,
    preprocess,
    read_csv,
    read_jsonl,
)


class RowsOnDisk(Protocol):
    """Rows that are found again by number, once all were looked at."""

    def scan(self) -> Iterator[tuple[str, Row]]:
        """Yield every row with its place, and note how to find it again."""

    def read(self, index: int) -> Row:
        """Return one row."""


class FileRows:
    """Rows of a JSONL or CSV file: where each begins takes eight bytes."""

    def __init__(self, path: Path) -> None:
        self._path, self._kind, self._offsets = path, kind_of(path), array("q")
        self._fields: list[str] = []

    def scan(self) -> Iterator[tuple[str, Row]]:
        """Yield every row with its place, and note where it begins."""
        del self._offsets[:]
        rows = read_jsonl(self._path) if self._kind == "jsonl" else read_csv(self._path)
        for offset, where, row in rows:
            self._fields = self._fields or list(row)
            self._offsets.append(offset)
            yield where, row

    def read(self, index: int) -> Row:
        """Return one row."""
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            if self._kind == "jsonl":
                row: Row = json.loads(file.readline().decode("utf-8-sig"))
                return row
            values = next(csv.reader(decoded_lines(file, self._offsets[index]), strict=True))
        return dict(zip(self._fields, values, strict=True))


class TableRows:
    """Rows of a table that the datasets library maps from disk; a Parquet file is first written to its cache as one."""

    def __init__(self, source: str, table: Any) -> None:
        self._source, self._table = source, table

    def scan(self) -> Iterator[tuple[str, Row]]:
        """Yield every row with its place."""
        for number, row in enumerate(self._table, start=1):
            yield f"{self._source}, row {number}", row

    def read(self, index: int) -> Row:
        """Return one row."""
        row: Row = self._table[index]
        return row


class Preprocessed:
    """Rows as the user's function makes them; those for which it returns None take no number."""

    def __init__(self, rows: RowsOnDisk, spec: str) -> None:
        self._rows, self._spec, self._numbers = rows, spec, array("q")
        self._function: Callable[[Row], Any] = load_function(spec)

    def scan(self) -> Iterator[tuple[str, Row]]:
        """Yield what is made of every row, with its place."""
        del self._numbers[:]
        for number, (where, row) in enumerate(self._rows.scan()):
            made = preprocess(self._function, row, where, self._spec)
            if made is not None:
                self._numbers.append(number)
                yield where, made

    def read(self, index: int) -> Row:
        """Return what is made of one row.

        Raises:
            ConfigError: Nothing is made of it any more: the function does not always say the same.
        """
        made = preprocess(self._function, self._rows.read(self._numbers[index]), f"row {index + 1}", self._spec)
        if made is None:
            raise ConfigError(f"{self._spec} returned None for row {index + 1}, which it had taken before")
        return made


def open_rows(path: Path | None, dataset: str | None, split: str, config: str | None, spec: str | None) -> RowsOnDisk:
    """Return the rows of a file or, without one, of a dataset's split, preprocessed if there is a function.

    Raises:
        ConfigError: They cannot be read, or a library is missing.
    """
    rows: RowsOnDisk
    if path is not None and kind_of(path) != "parquet":
        rows = FileRows(path)
    else:
        rows = TableRows(str(path or f"{dataset}[{split}]"), load_table(path or str(dataset), split, config))
    return Preprocessed(rows, spec) if spec else rows
