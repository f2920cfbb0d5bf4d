"""What a web provider keeps: answers on disk, and the pace of its requests."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Cache:
    """Answers on disk, in a SQLite file that many processes may share.

    A process killed while it writes loses that entry and no other. Entries past `ttl` seconds
    are misses; past `max_bytes` the oldest go. A cache that cannot be read or written only costs
    money: that is logged, and the search goes on. SQLite's log needs a local disk: no NFS.
    """

    def __init__(self, path: str | Path, *, ttl: float = 7 * 86_400, max_bytes: int = 1 << 30):
        """Raises ValueError for limits below 1."""
        if ttl <= 0 or max_bytes < 1:
            raise ValueError(f"ttl and max_bytes must be positive, got {ttl} and {max_bytes}")
        self.path = Path(path)
        self.ttl = ttl
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._owner = 0

    def get(self, key: str) -> bytes | None:
        query = "SELECT value FROM entry WHERE key = ? AND made > ?"
        rows = self._run(lambda db: db.execute(query, (key, time.time() - self.ttl)).fetchall())
        return rows[0][0] if rows else None

    def put(self, key: str, value: bytes) -> None:
        def write(db: sqlite3.Connection) -> None:
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.execute("DELETE FROM entry WHERE made <= ?", (time.time() - self.ttl,))
                db.execute(
                    "INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", (key, time.time(), value)
                )
                while self._used(db) > self.max_bytes:
                    tenth = db.execute("SELECT COUNT(*) / 10 + 1 FROM entry").fetchone()
                    oldest = "SELECT key FROM entry ORDER BY made LIMIT ?"
                    if not db.execute(f"DELETE FROM entry WHERE key IN ({oldest})", tenth).rowcount:
                        break  # the empty file itself is larger

        self._run(write)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _run(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """What the work returns; None, logged, where the file does not serve."""
        with self._lock:
            for again in (True, False):
                try:
                    return work(self._open())
                except (sqlite3.OperationalError, OSError) as error:  # locked, full, read-only
                    log.warning("cache %s: %s", self.path, error)
                    self._drop()  # the next call opens it anew
                    return None
                except sqlite3.DatabaseError as error:
                    log.warning("cache %s is damaged (%s): it is put aside", self.path, error)
                    self._put_aside()
                    if not again:
                        return None

    def _open(self) -> sqlite3.Connection:
        # A connection must not cross a fork: the child opens its own and leaves this one be.
        if self._connection is None or self._owner != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(
                self.path, timeout=5, isolation_level=None, check_same_thread=False
            )
            self._connection, self._owner = db, os.getpid()
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS entry "
                "(key TEXT PRIMARY KEY, made REAL NOT NULL, value BLOB NOT NULL)"
            )
            db.execute("CREATE INDEX IF NOT EXISTS entry_made ON entry (made)")
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None and self._owner == os.getpid():
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def _put_aside(self) -> None:
        self._drop()
        with contextlib.suppress(OSError):
            self.path.replace(self.path.with_name(f"{self.path.name}.damaged"))
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    @staticmethod
    def _used(db: sqlite3.Connection) -> int:
        """Bytes in use: pages freed by deletion are written again, so the file stays bounded."""
        one = {
            name: db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        }
        return (one["page_count"] - one["freelist_count"]) * one["page_size"]


class RateLimit:
    """A token bucket: `burst` requests at once, then `per_second`. For this process alone."""

    def __init__(self, per_second: float, burst: int = 1):
        if not (per_second > 0 and math.isfinite(per_second)) or burst < 1:
            raise ValueError(
                f"per_second must be positive and burst 1 or more, got {per_second}, {burst}"
            )
        self._interval = 1 / per_second
        self._saved = (burst - 1) * self._interval
        self._free = 0.0
        self._lock = threading.Lock()

    def reserve(self, patience: float) -> float | None:
        """Take a turn: the seconds to wait for it. None, and none taken, where it is further off
        than `patience`."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._free, now - self._saved)
            if turn - now > patience:
                return None
            self._free = turn + self._interval
            return max(0.0, turn - now)

    def pause(self, seconds: float) -> None:
        """No turn for so long: the service has said so."""
        with self._lock:
            self._free = max(self._free, time.monotonic() + seconds)
