"""The process behind the python tool: it imports once, then forks a child for every call.

It is run as a script, by path, with the parent's interpreter, and imports nothing of the trainer.

    trainer --request--> this process --fork--> child: runs the policy's code
            <--reply---                <--result frame-- (pipe of this call alone)

Every message is a frame: PREFIX (lengths of header and body), a JSON header, raw bytes. Nothing is
pickled. The request comes from the trainer and is trusted; the result frame comes from the
policy's code: this process only measures it and passes it on, the trainer takes it apart.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import gc
import io
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import time
from typing import Any, NoReturn

# numpy imports its subpackages on first use: 15 ms, in every child again.
import numpy
import numpy.fft
import numpy.linalg
import numpy.random
from PIL import Image

PREFIX = struct.Struct(">IQ")
"""Bytes of header, bytes of body."""

CODE_FILE = "<code>"
RESULT_FD = 3
OPEN_FILES = 64
SLACK = 64 << 20
"""Bytes of address space kept back, so that a MemoryError can still be reported."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = ctypes.CDLL(None, use_errno=True).prctl
# Taken now: the policy's code runs in a copy of this very module's process, and may rebind them.
_exit, _getpid = os._exit, os.getpid


# --- Frames ---------------------------------------------------------------------------------------


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_exactly(fd: int, size: int) -> bytearray:
    """Raises EOFError where the other side has gone."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = os.readv(fd, [view])
        if not count:
            raise EOFError
        view = view[count:]
    return data


def write_frame(fd: int, header: dict[str, Any], body: bytes | bytearray = b"") -> None:
    encoded = json.dumps(header).encode()
    write_all(fd, PREFIX.pack(len(encoded), len(body)) + encoded)
    write_all(fd, body)


# --- The child: one call --------------------------------------------------------------------------


class Screen(io.TextIOBase):
    """What the code prints and shows, as far as the limits go. Past them it only counts."""

    encoding = "utf-8"

    def __init__(self, limits: dict[str, Any]):
        self.limits = limits
        self.texts: list[str] = []
        self.room = limits["text"]
        self.cut = 0
        self.images: list[Image.Image] = []
        self.dropped = 0

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Stays open: code that closes its stdout has not lost what it prints afterwards."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        length = len(text)
        kept = min(length, self.room)
        if kept:
            self.texts.append(text[:kept])
            self.room -= kept
        self.cut += length - kept
        return length

    def display(self, *values: Any) -> None:
        """Show values as a notebook does: images as images, the rest by its repr."""
        for value in values:
            if not isinstance(value, Image.Image):
                self.write(repr(value) + "\n")
            elif len(self.images) == self.limits["images"]:
                self.dropped += 1
            elif 0 in value.size:
                self.write(f"[image of {value.width}x{value.height} pixels not shown]\n")
            else:
                self.images.append(self.snapshot(value))

    def snapshot(self, image: Image.Image) -> Image.Image:
        """An RGB copy, scaled down to the limit: the code may go on drawing in the original."""
        area, limit = image.width * image.height, self.limits["pixels"]
        if area <= limit:
            return image.copy() if image.mode == "RGB" else image.convert("RGB")
        scale = math.sqrt(limit / area)
        size = [max(1, min(limit, int(side * scale))) for side in image.size]
        # A strip of one pixel cannot shrink both ways.
        size = [min(side, limit // min(size)) for side in size]
        self.write(f"[image scaled from {image.width}x{image.height} to {size[0]}x{size[1]}]\n")
        return image.convert("RGB").resize((size[0], size[1]))


def run(code: str, scope: dict[str, Any], screen: Screen) -> str | None:
    """Run the code with the value of a last expression displayed. Returns the error, or None."""
    try:
        tree = compile(code, CODE_FILE, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, CODE_FILE, "exec", dont_inherit=True), scope)
        if last is not None:
            expression = ast.Expression(last.value)
            value = eval(compile(expression, CODE_FILE, "eval", dont_inherit=True), scope)
            if value is not None:
                screen.display(value)
    except BaseException as error:  # SystemExit, KeyboardInterrupt: all are the code's own
        with contextlib.suppress(OSError, ValueError):
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return describe(error)
    return None


def describe(error: BaseException) -> str | None:
    """'ZeroDivisionError: division by zero (line 3)'; None for an exit without an error."""
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return None
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == CODE_FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # the code may define an exception that cannot be printed
        message = "<exception str() failed>"
    name = type(error).__name__
    text = f"{name}: {message}" if message else name
    text = text if len(text) <= 1000 else text[:1000] + "..."
    return text if line is None else f"{text} (line {line})"


def confine(limits: dict[str, Any], base: int) -> None:
    """Bound what this process may use. base: bytes of address space in use before the code."""
    seconds = math.ceil(limits["seconds"]) + 1
    memory = base + limits["memory"]
    bounds = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (memory, memory + SLACK),
        resource.RLIMIT_FSIZE: (limits["file"], limits["file"]),
        resource.RLIMIT_CORE: (0, 0),
    }
    for name, (soft, hard) in bounds.items():
        ceiling = resource.getrlimit(name)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(name, (soft, hard))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, the kernel shall not take the trainer


def child(
    header: dict[str, Any], images: dict[str, Image.Image], limits: dict[str, Any], base: int
) -> None:
    """Run one call and write its result frame. Its fds are 0-2 (null) and RESULT_FD."""
    me = _getpid()
    screen = Screen(limits)
    random.seed(header["seed"])
    confine(limits, base)
    result = answer(header["code"], images, screen)
    if _getpid() == me:
        # Else a fork of the code fell through to here: only the first process answers.
        write_frame(RESULT_FD, *result)


def answer(
    code: str, images: dict[str, Image.Image], screen: Screen
) -> tuple[dict[str, Any], bytes]:
    """Run the code with what it finds in scope. Returns header and body of the result frame."""
    scope = {"__name__": "__main__", "Image": Image, "np": numpy, "math": math}
    scope |= {"display": screen.display, "show": screen.display} | images
    Image.Image.show = lambda self, *_, **__: screen.display(self)  # type: ignore[method-assign]
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = screen
    error = run(code, scope, screen)
    sys.stdout, sys.stderr = stdout, stderr
    result = {
        "text": "".join(screen.texts),
        "cut": screen.cut,
        "error": error,
        "images": [image.size for image in screen.images],
        "dropped": screen.dropped,
    }
    return result, b"".join(image.tobytes() for image in screen.images)


# --- The zygote: the calls one after another ------------------------------------------------------


def take_images(
    header: dict[str, Any], body: bytearray, held: dict[int, Image.Image]
) -> dict[str, Image.Image]:
    """image_1, image_2, ... of a request: [key] is an image held from an earlier one, and
    [key, mode, width, height] a new one, its raw pixels next in the body. The trainer says what
    to forget: it keeps the same account."""
    for key in header["forget"]:
        del held[key]
    start = 0
    for key, *new in header["images"]:
        if new:
            mode, width, height = new
            size = width * height * len(mode)  # L, RGB, RGBA: a byte for each letter
            pixels = memoryview(body)[start : start + size]
            held[key] = Image.frombytes(mode, (width, height), pixels)
            start += size
    return {f"image_{n}": held[key] for n, (key, *_) in enumerate(header["images"], 1)}


def serve(
    header: dict[str, Any],
    body: bytearray,
    limits: dict[str, Any],
    held: dict[int, Image.Image],
    requests: int,
    directory: str,
) -> tuple[dict[str, Any], bytes | bytearray]:
    """Fork, wait for the result, kill whatever is left. Returns the reply's header and body."""
    os.mkdir(directory)
    # Whatever can be done before the fork is: a page first written to in the child costs 3 us.
    images = take_images(header, body, held)
    numpy.random.seed(header["seed"])
    with open("/proc/self/statm") as file:
        base = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.chdir(directory)
            os.dup2(0, 2)
            os.dup2(write_end, RESULT_FD)
            os.closerange(RESULT_FD + 1, OPEN_FILES)
            child(header, images, limits, base)
        finally:
            # Also on an exception: a forked child must never return into the zygote's loop.
            _exit(0)
    os.close(write_end)
    try:
        ended, frame = watch(pid, read_end, limits, requests)
    finally:
        os.close(read_end)
        status = end(pid)
    try:
        os.rmdir(directory)
    except OSError:
        # Deep trees and odd modes may defeat this; the next call has a directory of its own.
        with contextlib.suppress(OSError, RecursionError):
            shutil.rmtree(directory)
    died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"ended": ended, "signal": died}, frame


