"""Files of rows: parquet, JSON lines, TSV; streamed or read at random within a budget of memory.

Parquet is decoded in small batches, page by page. Writers put 1,024 rows on a page, and as many
images in a dictionary before they give it up: a reader holds about three times that. A row group is
the smallest part that can be read by itself: groups stay in an LRU with a limit of bytes, and a
group that is too large for it (data frames are often written as one) is unpacked once into an
unlinked temporary file. JSON lines are found by sparse byte offsets, the rows of a TSV, which are
long, by an offset each.
"""

from __future__ import annotations

import bisect
import csv
import glob
import json
import os
import shutil
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.pictures import BadRow
from trainer.types import TrainingError

_BATCH_BYTES = 8 * 2**20
_PIECE_BYTES = 2**20
"""Of an unpacked group: what is read for one row."""
_STRIDE = 64 * 2**10
"""Bytes between remembered offsets of a file of JSON lines."""
MAX_LINE = 256 * 2**20
"""Bytes of a line of JSON."""

Row = dict[str, Any]


class DataError(ValueError, TrainingError):
    """Data that cannot be used at all: the message names the file, the place and the mend."""


class Source(Protocol):
    """A file of rows. Row numbers count from 0."""

    path: Path
    columns: dict[str, str]
    """Name -> type, in words."""

    def __len__(self) -> int: ...

    def stream(self, columns: Sequence[str], start: int = 0) -> Iterator[Row | BadRow]:
        """Every row from number `start` on, in order; BadRow in place of one that is none."""

    def read(self, number: int, columns: Sequence[str]) -> Row:
        """One row. Raises BadRow."""


def find_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files, folders (searched through for .parquet, .jsonl and .tsv) and globs -> files, each
    once; what a folder or a glob holds comes in the order of its names.

    Raises DataError for a path that holds nothing and for a file of another kind.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    files: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.suffix in _KINDS and not file.name.startswith((".", "_"))
            )
        else:
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
            found = [file for file in found if file.is_file()]
        if not found:
            raise DataError(
                f"{given}: no such file, or a folder or pattern without {', '.join(_KINDS)}"
            )
        files += found
    for file in files:
        if file.suffix not in _KINDS:
            raise DataError(f"{file}: data files end in {', '.join(_KINDS)}, not {file.suffix!r}")
    return list(dict.fromkeys(file.resolve() for file in files))


def open_source(path: Path, cache: Cache) -> Source:
    """Raises DataError for a file that cannot be read."""
    return _KINDS[path.suffix](path, cache)


