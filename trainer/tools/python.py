"""The python tool: the policy's code runs in a process of its own, forked from a warm one."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import math
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.tools import _python_worker as wire
from trainer.tools.protocol import ToolInfraError
from trainer.tools.toolbox import ImageLimits
from trainer.types import Observation, Session

log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""For a worker to import what the code finds imported. Cold disks are slow."""
GRACE_SECONDS = 10.0
"""Past the code's own limit, for the fork, the clean-up and the transfer: then the worker hangs."""

HELD_BYTES = 64 << 20
"""Pixels that a worker keeps for the next calls: a trajectory's turns, and the rollouts of one
question, ask about the same images."""

_BOOT = "import runpy, sys; del sys.path[0]; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
_MODES = ("L", "RGB", "RGBA")


class PythonTool:
    """Runs Python code, each call in a fresh process: no variable outlives its call.

    A pool of workers, each a process that has numpy and PIL imported, forks one child per call.
    The child has limits on time (wall clock: SIGKILL for its process group and its orphans), CPU,
    address space, file size and open files; an empty environment; an empty working directory,
    removed after the call; and no file descriptor of the trainer. Its result is a frame whose
    every size is checked, with pixels as raw RGB: nothing is unpickled and nothing decoded.

    What this does NOT cover: the code runs as the trainer's user, with its network and its rights
    to read and write files, to start processes (a fork bomb is stopped only by the wall clock) and
    to signal them. Run code that you do not trust inside a container or a virtual machine.

    Random generators are seeded by the session and the number of the call, and string hashes are
    fixed, so the same calls give the same observations. A worker remembers images that it was
    sent: an image must not be changed in place once it is a session's.
    """

    name = "python"

    def __init__(
        self,
        *,
        timeout: float = 10.0,
        memory: int = 1 << 30,
        file_size: int = 16 << 20,
        workers: int | None = None,
        max_text: int = 8_192,
        images: ImageLimits | None = None,
    ):
        """timeout: seconds of wall clock per call. memory: bytes of address space per process
        beside the interpreter's own. file_size: bytes of a file written. workers: processes, and
        calls at a time; None: two, or one on a single core. max_text: characters kept of what the
        code prints. Nothing starts before the first call."""
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be positive and finite, got {timeout}")
        if memory < 1 or file_size < 0 or max_text < 1:
            raise ValueError("memory and max_text must be positive, file_size not negative")
        workers = min(2, os.cpu_count() or 1) if workers is None else workers
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.timeout = timeout
        self.max_text = max_text
        self.images = images or ImageLimits()
        self._limits = {
            "seconds": timeout,
            "memory": memory,
            "file": file_size,
            "text": max_text,
            "images": self.images.count,
            "pixels": self.images.pixels,
            # A character is at most 12 in JSON (an escaped surrogate pair); then sizes and names.
            "header": 12 * (max_text + 1100) + 64 * self.images.count + 1024,
            "body": 3 * self.images.pixels * self.images.count,
        }
        # As many threads as workers: each takes a free worker and gives it back itself, so a
        # cancelled caller leaves no worker in the middle of a reply.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="python-tool")
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(self._limits) for _ in range(workers)]
        for worker in self._workers:
            self._free.put(worker)

    async def call(self, session: Session, code: str) -> Observation:
        """Run Python code and return what it prints and shows. The images so far are image_1, image_2, ... (PIL); np, math and Image are imported. The value of a last expression is shown; show(image) shows an image. Variables are not kept between calls.

        Args:
            code: Python code
        """  # noqa: E501
        request = _Request(code, session.images, session.seed + session.calls)
        loop = asyncio.get_running_loop()
        observation = await loop.run_in_executor(self._threads, self._answer, request)
        session.images.extend(observation.images)
        return observation

    def run(self, code: str, images: Sequence[Image.Image] = (), seed: int = 0) -> Observation:
        """The same without a session, blocking. Raises ToolInfraError where no worker answers."""
        return self._threads.submit(self._answer, _Request(code, images, seed)).result()

    def close(self) -> None:
        """Waits for calls that are running, then ends the workers. Calls after it raise."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> PythonTool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, request: _Request) -> Observation:
        worker = self._free.get()
        try:
            try:
                header, body = worker.exchange(request, self.timeout + GRACE_SECONDS)
            except ToolInfraError as error:
                log.warning("%s; starting another", error)
                header, body = worker.exchange(request, self.timeout + GRACE_SECONDS)
        finally:
            self._free.put(worker)
        return self._observation(header, body)

    def _observation(self, header: dict[str, Any], frame: bytearray) -> Observation:
        """What the policy sees of a worker's reply."""
        if header["ended"] == "timeout":
            return _error(f"Error: timed out after {self.timeout:g} s")
        if header["ended"] == "died":
            return _error(f"Error: the process ended without a result{_by(header['signal'])}")
        try:
            if header["ended"] == "malformed":
                raise ValueError("too long")
            text, error, images = _read_result(frame, self._limits)
        except (ValueError, RecursionError):
            # RecursionError: brackets by the thousand. The code wrote this; so it gets the blame.
            return _error("Error: the process wrote a malformed result")
        if error is not None:
            text = f"{text.rstrip()}\n{error}" if text.strip() else error
            return Observation(text, images, "tool_error")
        return Observation(text.rstrip("\n") or ("" if images else "(no output)"), images)


def _error(text: str) -> Observation:
    return Observation(text, status="tool_error")


