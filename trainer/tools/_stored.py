"""What the indexes on disk share: mapped lines, folders that appear whole, and their manifests."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Source = str | Path | Sequence[str | Path]
MANIFEST = "manifest.json"


class Lines:
    """A file of lines, mapped: `raw(n)` is the n-th, whatever the file's size; `lines[n]` decodes
    it as JSON.

    bm25s's own mapped corpus keeps the positions as a list of Python integers in a JSON file:
    seconds and gigabytes for ten million lines. Here they are mapped, too.
    """

    def __init__(self, path: Path):
        self._starts = np.load(path.with_suffix(".starts.npy"), mmap_mode="r")
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def raw(self, n: int) -> bytes:
        """Without the newline."""
        return self._bytes[self._starts[n] : self._starts[n + 1] - 1].tobytes()

    def __getitem__(self, n: int) -> Any:
        return json.loads(self.raw(n))


class LinesWriter:
    """Writes what `Lines` maps. A context: the positions are written at its end."""

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "wb")
        self._starts = array("q", [0])

    def write(self, value: Any) -> None:
        try:
            line = json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            line = json.dumps(value).encode()
        self.write_raw(line)

    def write_raw(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._starts.append(self._starts[-1] + len(line) + 1)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __enter__(self) -> LinesWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        np.save(self._path.with_suffix(".starts.npy"), np.frombuffer(self._starts, dtype=np.int64))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in, which takes the name `folder` once the block ends without an error.

    An index of that name is replaced; who has it mapped keeps it. Raises ValueError where the
    name is taken by anything else."""
    if folder.exists() and not (folder / MANIFEST).is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(f"{folder} exists and is not an index: it is left alone")
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.parent / f".{folder.name}.{os.getpid()}.new"
    old = folder.parent / f".{folder.name}.{os.getpid()}.old"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
        if folder.exists():
            folder.rename(old)
        place.rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_manifest(place: Path, **facts: Any) -> dict[str, Any]:
    """The last file of a folder: the facts, and the size of every other file."""
    facts["files"] = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
    (place / MANIFEST).write_text(json.dumps(facts, indent=1))
    return facts


def read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """The facts. Raises FileNotFoundError where there is no folder, ValueError for a folder that
    is no whole index of this kind and version."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no index {folder}")
    try:
        facts = json.loads((folder / MANIFEST).read_text())
        found = (facts["kind"], facts["version"])
        sizes = dict(facts["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not an index: {error}") from None
    if found != (kind, version):
        raise ValueError(
            f"{folder} is an index of kind {found[0]}, version {found[1]}; "
            f"needed is {kind}, version {version}: build it again"
        )
    for name, size in sizes.items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            raise ValueError(
                f"{path} is damaged: {there if there is not None else 'no'} bytes, not {size}"
            )
    return facts


def check_source(
    facts: dict[str, Any],
    source: Source,
    rehash: Callable[[], str],
    suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz"),
) -> None:
    """Raises ValueError where the source is not what the index was built from. Files of the same
    names, sizes and times are taken for the same; otherwise their content decides."""
    was = facts["source"]
    if fingerprint(files_of(source, suffixes)) != was["files"] and rehash() != was["sha256"]:
        raise ValueError(
            f"the index is stale: {source} has changed since it was built; build it again"
        )


def fingerprint(paths: Sequence[Path]) -> list[list[Any]]:
    stats = [(path, path.stat()) for path in paths]
    return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def files_of(source: Source, suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz")) -> list[Path]:
    """The files of a source: itself, each of several, or those with such names in a folder.
    Raises FileNotFoundError for one that is not there, ValueError for a folder without any."""
    if not isinstance(source, (str, Path)):
        return [path for one in source for path in files_of(one, suffixes)]
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.name.lower().endswith(suffixes))
    if not found:
        raise ValueError(f"{path} has no file that ends in {' or '.join(suffixes)}")
    return found


def read_lines(source: Source, digest: Any) -> Iterator[tuple[Path, int, bytes]]:
    """File, number and content of every line that is not blank; all lines go into the digest."""
    for path in files_of(source):
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if not line.isspace():
                    yield path, number, line