def watch(
    pid: int, result: int, limits: dict[str, Any], requests: int
) -> tuple[str, bytes | bytearray]:
    """Wait for one result frame. Returns how the wait ended ("result", "timeout", "died",
    "malformed") and the frame. Exits where the trainer has gone."""
    deadline = time.monotonic() + limits["seconds"]
    process = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(result, select.POLLIN)
    poll.register(process, select.POLLIN)
    poll.register(requests, 0)  # POLLHUP comes unasked
    frame, size = bytearray(), PREFIX.size
    try:
        while len(frame) < size:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return "timeout", b""
            ready = {fd for fd, _ in poll.poll(remaining * 1000)}
            if requests in ready:
                end(pid)
                leave()
            if result in ready:
                # Never past this frame: who else holds the pipe may write what he likes.
                chunk = os.read(result, min(size - len(frame), 1 << 20))
                if not chunk:
                    return "died", b""
                frame += chunk
                if len(frame) == PREFIX.size == size:
                    head, tail = PREFIX.unpack(frame)
                    if head > limits["header"] or tail > limits["body"]:
                        return "malformed", b""
                    size += head + tail
            elif process in ready:
                return "died", b""  # and nothing left in the pipe
        return "result", frame
    finally:
        os.close(process)


def end(pid: int) -> int:
    """Kill the call's process group and every descendant that left it. Returns the exit status
    of `pid`. Exits, for the trainer to start anew, where they cannot be killed in time."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    # As the subreaper this process inherits every orphan, so no descendant gets out of sight.
    give_up = time.monotonic() + 2
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                if time.monotonic() > give_up:
                    sys.exit("descendants of a call cannot be killed")
                for orphan in children():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(orphan, signal.SIGKILL)
                time.sleep(0.001)
        except ChildProcessError:
            return status


def children() -> list[int]:
    """The ids of this process's children, from /proc: there is no other list of them."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def leave() -> NoReturn:
    """The trainer has gone: nobody is left to answer."""
    _exit(0)


