"""A cache on disk of small JSON values by content hash, for several processes at a time.

    <folder>/<host>-<pid>-<random>.jsonl     {"key": "<sha256>", "value": ...} a line

Every process appends to a file of its own, each line in one write, and reads everybody's. So there
is no lock, it works on network file systems, and kill -9 costs at most the line that was being
written: a line that is not whole is ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LOOK_AGAIN = 1.0
"""Seconds between looks at what other processes have added."""
MAX_LINE = 1 << 20


def content_key(value: Any) -> str:
    """The hash of a JSON value: the same for the same content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class JsonCache:
    """get and put; keys are texts, values JSON. A value once put is never changed by a later put
    of another process: the first that is read stays.

    A folder that cannot be written or read is said once and the cache goes on in memory: it must
    never end a run. Safe in threads.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._values: dict[str, Any] = {}
        self._read: dict[str, int] = {}
        """File -> bytes of whole lines that were read."""
        self._lock = threading.Lock()
        self._file: int | None = None
        self._pid = 0
        self._looked = float("-inf")
        self._complained = False
        self.damaged = 0
        """Lines that were no entry."""

    def get(self, key: str) -> Any | None:
        with self._lock:
            if key not in self._values and time.monotonic() - self._looked >= LOOK_AGAIN:
                self._look()
            return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        line = json.dumps({"key": key, "value": value}).encode("ascii") + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(f"a value of {len(line)} bytes is past the cache's {MAX_LINE}")
        with self._lock:
            if key in self._values:
                return
            self._values[key] = value
            try:
                self._append(line)
            except OSError as error:
                self._complain(error)

    def __len__(self) -> int:
        with self._lock:
            self._look()
            return len(self._values)

    def close(self) -> None:
        with self._lock:
            if self._file is not None and self._pid == os.getpid():
                os.close(self._file)
            self._file = None

    def _append(self, line: bytes) -> None:
        if self._file is None or self._pid != os.getpid():  # after a fork, a file of its own
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(self.folder / name, flags, 0o644)
            self._pid = os.getpid()
        written = os.write(self._file, line)
        if written != len(
            line
        ):  # a full disk: end the torn line, so that the next one stands alone
            os.write(self._file, b"\n")
            raise OSError(f"{written} of {len(line)} bytes were written")

    def _look(self) -> None:
        self._looked = time.monotonic()
        try:
            files = sorted(self.folder.glob("*.jsonl"))
        except OSError as error:
            self._complain(error)
            return
        for file in files:
            try:
                self._take(self._lines(file))
            except OSError as error:
                self._complain(error)

    def _lines(self, file: Path) -> Iterable[bytes]:
        start = self._read.get(file.name, 0)
        if file.stat().st_size <= start:
            return
        with file.open("rb") as lines:
            lines.seek(start)
            while line := lines.readline(MAX_LINE + 1):
                if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                    return  # still being written, or torn by a kill
                start += len(line)
                self._read[file.name] = start
                yield line

    def _take(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            try:
                entry = json.loads(line)
                self._values.setdefault(str(entry["key"]), entry["value"])
            except (ValueError, KeyError, TypeError, RecursionError):
                self.damaged += bool(line.strip())

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            log.warning("the cache in %s is kept in memory alone: %s", self.folder, error)
