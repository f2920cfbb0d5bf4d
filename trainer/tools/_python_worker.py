"""The process behind the python tool: it imports once, then forks a child for every call, or one
for every session.

It runs inside the sandbox and imports nothing of the trainer beside its two neighbours, which
`sandbox.boot` hands to it.

    trainer --request--> this process --fork--> child: runs the policy's code
            <--reply---                <--result frame-- (pipe of this child alone)

Every message is a frame: PREFIX (lengths of header and body), a JSON header, raw bytes. Nothing is
pickled. The request comes from the trainer and is trusted; the result frame comes from the
policy's code: this process only measures it and passes it on, the trainer takes it apart.

A session's child is stopped (SIGSTOP) between its calls and whatever it started is killed, so of
all code only that of the running call runs: what grows meanwhile is that call's doing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy
from PIL import Image

from trainer.tools import _confine, _processes, _python_child
from trainer.tools._processes import children, readable, remove, tree
from trainer.tools._python_child import PREFIX, read_exactly, write_frame

RESULT_FD, REQUEST_FD = 3, 4
OPEN_FILES = 64
INODES = 20_000
"""Files and directories that a session may have: each takes a kilobyte of the kernel's memory."""
DEPTH = 64
"""Levels of directories that are looked into; deeper ones are too many files."""
TICK = 0.05
"""Seconds between two looks at what a call uses in total."""

# Taken now: a child runs the policy's code in a copy of this very process.
_exit = os._exit


@dataclass
class Child:
    pid: int
    process: int
    """A pidfd: readable once the process has ended."""
    result: int
    requests: int
    """Where a session's calls are sent; -1 for a child that has one call."""
    directory: str
    images: list[int] = field(default_factory=list)
    """Keys of the images that it has."""
    disk: int = 0
    inodes: int = 0


