"""What a tool said, compared: the reference's wording around it, white space, numbers."""

from __future__ import annotations

import math
import re

_WRAPPED = re.compile(r"\s*Code execution result:\s*", re.IGNORECASE)
_STREAM = re.compile(r"(?m)^\s*std(?:out|err):[ \t]*")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,16}\b")
_PIECE = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?|[^\s\d]+|\d")
_FAILED = re.compile(
    r"(?m)^\s*(?:stderr:\s*)?"
    r"(?:Error\b|Traceback \(most recent|[A-Za-z_.]{1,60}(?:Error|Exception)\b)"
)
_LINE = re.compile(r" \(line \d+\)\s*$")
_SILENT = ("", "(no output)", "none")


def said(text: str) -> str:
    """A tool's words alone: without the heads that the reference puts before them ("Code execution
    result:", "stdout:", "stderr:") and with single spaces."""
    text = _STREAM.sub(" ", _WRAPPED.sub("", text, count=1))
    return " ".join(text.split())


def is_silent(text: str) -> bool:
    """Whether the text tells nothing."""
    return said(text).casefold() in _SILENT


def tells_failure(text: str) -> bool:
    """Whether a tool's text says that the call failed."""
    return bool(_FAILED.search(_WRAPPED.sub("", text, count=1)))


def agree(recorded: str, executed: str, tolerance: float) -> bool:
    """Whether two texts say the same: equal but for white space, the reference's heads, addresses
    of memory, and numbers with a point that differ by at most `tolerance`, relatively."""
    left, right = (_ADDRESS.sub("0x", said(text)) for text in (recorded, executed))
    if left == right or (left.casefold() in _SILENT and right.casefold() in _SILENT):
        return True
    pieces, others = _PIECE.findall(left), _PIECE.findall(right)
    return len(pieces) == len(others) and all(
        one == other or _close(one, other, tolerance)
        for one, other in zip(pieces, others, strict=True)
    )


def fail_alike(recorded: str, executed: str, tolerance: float) -> bool:
    """Whether both texts tell of the same failure: they agree, or their last lines do, for the
    trace before the error, and the line behind it, are others in another interpreter."""
    if agree(recorded, executed, tolerance):
        return True
    if not tells_failure(recorded):
        return False
    spoken = [[line for line in text.splitlines() if said(line)] for text in (recorded, executed)]
    one, other = (_LINE.sub("", lines[-1]) if lines else "" for lines in spoken)
    return agree(one, other, tolerance)


def _close(one: str, other: str, tolerance: float) -> bool:
    """Of whole numbers every digit counts."""
    if not any(mark in text for text in (one, other) for mark in ".eE"):
        return False
    try:
        return math.isclose(float(one), float(other), rel_tol=tolerance, abs_tol=1e-12)
    except ValueError:
        return False
