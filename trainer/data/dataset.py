"""Datasets: files of one kind, every row checked once, each bad one accounted for.

Opening a dataset reads its files through once. What is kept is small: a bit a row for whether it is
good, its id's hash (8 bytes) and its kind (2 bytes). Rows are then read in the order of the files,
or at random.
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from trainer.data.examples import Conversation, Example
from trainer.data.layouts import find_layout, read_row
from trainer.data.order import RowSet
from trainer.data.pictures import BadRow, Reason
from trainer.data.sources import Cache, DataError, find_files, open_source
from trainer.images import ImageLimits

_EXAMPLES = 3
"""Rows of each reason that a summary shows."""
_DETAILS = 100
"""Rows of each reason whose details are kept."""


@dataclass(frozen=True)
class Checks:
    max_bad: float = 0.05
    """Share of rows that may be bad; past it opening the dataset is an error."""
    pixels: bool = False
    """Whether opening decodes every picture. Without, headers and a PNG's checksums are read, and
    damage further inside is found on access."""
    ids: Literal["stated", "content"] = "stated"
    """content: every id is a hash of the row's content, whatever id the row states; for files whose
    ids are not unique."""
    pictures: ImageLimits = ImageLimits()


@dataclass(frozen=True)
class Rejected:
    """A row that is not used."""

    row: int
    """Its number in the whole dataset, from 0."""
    reason: Reason
    detail: str
    """"" where a hundred others of the reason have theirs."""


class Rejections:
    """Every row that is not used: all row numbers and reasons, and some details."""

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()
        self._rows, self._reasons = array("Q"), array("B")
        self._names: list[Reason] = []
        self._details: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Rejected]:
        for row, reason in zip(self._rows, self._reasons, strict=True):
            yield Rejected(row, self._names[reason], self._details.get(row, ""))

    def add(self, row: int, bad: BadRow) -> None:
        if bad.reason not in self._names:
            self._names.append(bad.reason)
        self._rows.append(row)
        self._reasons.append(self._names.index(bad.reason))
        self.counts[bad.reason] += 1
        if self.counts[bad.reason] <= _DETAILS:
            self._details[row] = bad.detail


class Dataset:
    """Rows of one or more files: Examples, or Conversations.

    data = Dataset("metis-rl/*.parquet")
    for example in data: ...                # streams; good rows alone
    data[data.good[permute(3, len(data), seed=0)]]
    print(data.summary())
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        layout: str | None = None,
        checks: Checks | None = None,
        cache_bytes: int = 256 * 2**20,
        folder: str | Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """paths: files, folders and globs. layout: see trainer.data.layouts (None: by the columns).
        cache_bytes: of row groups in memory. folder: where row groups that are too large for it are
        unpacked. progress: called with rows read and rows in all.

        Raises DataError for files that cannot be read or are of no known layout, and for too many
        bad rows.
        """
        self.checks = checks or Checks()
        self.cache = Cache(cache_bytes, None if folder is None else Path(folder))
        self.sources = [open_source(path, self.cache) for path in find_files(paths)]
        self.layouts = [find_layout(s.columns, layout, str(s.path)) for s in self.sources]
        self._columns = [
            [name for name in found.columns if name in source.columns]
            for source, found in zip(self.sources, self.layouts, strict=True)
        ]
        self.yields = self.layouts[0].yields
        for source, found in zip(self.sources, self.layouts, strict=True):
            if found.yields != self.yields:
                raise DataError(
                    f"{source.path} holds {found.yields} ({found.name}), but "
                    f"{self.sources[0].path} holds {self.yields}; read them apart"
                )
        self._starts = [0]
        for source in self.sources:
            self._starts.append(self._starts[-1] + len(source))
        self.rows = self._starts[-1]
        if not self.rows:
            raise DataError(f"there is no row in {', '.join(str(s.path) for s in self.sources)}")
        self.rejections = Rejections()
        self.damaged: set[int] = set()
        """Rows that passed the checks and turned out to be unusable when they were used."""
        self.kinds: list[str] = []
        """The kinds of row, by name."""
        self.kind = np.zeros(self.rows, np.uint16)
        """[rows] number of each row's kind in `kinds`."""
        self.hash = np.zeros(self.rows, np.uint64)
        """[rows] hash of each good row's id."""
        self.good = self._scan(progress)

    def __len__(self) -> int:
        """Good rows."""
        return len(self.good)

    def __iter__(self) -> Iterator[Example | Conversation]:
        """The good rows in the order of the files."""
        for row, item in self._read_all():
            if row in self.good:
                yield item

    def __getitem__(self, row: int) -> Example | Conversation:
        """Row number `row` of all rows, bad ones counted; `good` holds the numbers of the others.
        Raises BadRow for a bad one."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        which = bisect.bisect_right(self._starts, row) - 1
        values = self.sources[which].read(row - self._starts[which], self._columns[which])
        return self._read(which, values)

    def where(self, row: int) -> str:
        """File and row in the file, for people."""
        which = bisect.bisect_right(self._starts, row) - 1
        return f"{self.sources[which].path.name} row {row - self._starts[which]}"

    def reject(self, row: int, bad: BadRow) -> None:
        """Notes a bad row. Raises DataError where there are too many."""
        self.rejections.add(row, bad)
        chosen = self.rejections.counts["in_heldout"]
        if len(self.rejections) - chosen > self.checks.max_bad * self.rows:
            raise DataError(
                f"more than {self.checks.max_bad:.1%} of {self.rows:,} rows are bad "
                f"(max_bad):\n{self.summary()}"
            )

    def summary(self) -> str:
        """How many rows are used, and of the others how many for which reason, with examples."""
        bad = self.rejections
        names = ", ".join(dict.fromkeys(found.name for found in self.layouts))
        lines = [
            f"{self.rows:,} rows in {len(self.sources)} files ({names}), {len(bad):,} rejected"
        ]
        shown: Counter[str] = Counter()
        for reason, count in bad.counts.most_common():
            lines.append(f"  {reason}: {count:,}")
            for one in bad:
                if one.reason == reason and shown[reason] < _EXAMPLES:
                    shown[reason] += 1
                    lines.append(f"    row {one.row} ({self.where(one.row)}): {one.detail}")
        return "\n".join(lines)

    def split(self, share: float) -> tuple[RowSet, np.ndarray]:
        """(rows to train on, held-out rows [N] by rising hash). A row is held out by its id alone:
        for a larger share the same rows and more.

        Raises ValueError for a share outside [0, 1).
        """
        if not 0 <= share < 1:
            raise ValueError(f"the held-out share must be in [0, 1), got {share}")
        used = np.zeros(self.rows, bool)
        used[self._good_rows()] = True
        out = used & (self.hash < np.uint64(int(share * 2**64)))
        rows = np.flatnonzero(out)
        return RowSet(used & ~out), rows[np.argsort(self.hash[rows], kind="stable")]

    def without(self, other: Dataset) -> RowSet:
        """Good rows whose ids `other` has not; the rest is noted as rejected."""
        rows = self._good_rows()
        there = np.isin(self.hash[rows], other.hash[other._good_rows()])
        for row in rows[there].tolist():
            self.reject(row, BadRow("in_heldout", "the held-out files have the id"))
        member = np.zeros(self.rows, bool)
        member[rows[~there]] = True
        return RowSet(member)

    def _good_rows(self) -> np.ndarray:
        return np.flatnonzero(self.good.members())

    def _read(self, which: int, values) -> Example | Conversation:
        folder = self.sources[which].path.parent
        return read_row(
            self.layouts[which],
            values,
            folder,
            self.checks.pictures,
            content_ids=self.checks.ids == "content",
        )

    def _read_all(self) -> Iterator[tuple[int, Example | Conversation | BadRow]]:
        for which, source in enumerate(self.sources):
            stream = source.stream(self._columns[which])
            for row, values in enumerate(stream, self._starts[which]):
                try:
                    yield row, values if isinstance(values, BadRow) else self._read(which, values)
                except BadRow as bad:
                    yield row, bad

    def _scan(self, progress: Callable[[int, int], None]) -> RowSet:
        good = np.zeros(self.rows, bool)
        numbers: dict[str, int] = {}
        for row, item in self._read_all():
            if row % 256 == 0:
                progress(row, self.rows)
            try:
                if isinstance(item, BadRow):
                    raise item
                for one in item.pictures:
                    one.check(pixels=self.checks.pixels)
            except BadRow as bad:
                self.reject(row, bad)
                continue
            good[row] = True
            digest = hashlib.blake2b(item.id.encode(), digest_size=8).digest()
            self.hash[row] = int.from_bytes(digest, "little")
            number = numbers.setdefault(item.kind, len(numbers))
            if number >= 2**16:
                raise DataError(
                    f"more than {2**16:,} kinds of row, such as {item.kind[:80]!r}; kind (or "
                    "ability) names groups that are reported together"
                )
            self.kind[row] = number
        progress(self.rows, self.rows)
        self.kinds = list(numbers)
        for row, first in _duplicates(self.hash, good):
            good[row] = False
            self.reject(
                row, BadRow("duplicate_id", f"row {first} ({self.where(first)}) has the id")
            )
        return RowSet(good)


def _duplicates(hashes: np.ndarray, good: np.ndarray) -> list[tuple[int, int]]:
    """(row, first row of the same hash) of every good row but the first. Two of 10^7 different ids
    share their 64 bits with a probability of 3e-6."""
    rows = np.flatnonzero(good)
    if not len(rows):
        return []
    rows = rows[np.argsort(hashes[rows], kind="stable")]
    ordered = hashes[rows]
    fresh = np.append(True, ordered[1:] != ordered[:-1])
    first = rows[np.maximum.accumulate(np.where(fresh, np.arange(len(rows)), 0))]
    return sorted(zip(rows[~fresh].tolist(), first[~fresh].tolist(), strict=True))