def rehearse(limits: dict[str, Any]) -> None:
    """Run what every child runs, so that caches and specialised bytecode are shared, not copied."""
    Image.preinit()
    header = {"forget": [], "images": [(0, "RGB", 8, 8)]}
    for _ in range(20):
        images = take_images(header, bytearray(192), {})
        result, _ = answer("print(image_1.crop((0, 0, 4, 4)))\nimage_1", images, Screen(limits))
        json.dumps(result)


def main() -> None:
    """Answer requests on stdin, one at a time, on stdout, until the trainer goes."""
    limits = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # stderr remains the log: this process writes there only when it breaks
    os.close(null)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    trainer = os.getppid()
    rehearse(limits)
    gc.collect()
    gc.freeze()  # the collector must not touch, and so copy, the pages that all children share
    write_frame(replies, {"ended": "ready"})
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    root, number, held = os.getcwd(), 0, {}
    while True:
        # No PDEATHSIG here: it follows the *thread* that started this process, which may end long
        # before the trainer. The pipe tells, and the parent's id where a fork still holds the pipe.
        while not poll.poll(2000):
            if os.getppid() != trainer:
                leave()
        try:
            head, tail = PREFIX.unpack(read_exactly(requests, PREFIX.size))
            header = json.loads(read_exactly(requests, head))
            body = read_exactly(requests, tail)
            number += 1
            directory = os.path.join(root, f"call{number}")
            reply, frame = serve(header, body, limits, held, requests, directory)
            write_frame(replies, reply, frame)
        except (EOFError, BrokenPipeError):
            leave()


if __name__ == "__main__":
    main()
