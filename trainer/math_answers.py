"""Comparison of mathematical expressions, by math-verify in a process of its own.

math-verify bounds its time by signals, which reach the main thread alone and do not interrupt an
arithmetic operation in C. A process can be killed, whatever it does and whoever waits for it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from trainer.quantities import Outcome

log = logging.getLogger(__name__)

MAX_LENGTH = 300
MAX_POWER = 64
MAX_DIGITS = 20
START_SECONDS = 30.0
"""For the process to import sympy, on a slow disk."""

_WORKER = Path(__file__).with_name("_math_worker.py")
_ALLOWED = re.compile(
    r"[A-Za-z0-9\s+*/^=<>()\[\]{}\\,.|!_:;%&\u00b0\u03c0\u221a\u221e\u00b1\u2264\u2265-]*"
)
_SIGN = re.compile(r"[\^=+*/<>\\\u221a\u03c0\u221e]|[-(\[{|] ?[\w\\]|\b\d+[A-Za-z]\b")
_JOINED = re.compile(r"\d+(?:[-:/]\d+)+")
"""A score, a range, a date: no arithmetic, but for one "/", which is a fraction."""
_FUNCTIONS = frozenset("sqrt log exp sin cos tan cot sec csc arcsin arccos arctan".split())
_WORD = re.compile(r"\\?[A-Za-z]+")
_ASSIGNMENT = re.compile(r"(?:[A-Za-z]|[A-Za-z]\([A-Za-z]\)) ?= ?")


def looks_mathematical(text: str) -> bool:
    """Whether a cleaned answer is an expression and not words."""
    if not text or len(text) > MAX_LENGTH or not _ALLOWED.fullmatch(text):
        return False
    if "__" in text or not (_SIGN.search(text) or re.fullmatch(r"[-+]?[\d.]+|[a-z]", text)):
        return False
    words = [word for word in _WORD.findall(text) if not word.startswith("\\")]
    return all(len(word) <= 2 or word.casefold() in _FUNCTIONS | {"pi"} for word in words)


def is_costly(text: str) -> bool:
    """Whether evaluating an expression might take long: towers of powers, large powers, large
    factorials, long numbers, deep nesting. Judged by its form alone."""
    text = text.replace("**", "^").replace(" ", "")
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", text) or re.search(r"!!|\d{3,}!|[)}}]!", text):
        return True
    depth = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        if depth > 12:
            return True
    for found in re.finditer(r"\^", text):
        power, behind = _group(text, found.end())
        if "^" in power or "!" in power or behind.startswith(("^", "!")):
            return True
        if any(int(number) > MAX_POWER for number in re.findall(r"\d+", power)):
            return True
    return len(re.findall(r"\\(?:sum|prod|int|lim|binom|dbinom)", text)) > 1


def _group(text: str, start: int) -> tuple[str, str]:
    """What stands behind "^": a balanced group, or a run of letters, digits and points."""
    start += text[start : start + 1] in ("-", "+")
    if text[start : start + 1] in ("(", "{", "["):
        depth = 0
        for end in range(start, len(text)):
            depth += (text[end] in "({[") - (text[end] in ")}]")
            if depth == 0:
                return text[start : end + 1], text[end + 1 :]
        return text[start:], ""
    found = re.compile(r"\\?[\w.]*").match(text, start)
    end = found.end() if found else start
    return text[start:end], text[end:]


def _latex(text: str) -> str:
    """As the parser reads it: sqrt(2) is \\sqrt{2}, * is \\cdot, "x =" before one side goes."""
    text = text.replace("**", "^").replace("\u03c0", r"\pi ").replace("\u221e", r"\infty ")
    text = re.sub(r"(?<![\\A-Za-z])sqrt ?\(([^()]{0,100})\)", r"\\sqrt{\1}", text)
    text = re.sub("\u221a ?\\(([^()]{0,100})\\)|\u221a ?(\\d+|[A-Za-z])", r"\\sqrt{\1\2}", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|exp|ln)(?![A-Za-z])", r"\\\1 ", text)
    text = text.replace("*", r"\cdot ").replace("\u2264", r"\le ").replace("\u2265", r"\ge ")
    return text.replace("\u00b1", r"\pm ").replace("\u00b0", r"^\circ ").replace("%", r"\%")


def math_equal(answer: str, truth: str, seconds: float) -> tuple[Outcome, str]:
    """(outcome, rule) for two cleaned texts; the rule is "" where they are no mathematics.

    "incorrect" only where both are finite numbers more than a twentieth apart. An answer of several
    sides ("1 = 2 = 7") or several expressions is never equal to anything.
    """
    if not looks_mathematical(truth) or not looks_mathematical(answer):
        return "undecided", ""
    if _JOINED.fullmatch(truth) and not re.fullmatch(r"\d+/\d+", truth):
        return "undecided", ""
    if "=" not in _side(truth):
        named = [found[0].rstrip("= ") for t in (truth, answer) if (found := _ASSIGNMENT.match(t))]
        if len(set(named)) > 1:  # "x = 5" is no "y = 5"
            return "undecided", "math.several"
        truth, answer = _side(truth), _side(answer)
        if "=" in answer:
            return "undecided", "math.several"
    if any(";" in t or "\\boxed" in t or "\\\\" in t for t in (answer, truth)):
        return "undecided", "math.several"
    if is_costly(answer) or is_costly(truth):
        return "undecided", "math.refused"
    reply = _workers.ask(_latex(answer), _latex(truth), seconds)
    if reply == "equal":
        return "correct", "math"
    if reply == "different":
        return "incorrect", "math"
    return "undecided", f"math.{reply.split()[0]}"


def _side(text: str) -> str:
    """Without "x =" at its start."""
    found = _ASSIGNMENT.match(text)
    return text[found.end() :] if found else text


class _Worker:
    """One process, one question at a time; started when it is first needed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._number = 0
        self._unavailable = ""
        self._hung: set[bytes] = set()
        self.starts = 0

    def ask(self, answer: str, truth: str, seconds: float) -> str:
        """ "equal", "different", "unsure", "unparsed", "timeout", "error ..." or "unavailable".

        Takes no longer than `seconds` from when it is this question's turn, or START_SECONDS more
        where the process has to be started.
        """
        with self._lock:
            if self._unavailable:
                return "unavailable"
            key = hashlib.sha256(f"{answer}\0{truth}".encode()).digest()
            if key in self._hung:  # a policy that repeats it pays once, and so do we
                return "timeout"
            if self._pid != os.getpid():  # a fork: the process is the parent's
                self._process = None
            if self._process is None and not self._start():
                return "unavailable"
            self._number += 1
            request = json.dumps([self._number, answer, truth]) + "\n"
            reply = self._exchange(request.encode(), seconds)
            if not isinstance(reply, list) or len(reply) != 2 or reply[0] != self._number:
                self._stop()
                if len(self._hung) < 10_000:
                    self._hung.add(key)
                return "timeout" if reply is None else "error crashed"
            return str(reply[1])

    def _start(self) -> bool:
        if importlib.util.find_spec("math_verify") is None:
            self._unavailable = "not installed"
            log.warning("expressions are not compared: pip install math-verify")
            return False
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # no Ctrl-C of the terminal
        )
        self._pid = os.getpid()
        self.starts += 1
        if self._exchange(b"", START_SECONDS) != "ready":
            self._stop()
            self._unavailable = "does not start"
            log.warning("expressions are not compared: the process for it does not start")
            return False
        return True

    def _exchange(self, request: bytes, seconds: float):
        """The next line as JSON; None past the time, "" where the process ended."""
        assert self._process is not None and self._process.stdin and self._process.stdout
        end = time.monotonic() + seconds
        received = b""
        waiting = select.poll()  # not select.select: descriptors may be past 1,023
        waiting.register(self._process.stdout, select.POLLIN)
        try:
            if request:
                self._process.stdin.write(request)  # at most a few kB: a pipe holds it
            while not received.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0 or not waiting.poll(left * 1000):
                    return None
                piece = os.read(self._process.stdout.fileno(), 4096)
                if not piece:
                    return ""
                received += piece
            return json.loads(received)
        except (OSError, ValueError):
            return ""

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            pipe.close()

    def close(self) -> None:
        with self._lock:
            if self._pid == os.getpid():
                self._stop()


_workers = _Worker()
atexit.register(_workers.close)