class Cache:
    """Row groups kept in memory, least recently used first out; larger ones lie in a file."""

    def __init__(self, max_bytes: int = 256 * 2**20, folder: Path | None = None):
        """max_bytes: of all groups in memory. A group of more than a quarter of it is unpacked to
        `folder` (None: the system's folder for temporary files)."""
        self.max_bytes = max_bytes
        self.folder = Path(folder or tempfile.gettempdir())
        self._groups: OrderedDict[Any, tuple[pa.Table, int]] = OrderedDict()
        self._unpacked: dict[Any, _Unpacked] = {}
        self._file: Any = None
        self.bytes = 0
        self.misses = 0

    def row(
        self, key: Any, number: int, size: int, batches: Callable[[], Iterator[pa.RecordBatch]]
    ) -> Row:
        """Row `number` of group `key` of `size` bytes; `batches()` decodes the group."""
        if size > self.max_bytes // 4:
            if key not in self._unpacked:
                self.misses += 1
                self._unpacked[key] = self._unpack(size, batches())
            return self._unpacked[key].row(self._file, number)
        if key not in self._groups:
            self.misses += 1
            table = pa.Table.from_batches(list(batches()))
            size = table.get_total_buffer_size()
            self._groups[key] = (table, size)
            self.bytes += size
            while self.bytes > self.max_bytes and len(self._groups) > 1:
                self.bytes -= self._groups.popitem(last=False)[1][1]
        self._groups.move_to_end(key)
        return _row(self._groups[key][0], number)

    def _unpack(self, size: int, batches: Iterator[pa.RecordBatch]) -> _Unpacked:
        free = shutil.disk_usage(self.folder).free
        if free < 1.1 * size:
            raise DataError(
                f"a row group of {size:,} bytes must be unpacked for random access, but "
                f"{self.folder} has {free:,} bytes free; name another folder, or write the file "
                "again with row groups of at most 64 MB"
            )
        if self._file is None:  # has no name: it is gone with the process, however that ends
            self._file = tempfile.TemporaryFile(dir=self.folder)
        # Read in pieces, not mapped: what is mapped counts as the process's memory once touched.
        group = _Unpacked([0], [self._file.seek(0, os.SEEK_END)])
        for batch in batches:
            group.schema = batch.schema
            step = max(1, _PIECE_BYTES * batch.num_rows // max(batch.nbytes, 1))
            for start in range(0, batch.num_rows, step):
                piece = batch.slice(start, step)
                self._file.write(piece.serialize())
                group.starts.append(group.starts[-1] + piece.num_rows)
                group.offsets.append(self._file.tell())
        return group


@dataclass
class _Unpacked:
    """Where the pieces of a row group lie in the file of unpacked groups."""

    starts: list[int]
    """First row of each piece, and the number of rows."""
    offsets: list[int]
    schema: pa.Schema | None = None

    def row(self, file: Any, number: int) -> Row:
        piece = bisect.bisect_right(self.starts, number) - 1
        first, last = self.offsets[piece : piece + 2]
        file.seek(first)
        batch = pa.ipc.read_record_batch(pa.py_buffer(file.read(last - first)), self.schema)
        return _row(batch, number - self.starts[piece])


class _Stamp:
    """A file's size and time of change. Rows are found by what its first reading told."""

    def __init__(self, path: Path):
        self.path, self.was = path, self._now(path)

    @staticmethod
    def _now(path: Path) -> tuple[int, int]:
        try:
            about = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        return about.st_size, about.st_mtime_ns

    def check(self) -> None:
        """Raises DataError where the file has changed."""
        if self._now(self.path) != self.was:
            raise DataError(f"{self.path} has changed since it was opened; open it again")


class ParquetRows:
    def __init__(self, path: Path, cache: Cache):
        self.path, self._cache = path, cache
        self._stamp = _Stamp(path)
        try:
            with pq.ParquetFile(path) as file:
                self._metadata = file.metadata
                schema = file.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{path} ({self._stamp.was[0]:,} bytes) is no parquet file or was cut short: "
                f"{_said(error)}"
            ) from None
        self.columns = {field.name: str(field.type) for field in schema}
        groups = range(self._metadata.num_row_groups)
        self._starts = [0]
        for group in groups:
            self._starts.append(self._starts[-1] + self._metadata.row_group(group).num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def stream(self, columns: Sequence[str], start: int = 0) -> Iterator[Row | BadRow]:
        number = bisect.bisect_right(self._starts, start) - 1
        for group in range(number, len(self._starts) - 1):
            place = self._starts[group]
            for batch in self._batches(group, columns):
                skip = min(max(start - place, 0), batch.num_rows)
                place += batch.num_rows
                for row in range(skip, batch.num_rows):
                    try:
                        yield _row(batch, row)
                    except BadRow as bad:
                        yield bad

    def read(self, number: int, columns: Sequence[str]) -> Row:
        group = bisect.bisect_right(self._starts, number) - 1
        return self._cache.row(
            (self.path, group, tuple(columns)),
            number - self._starts[group],
            self._bytes(group, columns),
            lambda: self._batches(group, columns),
        )

    def _bytes(self, group: int, columns: Sequence[str]) -> int:
        """Decompressed size of these columns of a row group."""
        about = self._metadata.row_group(group)
        parts = map(about.column, range(about.num_columns))
        return sum(
            part.total_uncompressed_size
            for part in parts
            if part.path_in_schema.split(".")[0] in columns
        )

    def _batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        self._stamp.check()
        rows = self._starts[group + 1] - self._starts[group]
        mean = self._bytes(group, columns) / max(rows, 1)
        size = int(min(1024, max(1, _BATCH_BYTES // max(mean, 1))))
        try:
            # Buffered and unthreaded: pages are read one after another, not whole columns.
            with pq.ParquetFile(
                self.path, metadata=self._metadata, pre_buffer=False, buffer_size=2**20
            ) as file:
                read = 0
                for batch in file.iter_batches(
                    size, row_groups=[group], columns=list(columns), use_threads=False
                ):
                    read += batch.num_rows
                    yield _plain(batch)
            if read != rows:
                raise pa.ArrowInvalid(f"{read} rows where the footer says {rows}")
            pa.default_memory_pool().release_unused()  # pages of a group are large
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: row group {group} (rows {self._starts[group]} to "
                f"{self._starts[group + 1] - 1}) cannot be read: {_said(error)}"
            ) from None


def _row(table: pa.Table | pa.RecordBatch, number: int) -> Row:
    """One row at a time: a batch as Python objects would be held twice."""
    try:
        return table.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise BadRow("bad_text", f"a string is not UTF-8: {error}") from None


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Without dictionaries, which cannot change within a file."""
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


class JSONLines:
    """Lines that are empty are no rows. The file is read through once to find the others."""

    def __init__(self, path: Path, cache: Cache):
        self.path = path
        self._stamp = _Stamp(path)
        self._numbers, self._offsets = array("Q"), array("Q")
        self._count, offset, marked = 0, 0, -_STRIDE
        names: dict[str, str] = {}
        try:
            with path.open("rb") as file:
                for line in self._lines(file):
                    if line.strip():
                        if self._count < 20:
                            for name, kind in _names(line).items():
                                if names.get(name, "null") == "null":
                                    names[name] = kind
                        if offset - marked >= _STRIDE:
                            self._numbers.append(self._count)
                            self._offsets.append(offset)
                            marked = offset
                        self._count += 1
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        self.columns = names

    def __len__(self) -> int:
        return self._count

    def _lines(self, file) -> Iterator[bytes]:
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise DataError(
                    f"{self.path}: the line before byte {file.tell():,} has more than "
                    f"{MAX_LINE:,} bytes; is it JSON lines, one object a line?"
                )
            yield line

    def stream(self, columns: Sequence[str], start: int = 0) -> Iterator[Row | BadRow]:
        if start >= self._count:
            return
        self._stamp.check()
        mark = bisect.bisect_right(self._numbers, start) - 1
        number, offset = self._numbers[mark], self._offsets[mark]
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                for line in self._lines(file):
                    if line.strip():
                        if number >= start:
                            yield _parse(line, offset, columns)
                        number += 1
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{self.path}: byte {offset:,} cannot be read: {error}") from None

    def read(self, number: int, columns: Sequence[str]) -> Row:
        row = next(self.stream(columns, number))
        if isinstance(row, BadRow):
            raise row
        return row


class TSVRows:
    """Tab-separated values under a line of names, quoted as `csv` and pandas do; a quoted value may
    have line breaks in it. Every value is text, and an empty one is null. The file is read through
    once to find where rows begin."""

    def __init__(self, path: Path, cache: Cache):
        self.path = path
        self._stamp = _Stamp(path)
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
        self._offsets = array("Q")
        try:
            records = self._records(0)
            _, self._names = next(records, (0, []))
            for offset, _ in records:
                self._offsets.append(offset)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        if len(set(self._names)) < len(self._names):
            raise DataError(f"{path}: two columns have one name: {', '.join(self._names)[:200]}")
        self.columns = dict.fromkeys(self._names, "string")

    def __len__(self) -> int:
        return len(self._offsets)

    def _records(self, offset: int) -> Iterator[tuple[int, list[str]]]:
        """(byte at which it begins, its values) of every record from `offset` on; empty lines are
        none."""
        with self.path.open("rb") as file:
            file.seek(offset)
            at = offset

            def lines() -> Iterator[str]:
                nonlocal at
                while line := file.readline(MAX_LINE + 1):
                    if len(line) > MAX_LINE:
                        raise DataError(f"{self.path}: a line has more than {MAX_LINE:,} bytes")
                    at += len(line)
                    # What is not UTF-8 cannot be encoded again, which is found in its column.
                    yield line.decode(
                        "utf-8-sig" if at == len(line) else "utf-8", "surrogateescape"
                    )

            reader = csv.reader(lines(), delimiter="\t")
            while True:
                start = at
                try:
                    values = next(reader, None)
                except csv.Error as error:
                    raise DataError(
                        f"{self.path}: the row at byte {start:,} is no TSV: {_said(error)}"
                    ) from None
                if values is None:
                    return
                if values:
                    yield start, values

    def stream(self, columns: Sequence[str], start: int = 0) -> Iterator[Row | BadRow]:
        if start >= len(self):
            return
        self._stamp.check()
        try:
            for offset, values in self._records(self._offsets[start]):
                if len(values) != len(self._names):
                    yield BadRow(
                        "wrong_type",
                        f"the row at byte {offset:,} has {len(values)} values for "
                        f"{len(self._names)} columns",
                    )
                    continue
                row = dict(zip(self._names, values, strict=True))
                yield {name: row.get(name) or None for name in columns}
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from None

    def read(self, number: int, columns: Sequence[str]) -> Row:
        row = next(self.stream(columns, number))
        if isinstance(row, BadRow):
            raise row
        return row


_KINDS = {".parquet": ParquetRows, ".jsonl": JSONLines, ".tsv": TSVRows}


def decode_json(text: str | bytes, *, strict: bool = True) -> Any:
    """JSON. strict: without NaN and Infinity, which JSON has not. Raises BadRow."""
    try:
        return json.loads(text, parse_constant=_constant if strict else None)
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRow("not_json", f"{_said(error)} in {text[:60]!r}") from None


def _constant(name: str):
    raise BadRow("not_a_number", f"{name} in JSON")


def _parse(line: bytes, offset: int, columns: Sequence[str]) -> Row | BadRow:
    try:
        # Python writes NaN into JSON; in a column that is read it is found there.
        row = decode_json(line, strict=False)
        if not isinstance(row, dict):
            raise BadRow("not_json", f"{type(row).__name__}, not an object")
        return {name: row.get(name) for name in columns}
    except BadRow as bad:
        end = "" if line.endswith(b"\n") else ", the file's last, without an end of line"
        return BadRow(bad.reason, f"the line at byte {offset:,}{end}: {bad.detail}")


def _names(line: bytes) -> dict[str, str]:
    try:
        row = decode_json(line, strict=False)
    except BadRow:
        return {}
    if not isinstance(row, dict):
        return {}
    kinds = {str: "string", list: "list", dict: "object", bool: "bool", type(None): "null"}
    return {name: kinds.get(type(value), "number") for name, value in row.items()}


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
