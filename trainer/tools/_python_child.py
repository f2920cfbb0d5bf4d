"""What runs in a child of the python tool's worker: the policy's code, and what it is shown.

It runs inside the sandbox and imports nothing of the trainer. Everything here is within the reach
of the policy's code: nothing of it is relied on for safety.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import os
import random
import resource
import struct
import sys
from typing import Any

# numpy imports its subpackages on first use: 15 ms, in every child again.
import numpy
import numpy.fft
import numpy.linalg
import numpy.random
from PIL import Image

PREFIX = struct.Struct(">IQ")
"""Bytes of header, bytes of body."""

CODE_FILE = "<code>"
PLOTS = "matplotlib"
"""What is imported with the first code that names it."""
SLACK = 64 << 20
"""Bytes of address space kept back, so that a MemoryError can still be reported."""

# Taken now: the policy's code runs in a copy of this very module's process, and may rebind them.
_write, _getpid = os.write, os.getpid


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[_write(fd, view) :]


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


def import_plots(code: str) -> bool:
    """Imports matplotlib for code that names it, and not before: in its pages lies half of what a
    fork and its end cost, and most of a worker's start. Whether it did."""
    if PLOTS not in code or "matplotlib.pyplot" in sys.modules:
        return False
    with contextlib.suppress(Exception):  # the code's own import will say why
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    return "matplotlib.pyplot" in sys.modules


class Notebook:
    """The names that the code finds, and those it leaves: for one call, or for a session's."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {
            "__name__": "__main__",
            "Image": Image,
            "np": numpy,
            "math": math,
        }
        self.images: dict[str, Image.Image] = {}

    def answer(
        self, code: str, images: dict[str, Image.Image], limits: dict[str, Any]
    ) -> tuple[dict[str, Any], bytes]:
        """Run the code; header and body of the result frame."""
        screen = Screen(limits)
        self.scope |= {"display": screen.display, "show": screen.display} | images
        Image.Image.show = lambda self, *_, **__: screen.display(self)  # type: ignore[method-assign]
        import_plots(code)
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.show = lambda *_, **__: figures(screen)
        stdout, stderr = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = screen
        error = run(code, self.scope, screen)
        # Drawing is the code's business, too: a formatter of its own may raise, or never end.
        try:
            figures(screen)
        except BaseException as problem:
            error = error or describe(problem)
        sys.stdout, sys.stderr = stdout, stderr
        result = {
            "text": "".join(screen.texts),
            "cut": screen.cut,
            "error": error,
            "images": [image.size for image in screen.images],
            "dropped": screen.dropped,
        }
        return result, b"".join(image.tobytes() for image in screen.images)


def figures(screen: Screen) -> None:
    """Show the open figures and close them, as a notebook does."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None or not pyplot.get_fignums():
        return
    try:
        for number in pyplot.get_fignums():
            canvas = pyplot.figure(number).canvas
            width, height = canvas.get_width_height()
            if len(screen.images) == screen.limits["images"]:
                screen.dropped += 1
            elif width * height > 16 * screen.limits["pixels"]:
                screen.write(f"[figure of {width}x{height} pixels not shown]\n")
            else:
                canvas.draw()
                screen.display(Image.fromarray(numpy.asarray(canvas.buffer_rgba())))
    finally:
        pyplot.close("all")  # one that cannot be drawn shall not fail every call to come


def restrain(limits: dict[str, Any], base: int) -> None:
    """Soft limits of one call, which code may have raised. base: bytes of address space in use
    before any code."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(usage.ru_utime + usage.ru_stime + limits["seconds"]) + 1
    for name, soft in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, base + limits["memory"]),
    ):
        hard = resource.getrlimit(name)[1]
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(name, (soft, hard))


def once(
    header: dict[str, Any],
    images: dict[str, Image.Image],
    limits: dict[str, Any],
    base: int,
    result: int,
) -> None:
    """Run one call and write its result frame to the descriptor `result`."""
    me = _getpid()
    random.seed(header["seed"])
    restrain(limits, base)
    frame = Notebook().answer(header["code"], images, limits)
    if _getpid() == me:
        # Else a fork of the code fell through to here: only the first process answers.
        write_frame(result, *frame)


def session(
    images: dict[str, Image.Image], limits: dict[str, Any], base: int, requests: int, result: int
) -> None:
    """Run calls until there are no more. `images` are those of the first request; a request
    brings only images that are new since the last: "keep" of them stay."""
    me = _getpid()
    notebook = Notebook()
    originals = list(images.values())
    while True:
        try:
            head, tail = PREFIX.unpack(read_exactly(requests, PREFIX.size))
        except EOFError:
            return
        header = json.loads(read_exactly(requests, head))
        body = memoryview(read_exactly(requests, tail))
        reap()
        if header["seed"] is not None:
            random.seed(header["seed"])
        del originals[header["keep"] :]
        for mode, width, height in header["new"]:
            size = width * height * len(mode)
            originals.append(Image.frombytes(mode, (width, height), body[:size]))
            body = body[size:]
        del body
        restrain(limits, base)
        named = {f"image_{n}": image for n, image in enumerate(originals, 1)}
        fresh = {
            name: anew(image, header["code"])
            for name, image in named.items()
            if name in header["code"] or name not in notebook.scope
        }
        frame = notebook.answer(header["code"], fresh, limits)
        if _getpid() != me:
            return
        write_frame(result, *frame)
        del frame, fresh


def anew(image: Image.Image, code: str) -> Image.Image:
    """The image as it was, whatever earlier calls have painted over it. Where the code cannot
    paint pixel by pixel (`load`) it shares the pixels until something paints: Pillow copies what is
    read-only before it draws, and a copy of a large photograph would cost every call 5 ms."""
    if "load" in code:
        return image.copy()
    shared = image._new(image.im)
    shared.readonly = 1
    return shared


def from_file(limits: dict[str, Any], request: str, result: str) -> None:
    """Run one call whose request frame is in a file, and leave the result frame in another: on a
    machine of somebody else's, which has its own limits and walls."""
    with open(request, "rb") as file:
        head, _ = PREFIX.unpack(file.read(PREFIX.size))
        header = json.loads(file.read(head))
        images = {}
        for n, (_, mode, width, height) in enumerate(header["images"], 1):
            pixels = file.read(width * height * len(mode))
            images[f"image_{n}"] = Image.frombytes(mode, (width, height), pixels)
    numpy.random.seed(header["seed"])
    with open("/proc/self/statm") as file:
        base = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    # The limits of memory are raised again where there is an error to report, as in a worker.
    resource.setrlimit(resource.RLIMIT_AS, _within(base + limits["memory"] + SLACK))
    fd = os.open(result, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    once(header, images, limits, base, fd)


def _within(value: int) -> tuple[int, int]:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    return value, value


def reap() -> None:
    """Processes that earlier calls left behind were killed; this collects them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def rehearse(limits: dict[str, Any]) -> None:
    """Run what every child runs, so that caches and specialised bytecode are shared, not copied."""
    Image.preinit()
    for _ in range(20):
        images = {"image_1": Image.new("RGB", (8, 8))}
        code = "print(image_1.crop((0, 0, 4, 4)))\nimage_1"
        result, _ = Notebook().answer(code, images, limits)
        json.dumps(result)
