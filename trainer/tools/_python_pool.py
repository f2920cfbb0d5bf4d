"""The trainer's side of a python worker: the process, its pipes, and what is on them."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

from trainer.tools import _confine, _processes, _python_child, _python_worker
from trainer.tools.protocol import ToolInfraError
from trainer.tools.sandbox import FIRST_UID, SCOPES, WORK, Sandbox, allowed, unprivileged_uid

log = logging.getLogger(__name__)

PREFIX = _python_child.PREFIX

START_SECONDS = 60.0
"""For a worker to import what the code finds imported. Cold disks are slow."""

HELD_BYTES = 64 << 20
"""Pixels that a worker keeps for the next calls: a trajectory's turns, and the rollouts of one
question, ask about the same images."""

BOOT = r"""
import json, os, sys, types
del sys.path[0]
data = b""
while not data.endswith(b"\n"):
    data += os.read(0, 1 << 16)
uid, modules = json.loads(data)
if uid is not None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
trainer, tools = types.ModuleType("trainer"), types.ModuleType("trainer.tools")
sys.modules |= {"trainer": trainer, "trainer.tools": tools}
trainer.tools = tools
for name, source in modules:
    module = types.ModuleType(f"trainer.tools.{name}")
    sys.modules[module.__name__] = module
    setattr(tools, name, module)
    exec(compile(source, f"{name}.py", "exec", dont_inherit=True), module.__dict__)
for name in [name for name in sys.modules if name.split(".")[0] == "trainer"]:
    del sys.modules[name]
main = module.main
del trainer, tools, module, modules, name, source, data, uid
main()
"""
"""What a worker starts with. Its modules come over the pipe, so that none of the trainer's files
has to be within its reach. Root's worker stops being root before it imports anything."""

_MODULES = (_confine, _processes, _python_child, _python_worker)
_MODES = ("L", "RGB", "RGBA")


def read_result(
    frame: bytearray, limits: dict[str, Any]
) -> tuple[str, str | None, tuple[Image.Image, ...]]:
    """Text, error and images of a result frame, of which nothing is taken on trust.

    Raises ValueError, or RecursionError for deep JSON, where it is not what a child would write.
    """
    head, tail = PREFIX.unpack_from(frame)
    start = PREFIX.size + head
    header = json.loads(frame[PREFIX.size : start])
    if not isinstance(header, dict) or set(header) != _RESULT_TYPES.keys():
        raise ValueError("the result has other keys")
    for key, kinds in _RESULT_TYPES.items():
        if type(header[key]) not in kinds:
            raise ValueError(f"{key} has another type")
    text, error, sizes = header["text"], header["error"], header["images"]
    if len(text) > limits["text"] or len(error or "") > 1100 or len(sizes) > limits["images"]:
        raise ValueError("the result is past its limits")
    images = []
    body = memoryview(frame)[start : start + tail]
    for size in sizes:
        if type(size) is not list or len(size) != 2 or any(type(side) is not int for side in size):
            raise ValueError("an image has no size")
        width, height = size
        if min(size) < 1 or width * height > limits["pixels"]:
            raise ValueError("an image is too large")
        pixels = body[: 3 * width * height]
        images.append(Image.frombytes("RGB", (width, height), bytes(pixels)))  # ValueError if short
        body = body[len(pixels) :]
    if len(body):
        raise ValueError("the result has pixels of no image")
    if header["cut"] > 0:
        text = f"{text}\n[{header['cut']:,} characters cut]\n"
    if header["dropped"] > 0:
        text = f"{text}[{header['dropped']:,} more images not shown]\n"
    return text, error, tuple(images)


_RESULT_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "cut": (int,),
    "error": (str, type(None)),
    "images": (list,),
    "dropped": (int,),
}


Held = tuple[int, Image.Image]
"""An image that a worker has, and the number that it knows it by: an id may come again."""

_numbers = itertools.count(1)


