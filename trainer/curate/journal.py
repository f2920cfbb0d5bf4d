"""What a curation has found out so far: an append-only file of verdicts, for a run to go on from.

    {"key": "<sha256>", "stage": "execute", "value": ...}     a line, written at once

A key is the hash of a row's content, of a stage and of that stage's settings, so an entry holds
for whoever asks the same of the same row. kill -9 costs at most the line that was being written: a
line that is not whole is ended when the file is opened again, and no entry.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from trainer.log import RunError


class Journal:
    """get and put of JSON values; the first value of a key stays. Raises RunError for a file that
    cannot be read or written, after which nothing that was written before is lost."""

    def __init__(self, path: Path):
        self.path = path
        self._values: dict[str, Any] = {}
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
            with open(self._file, "rb", closefd=False) as lines:
                last = b"\n"
                for last in lines:
                    self._take(last)
            if not last.endswith(b"\n"):  # torn by a kill: what comes next stands alone
                os.write(self._file, b"\n")
        except BlockingIOError:
            os.close(self._file)
            raise RunError(f"another curation works in '{path.parent}': wait for its end") from None
        except OSError as error:
            raise self._error(error) from error

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any:
        """The value, or None where there is none."""
        return self._values.get(key)

    def put(self, key: str, stage: str, value: Any) -> None:
        """stage: for whoever reads the file; the key knows it already."""
        if key in self._values:
            return
        entry = {"key": key, "stage": stage, "value": value}
        line = json.dumps(entry).encode("ascii") + b"\n"
        try:
            written = os.write(self._file, line)
            if written != len(line):  # a full disk: the torn line is ended when there is room
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._error(error) from error
        self._values[key] = value

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            entry = json.loads(line)
            self._values.setdefault(str(entry["key"]), entry["value"])

    def _error(self, error: OSError) -> RunError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "Free some space" if full else "Check the folder"
        return RunError(
            f"the journal '{self.path}' cannot be written: {error.strerror or error}. What was "
            f"found out before is safe in it. {mend}, and run the same command again to go on."
        )
