"""What a worker knows of its processes, from /proc, and how it removes what they wrote.

It runs inside the sandbox and imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import select


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: state, parent, ..."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()


def resident(pid: int) -> int:
    """Bytes of memory of a process that no file backs."""
    total = 0
    with open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith((b"RssAnon:", b"RssShmem:", b"VmSwap:")):
                total += int(line.split()[1]) * 1024
    return total


def children(pid: int) -> list[int]:
    """The ids of a process's children."""
    try:
        found: list[int] = []
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
        return found
    except FileNotFoundError:
        if not os.path.exists(f"/proc/{pid}/task"):
            return []
    except (NotADirectoryError, ProcessLookupError):
        return []
    # A kernel without the list of children (CONFIG_PROC_CHILDREN), or a thread that just ended.
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            if int(stat(int(name))[1]) == pid:
                found.append(int(name))
    return found


def tree(pid: int) -> list[int]:
    """A process and all its descendants. Orphans among them are the child's: it is a subreaper."""
    found = [pid]
    for member in found:
        with contextlib.suppress(OSError):
            found += children(member)
        if len(found) > 10_000:
            break
    return found


def readable(*fds: int) -> bool:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def remove(top: str) -> None:
    """Remove a directory tree, however deep and whatever its modes: each directory is moved up
    before it is emptied, so no path gets long. Never follows a link."""
    parent, number = os.path.dirname(top), 0
    pending = [top]
    while pending:
        folder = pending.pop()
        with contextlib.suppress(OSError):
            os.rmdir(folder)
            continue
        os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            found = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for path, is_folder in found:
            if not is_folder:
                os.unlink(path)
                continue
            number += 1
            moved = os.path.join(parent, f"old{os.getpid()}.{number}")
            os.chmod(path, 0o700)
            os.rename(path, moved)
            pending.append(moved)
        os.rmdir(folder)