class Request:
    """Code, a seed, and images: loaded on the caller's thread, for loading a lazy PIL image is no
    business of two threads at a time. code None: only `end` sessions."""

    def __init__(
        self,
        code: str | None,
        images: Sequence[Image.Image] = (),
        seed: int = 0,
        session: str | None = None,
        end: Sequence[str] = (),
    ):
        self.code = code
        self.seed = seed % (1 << 32)
        self.session = session
        self.end = list(end)
        self.images = list(images)
        for image in self.images:
            image.load()

    def encode(self, held: dict[int, Held]) -> tuple[list[bytes], dict[int, Held]]:
        """The request to a worker that holds the images `held` (by id, least recently used first),
        as buffers; and what it holds afterwards."""
        after = dict(held)
        entries: list[tuple[Any, ...]] = []
        pixels: list[bytes] = []
        for image in self.images:
            key = id(image)  # unique while `after` keeps the image
            known = after.pop(key, None)
            if known is not None:
                after[key] = known
                entries.append((known[0],))
                continue
            number = next(_numbers)
            after[key] = (number, image)
            sent = image if image.mode in _MODES else image.convert("RGB")
            entries.append((number, sent.mode, sent.width, sent.height))
            pixels.append(sent.tobytes())
        total = sum(4 * image.width * image.height for _, image in after.values())
        for key, (_, image) in list(after.items())[: len(after) - len(set(map(id, self.images)))]:
            if total <= HELD_BYTES:
                break
            del after[key]
            total -= 4 * image.width * image.height
        header = {
            "code": self.code,
            "seed": self.seed,
            "session": self.session,
            "end": self.end,
            "images": entries,
            "forget": [number for key, (number, _) in held.items() if key not in after],
        }
        encoded = json.dumps(header).encode()
        prefix = PREFIX.pack(len(encoded), sum(map(len, pixels)))
        return [prefix + encoded, *pixels], after