class Zygote:
    def __init__(self, config: dict[str, Any], root: str, requests: int):
        self.config = config
        self.root = root
        self.requests = requests
        self.held: dict[int, Image.Image] = {}
        self.sessions: dict[str, Child] = {}
        self.number = 0
        self.stack = _processes.stat(os.getpid())[25]
        self.allowed = [(path, rights) for path, rights in config["allowed"]]

    # --- Requests ---

    def serve(self, header: dict[str, Any], body: bytearray, replies: int) -> None:
        for key in header["end"]:
            self.finish(key)
        images = self.take_images(header, body)
        if header["code"] is None:
            write_frame(replies, {"ended": "none", "signal": 0, "fresh": False})
            return
        if _python_child.import_plots(header["code"]):
            share_pages()
        if header["session"] is None:
            self.serve_once(header, images, replies)
        else:
            self.serve_session(header["session"], header, images, replies)

    def take_images(self, header: dict[str, Any], body: bytearray) -> dict[int, Image.Image]:
        """The images of a request: [key] is an image held from an earlier one, and
        [key, mode, width, height] a new one, its raw pixels next in the body. The trainer says
        what to forget: it keeps the same account."""
        for key in header["forget"]:
            del self.held[key]
        start = 0
        for key, *new in header["images"]:
            if new:
                mode, width, height = new
                size = width * height * len(mode)  # L, RGB, RGBA: a byte for each letter
                pixels = memoryview(body)[start : start + size]
                self.held[key] = Image.frombytes(mode, (width, height), pixels)
                start += size
        return {key: self.held[key] for key, *_ in header["images"]}

    def serve_once(self, header: dict[str, Any], images: dict[int, Image.Image], replies: int):
        child = self.spawn(header, images, session=False)
        try:
            ended, frame = self.watch(child, memoryview(b""))
        finally:
            died = self.end(child)
        write_frame(replies, {"ended": ended, "signal": died, "fresh": True}, frame)

    def serve_session(
        self, key: str, header: dict[str, Any], images: dict[int, Image.Image], replies: int
    ) -> None:
        child = self.sessions.get(key)
        if child is not None and readable(child.process, child.result):
            # It has ended meanwhile, or has written what nobody asked for.
            self.finish(key)
            child = None
        fresh = child is None
        if fresh:
            child = self.sessions[key] = self.spawn(header, images, session=True)
            child.images = [key for key, *_ in header["images"]]
        # The order of a session's images is that of the request: a prefix of them it has already.
        keys = [key for key, *_ in header["images"]]
        keep = 0
        while keep < min(len(keys), len(child.images)) and keys[keep] == child.images[keep]:
            keep += 1
        new = [images[key] for key in keys[keep:]]
        child.images = keys
        call = {
            "code": header["code"],
            "seed": header["seed"] if fresh else None,
            "keep": keep,
            "new": [(image.mode, *image.size) for image in new],
        }
        encoded = json.dumps(call).encode()
        pixels = b"".join(image.tobytes() for image in new)
        request = PREFIX.pack(len(encoded), len(pixels)) + encoded + pixels
        if not fresh:
            os.kill(child.pid, signal.SIGCONT)
        ended, frame = self.watch(child, memoryview(request))
        if ended != "result":
            died = self.finish(key)
            write_frame(replies, {"ended": ended, "signal": died, "fresh": fresh}, frame)
            return
        write_frame(replies, {"ended": ended, "signal": 0, "fresh": fresh}, frame)
        if not self.settle(child):
            self.finish(key)

    def finish(self, key: str) -> int:
        """End a session, if there is one. The signal that its child died of."""
        child = self.sessions.pop(key, None)
        return 0 if child is None else self.end(child)

    # --- Children ---

    def spawn(self, header: dict[str, Any], images: dict[int, Image.Image], session: bool) -> Child:
        self.number += 1
        directory = os.path.join(self.root, f"call{self.number}")
        os.mkdir(directory, 0o700)
        # Whatever can be done before the fork is: a page first written to in the child costs 3 us.
        numpy.random.seed(header["seed"])
        with open("/proc/self/statm") as file:
            base = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        named = {f"image_{n}": images[key] for n, (key, *_) in enumerate(header["images"], 1)}
        pipes = list(os.pipe())
        if session:
            pipes += os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self.child(directory, base, header, named, pipes)
            finally:
                # Also on an exception: a forked child must never return into the zygote's loop.
                _exit(0)
        os.close(pipes[1])
        requests = -1
        if session:
            os.close(pipes[2])
            requests = pipes[3]
            os.set_blocking(requests, False)
        return Child(pid, os.pidfd_open(pid), pipes[0], requests, directory)

    def child(
        self,
        directory: str,
        base: int,
        header: dict[str, Any],
        images: dict[str, Image.Image],
        pipes: list[int],
    ) -> None:
        """In the child: let go of all that is the zygote's, then run code."""
        config = self.config
        os.setsid()
        os.chdir(directory)
        os.environ["HOME"] = os.environ["TMPDIR"] = directory
        for name in ("PWD", "MPLCONFIGDIR"):
            os.environ.pop(name, None)
        os.dup2(0, 2)
        os.dup2(pipes[1], RESULT_FD)  # the pipes have higher numbers: 3 and 4 were the zygote's
        if len(pipes) == 4:
            os.dup2(pipes[2], REQUEST_FD)
        os.closerange(REQUEST_FD + (len(pipes) == 4), config["files"])
        self.confine(directory, base)
        if len(pipes) == 4:
            _python_child.session(images, config, base, REQUEST_FD, RESULT_FD)
        else:
            _python_child.once(header, images, config, base, RESULT_FD)

    def confine(self, directory: str, base: int) -> None:
        """In the child: what the policy's code may do. Nothing of it can be taken back."""
        config = self.config
        _confine.prctl(_confine.PR_SET_DUMPABLE, 1)
        _confine.prctl(_confine.PR_SET_PDEATHSIG, signal.SIGKILL)
        _confine.prctl(_confine.PR_SET_CHILD_SUBREAPER, 1)
        _confine.first_to_go()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        memory = base + config["memory"]
        bounds = {
            resource.RLIMIT_AS: (memory, memory + _python_child.SLACK),
            resource.RLIMIT_FSIZE: (config["file"], config["file"]),
            resource.RLIMIT_NOFILE: (OPEN_FILES, OPEN_FILES),
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_MEMLOCK: (0, 0),
        }
        if config["own_uid"]:
            # Counted over all that the worker runs: its sessions' children, too.
            count = config["processes"] + config["sessions"] + 8
            bounds[resource.RLIMIT_NPROC] = (count, count)
        _confine.limit(bounds)
        if config["landlock"]:
            own = [(directory, _confine.OWN), (f"/proc/{os.getpid()}", _confine.READ)]
            _confine.landlock([*self.allowed, *own], config["landlock"])
        if config["seccomp"]:
            only = os.getpid() if config["signals"] else None
            _confine.seccomp(_confine.guard_filter(only=only))

    def watch(self, child: Child, request: memoryview) -> tuple[str, bytes | bytearray]:
        """Send the request and wait for one result frame. Returns how the wait ended ("result",
        "timeout", "died", "malformed", "memory", "processes", "disk") and the frame. Exits where
        the trainer has gone."""
        limits = self.config
        now = time.monotonic()
        deadline, tick = now + limits["seconds"], now + TICK
        before = self.disk(child)
        poll = select.poll()
        poll.register(child.result, select.POLLIN)
        poll.register(child.process, select.POLLIN)
        poll.register(self.requests, 0)  # POLLHUP comes unasked
        if request:
            poll.register(child.requests, select.POLLOUT)
        frame, size = bytearray(), PREFIX.size
        while len(frame) < size:
            now = time.monotonic()
            if now >= deadline:
                return "timeout", b""
            if now >= tick:
                excess = self.excess(child, before)
                if excess:
                    return excess, b""
                tick = time.monotonic() + TICK
            ready = {fd for fd, _ in poll.poll(max(0.0, min(deadline, tick) - now) * 1000 + 0.1)}
            if self.requests in ready:
                self.leave()
            if child.requests in ready:
                try:
                    request = request[os.write(child.requests, request[: 1 << 20]) :]
                except BlockingIOError:
                    pass
                except OSError:
                    return "died", b""  # it has closed its end: nothing can be asked any more
                if not request:
                    poll.unregister(child.requests)
            if child.result in ready:
                # Never past this frame: who else holds the pipe may write what he likes.
                chunk = os.read(child.result, min(size - len(frame), 1 << 20))
                if not chunk:
                    return "died", b""
                frame += chunk
                if len(frame) == PREFIX.size == size:
                    head, tail = PREFIX.unpack(frame)
                    if head > limits["header"] or tail > limits["body"]:
                        return "malformed", b""
                    size += head + tail
            elif child.process in ready:
                return "died", b""  # and nothing left in the pipe
        used = self.disk(child)
        child.disk = max(0, child.disk + used[0] - before[0])
        child.inodes = max(0, child.inodes + used[1] - before[1])
        return "result", frame

    def excess(self, child: Child, before: tuple[int, int]) -> str:
        """What the call has too much of, in all its processes; "" for nothing."""
        count = memory = 0
        base = None
        for pid in tree(child.pid):
            try:
                stat = _processes.stat(pid)
                resident = _processes.resident(pid)
            except (OSError, IndexError, ValueError):
                continue  # it has just ended
            if stat[0] == "Z":
                count += 1
                continue
            count += int(stat[17])  # threads
            if stat[25] == self.stack:
                # A fork, which shares the zygote's pages; what it has of its own comes on top.
                # Another program has another stack; nobody else can claim this address.
                base = _processes.resident(os.getpid()) if base is None else base
                resident = max(0, resident - base)
            memory += resident
        if count > self.config["processes"]:
            return "processes"
        if memory > self.config["memory"] + _python_child.SLACK:
            return "memory"
        disk, inodes = self.disk(child)
        if child.disk + disk - before[0] > self.config["disk"]:
            return "disk"
        if child.inodes + inodes - before[1] > INODES:
            return "disk"
        return ""

    def disk(self, child: Child) -> tuple[int, int]:
        """Bytes and files in use: of the worker's own file system, which only the running call
        can change; where it has none, of what lies in the call's directory."""
        if self.config["own_disk"]:
            stat = os.statvfs(self.root)
            return (stat.f_blocks - stat.f_bfree) * stat.f_frsize, stat.f_files - stat.f_ffree
        size = count = 0
        folders = [(child.directory, 0)]
        with contextlib.suppress(OSError):
            while folders and count <= INODES:
                folder, depth = folders.pop()
                if depth > DEPTH:
                    return size, 2 * INODES
                with os.scandir(folder) as entries:
                    for entry in entries:
                        count += 1
                        if entry.is_dir(follow_symlinks=False):
                            folders.append((entry.path, depth + 1))
                        else:
                            size += 512 * entry.stat(follow_symlinks=False).st_blocks
        return size, count

    def settle(self, child: Child) -> bool:
        """Stop a session's child until its next call, and kill what it has started. False where
        that fails in time."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGSTOP)
        give_up = time.monotonic() + 1
        stopped = False
        while time.monotonic() < give_up:
            if not stopped:
                pid, status = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED)
                if pid and not os.WIFSTOPPED(status):
                    child.pid = -abs(child.pid)  # it has ended, and is reaped: see `end`
                    return False
                stopped = bool(pid)
            alive = []
            for pid in tree(child.pid)[1:]:
                with contextlib.suppress(OSError, IndexError):
                    if _processes.stat(pid)[0] != "Z":
                        alive.append(pid)
                        os.kill(pid, signal.SIGKILL)
            if stopped and not alive:
                return True
            time.sleep(0.0002)
        return False

    def end(self, child: Child) -> int:
        """Kill a child's process group and every descendant, and remove its directory. Returns
        the signal that it died of. Exits, for the trainer to start anew, where they cannot be
        killed in time."""
        status = 0
        if child.pid > 0:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(child.pid, signal.SIGKILL)
            status = os.waitpid(child.pid, 0)[1]
        for fd in (child.process, child.result, child.requests):
            if fd >= 0:
                os.close(fd)
        # As the subreaper this process inherits every orphan, so no descendant gets out of sight.
        keep = {other.pid for other in self.sessions.values()} - {child.pid}
        give_up = time.monotonic() + 2
        while self.orphans(keep):
            if time.monotonic() > give_up:
                sys.exit("descendants of a call cannot be killed")
            time.sleep(0.001)
        with contextlib.suppress(OSError):  # a later call has a directory of its own
            remove(child.directory)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    def orphans(self, keep: set[int]) -> bool:
        """Kill, and reap, every child but `keep`. Whether there may be more."""
        if not keep:
            try:
                if os.waitpid(-1, os.WNOHANG)[0]:
                    return True
            except ChildProcessError:
                return False
        found = [pid for pid in children(os.getpid()) if pid not in keep]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return bool(found)

    def leave(self) -> NoReturn:
        """The trainer has gone: nobody is left to answer."""
        for child in self.sessions.values():
            with contextlib.suppress(OSError):
                os.kill(child.pid, signal.SIGKILL)
        for pid in children(os.getpid()):
            for member in tree(pid):
                with contextlib.suppress(OSError):
                    os.kill(member, signal.SIGKILL)
        _exit(0)


# --- Start ----------------------------------------------------------------------------------------


def share_pages() -> None:
    """The collector must not touch, and so copy, the pages that all children share."""
    gc.collect()
    gc.freeze()


def main() -> None:
    """Answer requests on stdin, one at a time, on stdout, until the trainer goes."""
    config = json.loads(sys.argv[1])
    root = os.getcwd()
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # stderr remains the log: this process writes there only when it breaks
    os.close(null)
    _confine.limit({resource.RLIMIT_NOFILE: (config["files"], config["files"])})
    _confine.prctl(_confine.PR_SET_CHILD_SUBREAPER, 1)
    if os.getpid() == 1:
        # The first process of a namespace gets only those signals that it asks for.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if config["confined"]:
        _confine.prctl(_confine.PR_SET_NO_NEW_PRIVS, 1)
        _confine.prctl(_confine.PR_SET_DUMPABLE, 0)  # its memory is nobody's to read
    if config["landlock"]:
        mine = [(root, _confine.OWN), ("/proc", _confine.READ | _confine.WRITE_FILE)]
        allowed = [(path, rights) for path, rights in config["allowed"]]
        _confine.landlock([*allowed, *mine], config["landlock"])
    if config["seccomp"]:
        _confine.seccomp(_confine.seccomp_filter())
    trainer = os.getppid()
    _python_child.rehearse(config)
    if not config["landlock"]:
        # Later no more: code could leave settings of matplotlib's in this process's directory.
        _python_child.import_plots(_python_child.PLOTS)
    share_pages()
    zygote = Zygote(config, root, requests)
    write_frame(replies, {"ended": "ready", "uid": os.getuid()})
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while True:
        # No PDEATHSIG here: it follows the *thread* that started this process, which may end long
        # before the trainer. The pipe tells, and the parent's id where a fork still holds the pipe.
        while not poll.poll(2000):
            if os.getppid() != trainer:
                zygote.leave()
        try:
            head, tail = PREFIX.unpack(read_exactly(requests, PREFIX.size))
            header = json.loads(read_exactly(requests, head))
            body = read_exactly(requests, tail)
            zygote.serve(header, body, replies)
        except (EOFError, BrokenPipeError):
            zygote.leave()