def _by(number: int) -> str:
    try:
        # SIGKILL is how every call's process ends that had closed its end of the pipe: it is ours.
        return f" ({signal.Signals(number).name})" if number not in (0, signal.SIGKILL) else ""
    except ValueError:
        return f" (signal {number})"  # real-time signals have no name


def _read_result(
    frame: bytearray, limits: dict[str, Any]
) -> tuple[str, str | None, tuple[Image.Image, ...]]:
    """Text, error and images of a result frame, of which nothing is taken on trust.

    Raises ValueError, or RecursionError for deep JSON, where it is not what a child would write.
    """
    head, tail = wire.PREFIX.unpack_from(frame)
    start = wire.PREFIX.size + head
    header = json.loads(frame[wire.PREFIX.size : start])
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


class _Request:
    """Code, a seed, and images: loaded on the caller's thread, for loading a lazy PIL image is no
    business of two threads at a time."""

    def __init__(self, code: str, images: Sequence[Image.Image], seed: int):
        self.code = code
        self.seed = seed % (1 << 32)
        self.images = list(images)
        for image in self.images:
            image.load()

    def encode(self, held: dict[int, Image.Image]) -> tuple[list[bytes], dict[int, Image.Image]]:
        """The request to a worker that holds the images `held` (by id, least recently used first),
        as buffers; and what it holds afterwards."""
        after = dict(held)
        entries: list[tuple[Any, ...]] = []
        pixels: list[bytes] = []
        for image in self.images:
            key = id(image)  # unique while `after` keeps the image
            known = after.pop(key, None) is not None
            after[key] = image
            if known:
                entries.append((key,))
                continue
            sent = image if image.mode in _MODES else image.convert("RGB")
            entries.append((key, sent.mode, sent.width, sent.height))
            pixels.append(sent.tobytes())
        total = sum(4 * image.width * image.height for image in after.values())
        for key, image in list(after.items())[: len(after) - len(set(map(id, self.images)))]:
            if total <= HELD_BYTES:
                break
            del after[key]
            total -= 4 * image.width * image.height
        header = {
            "code": self.code,
            "seed": self.seed,
            "images": entries,
            "forget": [key for key in held if key not in after],
        }
        encoded = json.dumps(header).encode()
        prefix = wire.PREFIX.pack(len(encoded), sum(map(len, pixels)))
        return [prefix + encoded, *pixels], after


class _Worker:
    """One zygote process and the two pipes to it. Used by one thread at a time."""

    def __init__(self, limits: dict[str, Any]):
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = ""
        self._held: dict[int, Image.Image] = {}
        self._remove: weakref.finalize | None = None

    def exchange(self, request: _Request, seconds: float) -> tuple[dict[str, Any], bytearray]:
        """Send one request and read its reply, starting the process where none runs.

        Raises ToolInfraError, and leaves no process, where it died or did not answer in time.
        """
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
        said = ""
        with contextlib.suppress(OSError):
            said = Path(self._directory, "worker.log").read_text(errors="replace")[-2000:].strip()
        self._remove()
        self._process = self._remove = None
        self._held = {}
        return f": {said}" if said else ""

    def _start(self) -> None:
        self._directory = directory = tempfile.mkdtemp(prefix="python-tool-")
        with open(os.path.join(directory, "worker.log"), "wb") as stderr:
            self._process = subprocess.Popen(
                [*worker_command(self._limits), directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=directory,
                env=worker_environment(directory),
                bufsize=0,
                start_new_session=True,  # Ctrl-C in the trainer's terminal is the trainer's
            )
        for pipe in (self._process.stdin.fileno(), self._process.stdout.fileno()):
            os.set_blocking(pipe, False)
            with contextlib.suppress(OSError):  # past the user's quota: smaller is only slower
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
        self._remove = weakref.finalize(self, _clean_up, self._process, directory, os.getpid())

    def _write(self, data: bytes, deadline: float) -> None:
        pipe = self._process.stdin.fileno()
        view = memoryview(data)
        while view:
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(pipe, view) :]
                continue
            _wait(pipe, select.POLLOUT, deadline)

    def _read_frame(self, deadline: float) -> tuple[dict[str, Any], bytearray]:
        head, tail = wire.PREFIX.unpack(self._read(wire.PREFIX.size, deadline))
        longest = self._limits["header"] + self._limits["body"] + wire.PREFIX.size
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


def worker_command(limits: dict[str, Any]) -> list[str]:
    """The command line of a worker, to which its directory is appended. A wrapper that confines
    the process further goes in front of it.

    Not -I: string hashes are to be the same in every worker, and -I ignores PYTHONHASHSEED. The
    environment is ours alone, -s leaves out the user's packages, and _BOOT drops the working
    directory from the path: that is what -I would do.
    """
    script = os.path.abspath(wire.__file__)
    return [sys.executable, "-s", "-c", _BOOT, script, json.dumps(limits)]


def worker_environment(directory: str) -> dict[str, str]:
    """All that the code sees of the environment. One thread: a forked child has no others."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": directory,
        "TMPDIR": directory,
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


def _clean_up(process: subprocess.Popen[bytes], directory: str, owner: int) -> None:
    """Kill, reap, close, remove. Runs at the latest when the interpreter exits."""
    if os.getpid() != owner:
        return  # a fork of the trainer ends: the worker is still its parent's
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except RecursionError:  # up to Python 3.12, where the code has dug a deep tree
        subprocess.run(["rm", "-rf", directory], check=False)