class Worker:
    """One zygote process, in its sandbox, and the two pipes to it. One thread at a time has it:
    whoever holds `lock`."""

    def __init__(self, limits: dict[str, Any], sandbox: Sandbox):
        self.lock = threading.Lock()
        self.uid: int | None = None
        """The user that the code runs as, as the machine sees it; None before the first start."""
        self._limits = limits
        self._sandbox = sandbox
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._directory = ""
        self._held: dict[int, Held] = {}
        self._remove: weakref.finalize | None = None

    @property
    def running(self) -> bool:
        return self._process is not None

    def exchange(self, request: Request, seconds: float) -> tuple[dict[str, Any], bytearray]:
        """Send one request and read its reply, starting the process where none runs.

        Raises ToolInfraError, and leaves no process, where it died or did not answer in time.
        """
        if _python_child.PLOTS in (request.code or ""):
            seconds += START_SECONDS  # it may be the first, for which the process imports it
        try:
            if self._process is None:
                self._start()
                self._read_frame(time.monotonic() + START_SECONDS)
            deadline = time.monotonic() + seconds
            buffers, self._held = request.encode(self._held)
            for data in buffers:
                self._write(data, deadline)
            return self._read_frame(deadline)
        except (OSError, EOFError, ValueError, MemoryError) as error:
            reason = f"{type(error).__name__} {error}".strip()
            said = self.stop()
            raise ToolInfraError(f"a python worker failed ({reason}){said}") from error

    def stop(self) -> str:
        """End the process, if any, and remove its directory. Returns the last it had to say."""
        if self._remove is None or self._process is None:
            return ""
        self._process.stdin.close()  # its sign to go; it ends a call that is running
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        size = os.fstat(self._log.fileno()).st_size
        said = os.pread(self._log.fileno(), 2000, max(0, size - 2000)).decode(errors="replace")
        self._remove()
        self._process = self._remove = self._log = None
        self._directory = ""
        self._held = {}
        return f": {said.strip()}" if said.strip() else ""

    def _start(self) -> None:
        sandbox = self._sandbox
        if sandbox.tier == 0:
            log.warning(
                "THE PYTHON TOOL HAS NO SANDBOX: the policy's code runs as this user, with its "
                "files and its network (unsafe_no_sandbox)"
            )
        uid = unprivileged_uid() if sandbox.tier else None
        own_uid = sandbox.bwrap is not None if uid is None else uid >= FIRST_UID
        config = {
            **self._limits,
            "landlock": sandbox.landlock,
            "seccomp": sandbox.seccomp,
            "confined": sandbox.tier > 0,
            "signals": sandbox.landlock < SCOPES,
            "own_uid": own_uid,
            "own_disk": sandbox.bwrap is not None,
            "allowed": allowed() if sandbox.landlock else [],
        }
        self._directory = ""  # inside the namespaces it is no directory of this machine
        if sandbox.bwrap is None:
            self._directory = tempfile.mkdtemp(prefix="python-tool-")
            if uid is not None:
                os.chown(self._directory, uid, uid)
        environment = worker_environment(self._directory or WORK)
        # Not -I: string hashes are to be the same in every worker, and -I ignores PYTHONHASHSEED.
        # The environment is ours alone, -s leaves out the user's packages, and BOOT drops the
        # working directory from the path: that is what -I would do.
        program = [sys.executable, "-s", "-c", BOOT, json.dumps(config)]
        disk = self._limits["disk"] * max(1, self._limits["sessions"]) + (4 << 20)
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            sandbox.command(program, disk, environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=self._directory or "/",
            env=environment,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in the trainer's terminal is the trainer's
        )
        self.uid = os.geteuid() if uid is None else uid
        for pipe in (self._process.stdin.fileno(), self._process.stdout.fileno()):
            os.set_blocking(pipe, False)
            with contextlib.suppress(OSError):  # past the user's quota: smaller is only slower
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
        self._remove = weakref.finalize(
            self, _clean_up, self._process, self._log, self._directory, os.getpid()
        )
        sources = [(m.__name__.rpartition(".")[2], Path(m.__file__).read_text()) for m in _MODULES]
        boot = json.dumps([uid, sources]).encode() + b"\n"
        self._write(boot, time.monotonic() + START_SECONDS)
        _started.add(self)

    def let_go(self) -> None:
        """In a fork of the trainer: the worker is its parent's, and must see when that one goes."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()

    def _write(self, data: bytes, deadline: float) -> None:
        pipe = self._process.stdin.fileno()
        view = memoryview(data)
        while view:
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(pipe, view) :]
                continue
            _wait(pipe, select.POLLOUT, deadline)

    def _read_frame(self, deadline: float) -> tuple[dict[str, Any], bytearray]:
        head, tail = PREFIX.unpack(self._read(PREFIX.size, deadline))
        longest = self._limits["header"] + self._limits["body"] + PREFIX.size
        if head > 4096 or tail > longest:
            raise ValueError(f"a reply of {head:,} + {tail:,} bytes")
        header = json.loads(self._read(head, deadline))
        return header, self._read(tail, deadline)

    def _read(self, size: int, deadline: float) -> bytearray:
        pipe = self._process.stdout.fileno()
        data = bytearray(size)
        view = memoryview(data)
        while view:
            _wait(pipe, select.POLLIN, deadline)
            count = os.readv(pipe, [view])
            if not count:
                raise EOFError("the process has ended")
            view = view[count:]
        return data


_started: weakref.WeakSet[Worker] = weakref.WeakSet()


def _after_fork() -> None:
    for worker in list(_started):
        worker.let_go()


os.register_at_fork(after_in_child=_after_fork)


def worker_environment(directory: str) -> dict[str, str]:
    """All that the code sees of the environment. One thread: a forked child has no others."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": directory,
        "TMPDIR": directory,
        "MPLCONFIGDIR": directory,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        **dict.fromkeys(threads, "1"),
    }


def _wait(fd: int, event: int, deadline: float) -> None:
    """Raises TimeoutError (an OSError) where the pipe is not ready in time."""
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("no answer in time")


def _clean_up(
    process: subprocess.Popen[bytes], log_file: IO[bytes], directory: str, owner: int
) -> None:
    """Kill, reap, close, remove. Runs at the latest when the interpreter exits."""
    if os.getpid() != owner:
        return  # a fork of the trainer ends: the worker is still its parent's
    # Bubblewrap may not take along what has another user id, and without namespaces nothing takes
    # along what the code has started: they are looked for.
    members = _processes.tree(process.pid) if process.returncode is None else []
    process.kill()
    for member in members[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    log_file.close()
    if directory:
        with contextlib.suppress(OSError):
            _processes.remove(directory)
